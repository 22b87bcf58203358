"""Attention with its directional derivative, in one pass that holds no [queries, keys] array.

Continuous-time consistency losses (sCM 2410.11081, rCM 2510.08431, MeanFlow) differentiate a
network along a direction; attention is the layer whose fused kernels have no forward-mode rule.
`README.md` has the derivation and the counts.
"""

from stillhouse_kernels.tangent_attention.interface import attention, attention_jvp

__all__ = ["attention", "attention_jvp"]
