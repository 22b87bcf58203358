"""The two functions: attention that forward-mode AD goes through, and its derivative by hand."""

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stillhouse_kernels import attention_inputs, forward_mode
from stillhouse_kernels.tangent_attention import arguments, operators, reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Return softmax(scale Q Kᵀ + mask) V [B, h, N, e]; its tangent too under forward-mode AD.

    A drop-in for `scaled_dot_product_attention` whose fused paths have a forward-mode derivative.
    Gradients flow to q, k and v; a gradient of the tangent raises, as does a derivative of another
    derivative. Without tangents, `auto` calls SDPA where the two mean the same.

    Args:
        q: queries [B, h, N, d]; float64, float32, float16 or bfloat16.
        k: keys [B, h_kv, M, d]; h is a multiple of h_kv.
        v: values [B, h_kv, M, e].
        mask: boolean, broadcastable to [B, h, N, M]; True = attend. A query without keys gets 0; a
            key that no query may attend to may hold anything, NaN included.
        causal: query i sees the keys j <= i + M - N (aligned bottom-right; M >= N).
        scale: of the scores; d^-1/2 by default.
        dropout_p: 0, for dropout has no place in a derivative's fused path.
        backend: `auto`, `reference`, `streaming` or `triton`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a mask that is not boolean, a
            causal call with more queries than keys, dropout, a backend that is unknown or cannot
            run here.
        NotImplementedError: for a forward-mode derivative of another derivative.
    """
    if dropout_p:
        raise ValueError(
            f"attention: dropout_p={dropout_p}: expected 0; a derivative needs the same dropout in "
            "every pass, so drop the projected output instead"
        )
    q, k, v = (attention_inputs.autocast(t) for t in (q, k, v))
    attention_inputs.check("attention", q, k, v, mask, causal)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = arguments.backend_for(backend, q, k, v)
    if chosen == "reference":
        (q, k, v), _, mask = _without_unused((q, k, v), (None,) * 3, mask, causal)
        with attention_inputs.autocast_off(q):
            return reference.attention(q, k, v, mask, causal, factor)[0]
    (q, k, v), tangents = forward_mode.unpack("attention", (q, k, v))
    tangential = any(t is not None for t in tangents)
    if backend == "auto" and not tangential and mask is None and _square(q, k, causal):
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=factor, enable_gqa=grouped
        )
    (q, k, v), (q_t, k_t, v_t), mask = _without_unused((q, k, v), tangents, mask, causal)
    if not tangential:
        return operators.forward(q, k, v, mask, causal, factor, chosen)[0]
    out, out_t, _ = operators.jvp(q, k, v, q_t, k_t, v_t, mask, causal, factor, chosen)
    return fwd.make_dual(out, out_t)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None = None,
    k_t: Tensor | None = None,
    v_t: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O and its tangent [B, h, N, e], and the scores' log-sum-exp [B, h, N].

    The log-sum-exp is in float32 or better, detached, -inf in a row without keys.

    Args:
        q, k, v, mask, causal, scale, backend: as in `attention`.
        q_t, k_t, v_t: tangents of q, k and v, of their shapes, dtypes and devices and of any
            layout; None is 0 and saves its products.

    Raises:
        ValueError: as `attention`, and for a tangent that does not fit its primal.
        NotImplementedError: for inputs that carry tangents of their own.
    """
    q, k, v = (attention_inputs.autocast(t) for t in (q, k, v))
    tangents = tuple(None if t is None else attention_inputs.autocast(t) for t in (q_t, k_t, v_t))
    attention_inputs.check("attention_jvp", q, k, v, mask, causal)
    forward_mode.check_tangents("attention_jvp", {"q": q, "k": k, "v": v}, tangents)
    chosen = arguments.backend_for(backend, q, k, v)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen != "reference":
        forward_mode.refuse_tangents("attention_jvp", q, k, v, *tangents)
    (q, k, v), (q_t, k_t, v_t), mask = _without_unused((q, k, v), tangents, mask, causal)
    if chosen == "reference":
        with attention_inputs.autocast_off(q):
            out, out_t, lse = reference.jvp(q, k, v, q_t, k_t, v_t, mask, causal, factor)
        return out, out_t, lse.detach()
    if q_t is None and k_t is None and v_t is None:
        out, lse = operators.forward(q, k, v, mask, causal, factor, chosen)
        return out, torch.zeros_like(out), lse
    return operators.jvp(q, k, v, q_t, k_t, v_t, mask, causal, factor, chosen)


def _square(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether SDPA aligns its causal mask as we do."""
    return not causal or q.shape[2] == k.shape[2]


def _without_unused(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    mask: Tensor | None,
    causal: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], Tensor | None]:
    """Set to 0 what a mask hides from everyone, and give the mask its four axes."""
    if mask is None:
        return primals, tangents, None
    q, k, _ = primals
    mask = mask[(None,) * (4 - mask.ndim)]
    unused_keys = ~mask.any(2).expand(-1, -1, k.shape[2])
    unused_queries = attention_inputs.unused_queries(mask, causal, q.shape[2], k.shape[2])

    def cleaned(query: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = None if query is None else query.masked_fill(unused_queries[..., None], 0)
        others = (None if t is None else attention_inputs.zero_unused(t, unused_keys) for t in rest)
        return kept, *others

    mask = mask.expand(-1, -1, q.shape[2], k.shape[2])
    found = cleaned(*primals)
    assert all(t is not None for t in found)
    return tuple(t for t in found if t is not None), cleaned(*tangents), mask
