"""Attention and its directional derivative as they are defined.

The specification of the fast paths: plain differentiable torch, derivatives of any order, float64
where the inputs are. 16-bit inputs are computed in float32. It holds arrays of [B, h, N, M].
"""

import torch
from torch import Tensor

from stillhouse_kernels.shared_attention.reference import (
    apply_probabilities,
    attention_probabilities,
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O = P V [B, h, N, e] and lse [B, h, N], P = softmax(scale Q Kᵀ + mask).

    A row without keys has O = 0 and lse = -inf.

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d], where g divides h.
        v: [B, g, M, e].
        mask: None or boolean, broadcastable to [B, h, N, M]; True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
    """
    P, lse = attention_probabilities(q, k, mask, causal, scale)
    return apply_probabilities(P, v), lse


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, its tangent Ȯ [B, h, N, e] and lse [B, h, N].

        Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ),  H = P ∘ Ṡ,  μ = rowsum H,  Ȯ = P V̇ + H V - μ ∘ O

    Args:
        q, k, v, mask, causal, scale: as in `attention`.
        q_t, k_t, v_t: the tangents Q̇, K̇, V̇, of their primals' shapes; None is 0.
    """
    P, lse = attention_probabilities(q, k, mask, causal, scale)
    out = _times(P, v)
    out_t = torch.zeros_like(out) if v_t is None else _times(P, v_t)
    if q_t is not None or k_t is not None:
        S_t = scale * (_scores(q_t, k, P) + _scores(q, k_t, P))
        # A hidden score has no tangent: 0 times whatever stands there.
        H = P * S_t.masked_fill(P == 0, 0)
        out_t = out_t + _times(H, v) - H.sum(-1, keepdim=True) * out
    return out.to(v.dtype), out_t.to(v.dtype), lse


def _scores(q: Tensor | None, k: Tensor | None, P: Tensor) -> Tensor:
    if q is None or k is None:
        return torch.zeros_like(P)
    return q.to(P.dtype) @ k.to(P.dtype).repeat_interleave(P.shape[1] // k.shape[1], dim=1).mT


def _times(P: Tensor, v: Tensor) -> Tensor:
    return P @ v.to(P.dtype).repeat_interleave(P.shape[1] // v.shape[1], dim=1)
