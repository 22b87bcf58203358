"""Layer norm modulated by a condition, with its directional derivative, in one pass over memory.

Transformers that are conditioned by adaptive norms (DiT 2212.09748, Sana 2410.10629) run it twice
or three times a block; a continuous-time consistency loss differentiates every one along a
direction. `README.md` has the derivation and the counts.
"""

from stillhouse_kernels.modulated_norm.interface import (
    modulated_layer_norm,
    modulated_layer_norm_jvp,
)

__all__ = ["modulated_layer_norm", "modulated_layer_norm_jvp"]
