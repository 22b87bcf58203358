"""Attention whose weights are computed once by a leading layer and reused by the layers behind it.

EchoAtt (2409.14595) and kin: the leader computes A = softmax(scale Q K^T + mask) and O = A V, each
follower O_l = A V_l with values of its own. `README.md` has the derivation and the counts.
"""

from stillhouse_kernels.shared_attention.interface import (
    SharedAttention,
    follower_attention,
    leader_attention,
)

__all__ = ["SharedAttention", "follower_attention", "leader_attention"]
