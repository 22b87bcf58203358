"""ReLU linear attention and its directional derivative as they are defined.

The specification of the fast paths: plain differentiable torch, derivatives of any order, float64
where the inputs are. 16-bit inputs are computed in float32.
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Return O = Q S / (Q z + eps) [B, h, N, e] with Q = relu(q), K = relu(k), S = Kᵀ V, z = Kᵀ 1.

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d], where g divides h.
        v: [B, g, M, e].
        eps: added to the denominator.
    """
    Q, K, V = _computed(q, k, v)
    Q, K = Q.relu(), K.relu()
    out = (Q @ (K.mT @ V)) / (Q @ _total(K) + eps)
    return out.to(v.dtype)


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return O and its tangent Ȯ, [B, h, N, e] each.

        Q̇ = 1[q > 0] ∘ q̇,  K̇ = 1[k > 0] ∘ k̇,  Ṡ = K̇ᵀ V + Kᵀ V̇,  ż = K̇ᵀ 1
        Ȯ = (Q̇ S + Q Ṡ - (Q̇ z + Q ż) ∘ O) / (Q z + eps)

    Args:
        q, k, v, eps: as in `attention`.
        q_t, k_t, v_t: the tangents q̇, k̇, V̇, of their primals' shapes; None is 0.
    """
    tangents = (torch.zeros_like(x) if t is None else t for x, t in ((q, q_t), (k, k_t), (v, v_t)))
    (Q, K, V), (Q_t, K_t, V_t) = _computed(q, k, v), _computed(*tangents)
    Q_t, K_t = Q_t * (Q > 0), K_t * (K > 0)
    Q, K = Q.relu(), K.relu()
    S, z = K.mT @ V, _total(K)
    S_t, z_t = K_t.mT @ V + K.mT @ V_t, _total(K_t)
    denominator = Q @ z + eps
    out = (Q @ S) / denominator
    out_t = (Q_t @ S + Q @ S_t - (Q_t @ z + Q @ z_t) * out) / denominator
    return out.to(v.dtype), out_t.to(v.dtype)


def _total(K: Tensor) -> Tensor:
    """Kᵀ 1 [B, h, d, 1]."""
    return K.sum(2)[..., None]


def _computed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 or float64, and the keys and values repeated for all query heads."""
    working = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    return q.to(working), k.to(working), v.to(working)
