"""The fast paths as torch operators, opaque to torch.compile.

Each takes the name of the path that runs, `streaming` or `triton`, which is imported when it is
first needed. Autocast is off inside: what to cast was decided where the tensors came in.
"""

from types import ModuleType

import torch
from torch import Tensor

from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.shared_attention import streaming


def path(backend: str) -> ModuleType:
    """Return the module that implements `streaming` or `triton`."""
    if backend == "triton":
        from stillhouse_kernels.shared_attention import launch

        return launch
    return streaming


@torch.library.custom_op("stillhouse_kernels::shared_attention_leader", mutates_args=())
def leader_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O = A V [B, h, N, e], lse [B, h, N] and what the path keeps of A (perhaps nothing).

    Args:
        q: [B, h, N, d].
        k: [B, h_kv, M, d].
        v: [B, h_kv, M, e].
        mask: None or boolean [B or 1, h or 1, N, M], True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
        backend: `streaming` or `triton`.
    """
    with autocast_off(q):
        return path(backend).leader_forward(q, k, v, mask, causal, scale)


@leader_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    entries = streaming.stored_entries(q, k, causal) if backend == "streaming" else 0
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=working), q.new_empty(entries)


@torch.library.custom_op("stillhouse_kernels::shared_attention_follower", mutates_args=())
def follower_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Return O = A V [B, h, N, e] for v [B, h_kv', M, e]; the others are the leader's."""
    with autocast_off(q):
        return path(backend).follower_forward(q, k, v, lse, probabilities, mask, causal, scale)


@follower_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("stillhouse_kernels::shared_attention_value_backward", mutates_args=())
def value_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    kv_heads: int,
    backend: str,
) -> Tensor:
    """Return dV = A^T dO [B, kv_heads, M, e], summed over the query heads of a group."""
    with autocast_off(q):
        return path(backend).value_backward(
            q, k, lse, probabilities, grad_out, mask, causal, scale, kv_heads
        )


@value_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    kv_heads: int,
    backend: str,
) -> Tensor:
    return q.new_empty(q.shape[0], kv_heads, k.shape[2], grad_out.shape[3])


@torch.library.custom_op("stillhouse_kernels::shared_attention_score_backward", mutates_args=())
def score_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    values: list[Tensor],
    grad_outs: list[Tensor],
    delta: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return dQ and dK of a group: dS = A o (sum_l dO_l V_l^T - delta), dQ = scale dS K.

    Args:
        q: [B, h, N, d].
        k: [B, h_kv, M, d].
        lse: [B, h, N].
        probabilities: what the path kept of A.
        values: V_l [B, h_l, M, e_l] of every layer that had a gradient, the leader included.
        grad_outs: dO_l [B, h, N, e_l] of the same.
        delta: sum_l rowsum(dO_l o O_l) [B, h, N], float32 or better.
        mask: as in the forward pass.
        causal: likewise.
        scale: likewise.
        backend: likewise.
    """
    with autocast_off(q):
        return path(backend).score_backward(
            q, k, lse, probabilities, values, grad_outs, delta, mask, causal, scale
        )


@score_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    values: list[Tensor],
    grad_outs: list[Tensor],
    delta: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)
