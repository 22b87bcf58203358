"""What ReLU linear attention refuses beside what every attention refuses."""

from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend

NAMES = ("q", "k", "v")
# float32 holds it and its inverse.
SMALLEST_EPS = 1e-30


def check_eps(function: str, eps: float) -> None:
    """Refuse an eps that float32 does not hold, or that is no small number."""
    if not SMALLEST_EPS <= eps <= 1:
        raise ValueError(
            f"{function}: eps={eps!r}: expected a number from {SMALLEST_EPS:g} to 1; it keeps a "
            "row that sees no key from dividing by 0"
        )


def check_tangents(
    function: str, primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]
) -> None:
    """Refuse a tangent of another shape, dtype or device than its primal's; any layout will do."""
    for name, primal, tangent in zip(NAMES, primals, tangents, strict=True):
        if tangent is None:
            continue
        if tangent.shape != primal.shape:
            raise ValueError(
                f"{function}: {name}_t {tuple(tangent.shape)}, {name} {tuple(primal.shape)}: "
                "expected a tangent of its primal's shape"
            )
        if tangent.dtype != primal.dtype or tangent.device != primal.device:
            raise ValueError(
                f"{function}: {name}_t {tangent.dtype} on {tangent.device}, {name} "
                f"{primal.dtype} on {primal.device}: expected its primal's dtype and device; "
                "convert with .to()"
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
