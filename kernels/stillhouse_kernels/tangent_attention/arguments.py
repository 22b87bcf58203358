"""Which implementation of `attention` and `attention_jvp` runs."""

from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend


def backend_for(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return `reference`, `streaming` or `triton`, as `choose_backend` does."""
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        return choose_backend(backend, q.device, triton_refuses=_refusal(q, k, v))
    return choose_backend(backend, q.device)


def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot take these; None also where triton is missing."""
    try:
        from stillhouse_kernels.tangent_attention.launch import refusal
    except ModuleNotFoundError:
        return None
    return refusal(q, k, v)
