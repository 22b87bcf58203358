"""The two functions of shared attention, and the state that goes from one to the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse_kernels import attention_inputs
from stillhouse_kernels.shared_attention import arguments, autograd, operators, reference


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SharedAttention:
    """What a leader hands to its followers. Let go of it when the group ends: it may hold A.

    Attributes:
        q: the leader's queries [B, h, N, d], as computed with (after autocast); under a mask, those
            that see no key are 0.
        k: its keys [B, h_kv, M, d]; those that no query may attend to are 0.
        mask: None or boolean [B or 1, h or 1, N, M], True = attend.
        lse: log-sum-exp of the scores [B, h, N], float32 or better; -inf in a row without keys.
        probabilities: what is kept of A: [B, h, N, M] in the reference, else flat, perhaps empty.
        causal: whether query i sees only the keys j <= i + M - N.
        scale: of the scores.
        backend: `reference`, `streaming` or `triton`.
        unused_keys: None without a mask; boolean [B or 1, h or 1, M], True = attended by no query.
        ticket: scalar by which autograd orders the backward passes; None where followers send the
            leader no gradient that way.
        stash: where followers leave their part of the leader's gradient.
        versions: of q, k and mask when the leader ran; None where torch does not count.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    lse: Tensor
    probabilities: Tensor
    causal: bool
    scale: float
    backend: str
    unused_keys: Tensor | None
    ticket: Tensor | None
    stash: autograd.GradientStash | None
    versions: tuple[int | None, ...] | None


def leader_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    detach_qk: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SharedAttention]:
    """Return O = softmax(scale Q K^T + mask) V [B, h, N, e] and the state that followers need.

    A query without keys gets O = 0, and gradients of 0; it may hold anything, NaN included, as may
    a key that the mask hides from every query. Under autocast the tensors are cast as for SDPA.

    Args:
        q: queries [B, h, N, d]; float64, float32, float16 or bfloat16.
        k: keys [B, h_kv, M, d]; h is a multiple of h_kv.
        v: values [B, h_kv, M, e].
        mask: boolean, broadcastable to [B, h, N, M]; True = attend.
        causal: query i sees the keys j <= i + M - N (aligned bottom-right; M >= N).
        scale: of the scores; d^-1/2 by default.
        detach_qk: followers send no gradient into q and k (the leader's own output still does).
        backend: `auto`, `reference`, `streaming` or `triton`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a mask that is not boolean, a
            causal call with more queries than keys, a backend that is unknown or cannot run here.
    """
    q, k, v = (attention_inputs.autocast(t) for t in (q, k, v))
    attention_inputs.check("leader_attention", q, k, v, mask, causal)
    chosen = arguments.backend_for(backend, q, k, v)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    unused_keys = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        unused_keys = ~mask.any(2).expand(-1, -1, k.shape[2])
        unused_queries = attention_inputs.unused_queries(mask, causal, q.shape[2], k.shape[2])
        q = q.masked_fill(unused_queries[..., None], 0)
        mask = mask.expand(-1, -1, q.shape[2], k.shape[2])
        k, v = (attention_inputs.zero_unused(t, unused_keys) for t in (k, v))

    ticket = stash = None
    if chosen == "reference":
        with attention_inputs.autocast_off(q):
            A, lse = reference.attention_probabilities(q, k, mask, causal, factor)
            out = reference.apply_probabilities(A, v)
        probabilities = A.detach() if detach_qk else A
    elif torch.compiler.is_compiling():
        out, lse, probabilities = operators.leader_forward(q, k, v, mask, causal, factor, chosen)
    elif not _records(q, k, v):
        with attention_inputs.autocast_off(q):
            run = operators.path(chosen).leader_forward
            out, lse, probabilities = run(q, k, v, mask, causal, factor)
    else:
        stash = autograd.GradientStash()
        settings = (mask, causal, factor, chosen, stash)
        out, lse, probabilities, ticket = autograd.Leader.apply(q, k, v, *settings)
        if detach_qk or not (q.requires_grad or k.requires_grad):
            ticket = None

    detached = detach_qk or not torch.is_grad_enabled()
    return out, SharedAttention(
        q=q.detach() if detached else q,
        k=k.detach() if detached else k,
        mask=mask,
        lse=lse.detach(),
        probabilities=probabilities,
        causal=causal,
        scale=factor,
        backend=chosen,
        unused_keys=unused_keys,
        ticket=ticket,
        stash=stash,
        versions=None if torch.compiler.is_compiling() else arguments.versions(q, k, mask),
    )


def follower_attention(state: SharedAttention, v: Tensor) -> Tensor:
    """Return O_l = A V_l [B, h, N, e] with the leader's A, by the leader's backend.

    Args:
        state: what `leader_attention` returned.
        v: this layer's values [B, h_kv', M, e]; h_kv' divides h.

    Raises:
        ValueError: for values that do not fit the leader's shapes, dtype or device, or that its
            backend cannot take; where q, k or the mask changed in place since the leader ran.
    """
    v = attention_inputs.autocast(v)
    arguments.check_follower(v, state.q, state.k, state.backend)
    if state.versions is not None and not torch.compiler.is_compiling():
        arguments.check_unchanged(state.versions, state.q, state.k, state.mask)
    if state.unused_keys is not None:
        v = attention_inputs.zero_unused(v, state.unused_keys)
    if state.backend == "reference":
        with attention_inputs.autocast_off(v):
            return reference.apply_probabilities(state.probabilities, v)
    q, k, lse, A, mask = state.q, state.k, state.lse, state.probabilities, state.mask
    settings = (state.causal, state.scale, state.backend)
    if torch.compiler.is_compiling():
        return operators.follower_forward(q, k, v, lse, A, mask, *settings)
    if not _records(q, k, v):
        with attention_inputs.autocast_off(v):
            run = operators.path(state.backend).follower_forward
            return run(q, k, v, lse, A, mask, state.causal, state.scale)
    if state.stash is None:
        return operators.follower_forward(q, k, v, lse, A, mask, *settings)
    return autograd.Follower.apply(v, state.ticket, q, k, mask, lse, A, *settings, state.stash)


def _records(*tensors: Tensor) -> bool:
    """Whether autograd follows an operation; decoding is faster past its machinery."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
