"""The two functions: linear attention that forward-mode AD goes through, its derivative by hand."""

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from stillhouse_kernels import attention_inputs, forward_mode
from stillhouse_kernels.linear_attention import arguments, operators, reference


def relu_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-15, backend: str = "auto"
) -> Tensor:
    """Return Q S / (Q z + eps) [B, h, N, e]; its tangent too under forward-mode AD.

        Q = relu(q),  K = relu(k),  S = Kᵀ V,  z = Kᵀ 1

    Every query sees every key. Gradients flow to q, k and v; a gradient of the tangent raises, as
    does a derivative of another derivative. Where Q z = 0, the row is 0, and so are its tangent and
    gradients: a feature that such a query has is one that no key has.

    Args:
        q: queries [B, h, N, d]; float64, float32, float16 or bfloat16. Sums are in float32 or
            better.
        k: keys [B, h_kv, M, d]; h is a multiple of h_kv.
        v: values [B, h_kv, M, e].
        eps: added to the denominator; at least 1e-30, which float32 holds.
        backend: `auto`, `reference`, `streaming` or `triton`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, an eps that is out of range, a
            backend that is unknown or cannot run here.
        NotImplementedError: for a forward-mode derivative of another derivative.

    Source: Sana, arXiv 2410.10629, equation 2; `SanaLinearAttnProcessor2_0` of diffusers.
    """
    name = "relu_linear_attention"
    q, k, v = (attention_inputs.autocast(t) for t in (q, k, v))
    attention_inputs.check(name, q, k, v, None, False)
    arguments.check_eps(name, eps)
    chosen = arguments.backend_for(backend, q, k, v)
    if chosen == "reference":
        with attention_inputs.autocast_off(q):
            return reference.attention(q, k, v, eps)
    primals, tangents = forward_mode.unpack(name, (q, k, v))
    if all(t is None for t in tangents):
        return operators.forward(*primals, eps, chosen)[0]
    out, out_t, _ = operators.jvp(*primals, *tangents, eps, chosen)
    return fwd.make_dual(out, out_t)


def relu_linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None = None,
    k_t: Tensor | None = None,
    v_t: Tensor | None = None,
    *,
    eps: float = 1e-15,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output and its tangent, [B, h, N, e] each.

    Args:
        q, k, v, eps, backend: as in `relu_linear_attention`.
        q_t, k_t, v_t: tangents of q, k and v, of their shapes, dtypes and devices and of any
            layout; None is 0 and saves its products. Where a query or key is not above 0, its
            tangent does not count.

    Raises:
        ValueError: as `relu_linear_attention`, and for a tangent that does not fit its primal.
        NotImplementedError: for inputs that carry tangents of their own.
    """
    name = "relu_linear_attention_jvp"
    q, k, v = primals = tuple(attention_inputs.autocast(t) for t in (q, k, v))
    tangents = tuple(None if t is None else attention_inputs.autocast(t) for t in (q_t, k_t, v_t))
    attention_inputs.check(name, q, k, v, None, False)
    forward_mode.check_tangents(name, {"q": q, "k": k, "v": v}, tangents)
    arguments.check_eps(name, eps)
    chosen = arguments.backend_for(backend, q, k, v)
    if chosen == "reference":
        with attention_inputs.autocast_off(q):
            return reference.jvp(q, k, v, *tangents, eps=eps)
    forward_mode.refuse_tangents(name, *primals, *tangents)
    if all(t is None for t in tangents):
        out, _ = operators.forward(*primals, eps, chosen)
        return out, torch.zeros_like(out)
    out, out_t, _ = operators.jvp(*primals, *tangents, eps, chosen)
    return out, out_t
