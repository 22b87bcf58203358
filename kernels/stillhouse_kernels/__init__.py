"""Kernels of distillation's hot paths: torch, and triton where it is installed.

The package knows nothing of `stillhouse`. Each operation is a folder with its truth
(`reference.py`), its CPU path (`streaming.py`), its GPU kernel (`kernel.py`) and its derivation
(`README.md`); every public function is exported from here. What several operations share lies
beside the folders: `tiles.py` for kernels, `launching.py` for their grids, `attention_inputs.py`,
`forward_mode.py` and `primal_gradients.py` for what comes before and behind an operator.
"""

from stillhouse_kernels.dispatch import Backend, BackendError
from stillhouse_kernels.linear_attention import (
    relu_linear_attention,
    relu_linear_attention_jvp,
)
from stillhouse_kernels.modulated_norm import modulated_layer_norm, modulated_layer_norm_jvp
from stillhouse_kernels.shared_attention import (
    SharedAttention,
    follower_attention,
    leader_attention,
)
from stillhouse_kernels.tangent_attention import attention, attention_jvp
from stillhouse_kernels.vocabulary_loss import TeacherTopK, linear_divergence

__all__ = [
    "Backend",
    "BackendError",
    "SharedAttention",
    "TeacherTopK",
    "attention",
    "attention_jvp",
    "follower_attention",
    "leader_attention",
    "linear_divergence",
    "modulated_layer_norm",
    "modulated_layer_norm_jvp",
    "relu_linear_attention",
    "relu_linear_attention_jvp",
]
