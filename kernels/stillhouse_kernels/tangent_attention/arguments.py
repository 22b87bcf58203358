"""What `attention` and `attention_jvp` refuse beside what every attention refuses."""

from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend

NAMES = ("q", "k", "v")


def check_tangents(primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> None:
    """Refuse a tangent of another shape, dtype or device than its primal's; any layout will do."""
    for name, primal, tangent in zip(NAMES, primals, tangents, strict=True):
        if tangent is None:
            continue
        if tangent.shape != primal.shape:
            raise ValueError(
                f"attention_jvp: {name}_t {tuple(tangent.shape)}, {name} {tuple(primal.shape)}: "
                "expected a tangent of its primal's shape"
            )
        if tangent.dtype != primal.dtype or tangent.device != primal.device:
            raise ValueError(
                f"attention_jvp: {name}_t {tangent.dtype} on {tangent.device}, {name} "
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
        from stillhouse_kernels.tangent_attention.launch import refusal
    except ModuleNotFoundError:
        return None
    return refusal(q, k, v)
