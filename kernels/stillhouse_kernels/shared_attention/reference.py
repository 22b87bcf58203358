"""Shared attention as it is defined: A = softmax(scale Q K^T + mask), O_l = A V_l.

The specification of the fast paths: plain differentiable torch that holds A [B, h, N, M], in
float64 where the inputs are. 16-bit inputs are computed in float32.
"""

import torch
from torch import Tensor


def attention_probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return A [B, h, N, M] and the scores' log-sum-exp [B, h, N].

    A row without keys is 0, its log-sum-exp -inf.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d], where h_kv divides h.
        mask: None or boolean, broadcastable to [B, h, N, M]; True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
    """
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    scores = scale * q @ _for_each_query_head(k, q.shape[1]).mT
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        queries, keys = scores.shape[2:]
        allowed = allowed.tril(keys - queries)
    if mask is not None:
        allowed = allowed & mask
    # A finite fill keeps the gradient of a row without keys 0; -inf would make it NaN.
    lowest = torch.finfo(scores.dtype).min
    probabilities = scores.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0)
    lse = scores.detach().masked_fill(~allowed, -torch.inf).logsumexp(-1)
    return probabilities, lse


def apply_probabilities(probabilities: Tensor, v: Tensor) -> Tensor:
    """Return O = A V [B, h, N, e] in v's dtype, for v [B, h_kv, M, e] where h_kv divides h."""
    values = _for_each_query_head(v.to(probabilities.dtype), probabilities.shape[1])
    return (probabilities @ values).to(v.dtype)


def _for_each_query_head(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], dim=1)
