"""ReLU linear attention with its directional derivative: two passes, linear in the tokens.

The self-attention of Sana (2410.10629), whose few-step students (SANA-Sprint 2503.09641) are
trained along a tangent. `README.md` has the derivation and the counts.
"""

from stillhouse_kernels.linear_attention.interface import (
    relu_linear_attention,
    relu_linear_attention_jvp,
)

__all__ = ["relu_linear_attention", "relu_linear_attention_jvp"]
