"""What ReLU linear attention refuses beside what every attention refuses."""

from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend

# float32 holds it and its inverse.
SMALLEST_EPS = 1e-30


def check_eps(function: str, eps: float) -> None:
    """Refuse an eps that float32 does not hold, or that is no small number."""
    if not SMALLEST_EPS <= eps <= 1:
        raise ValueError(
            f"{function}: eps={eps!r}: expected a number from {SMALLEST_EPS:g} to 1; it keeps a "
            "row that sees no key from dividing by 0"
        )


def backend_for(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return `reference`, `streaming` or `triton`, as `choose_backend` does."""
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        return choose_backend(backend, q.device, triton_refuses=_refusal(q, k, v))
    return choose_backend(backend, q.device)


def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot take these; None also where triton is missing."""
    try:
        from stillhouse_kernels.linear_attention.launch import refusal
    except ModuleNotFoundError:
        return None
    return refusal(q, k, v)
