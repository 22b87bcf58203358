"""What shared attention alone asks of its inputs, and the backend that takes them."""

from torch import Tensor

from stillhouse_kernels.attention_inputs import check_same_kind
from stillhouse_kernels.dispatch import choose_backend


def backend_for(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return `reference`, `streaming` or `triton`, as `choose_backend` does."""
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        return choose_backend(backend, q.device, triton_refuses=_refusal(q, k, v))
    return choose_backend(backend, q.device)


def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot take these; None also where triton is missing."""
    try:
        from stillhouse_kernels.shared_attention.launch import refusal
    except ModuleNotFoundError:
        return None
    return refusal(q, k, v)


def versions(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[int | None, ...]:
    """What torch has counted of changes in place; None for what it does not count."""
    return tuple(None if t is None or t.is_inference() else t._version for t in (q, k, mask))


def check_follower(v: Tensor, q: Tensor, k: Tensor, backend: str) -> None:
    """Refuse a follower's values that do not fit the leader's q and k, or its backend."""
    heads, keys = q.shape[1], k.shape[2]
    fits = v.ndim == 4 and v.shape[0] == q.shape[0] and v.shape[2] == keys
    if not fits or 0 in v.shape or heads % v.shape[1]:
        raise ValueError(
            f"follower_attention: v {tuple(v.shape)}, the leader's q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}: expected v [{q.shape[0]}, heads that divide {heads}, {keys}, "
            "value_dim]"
        )
    check_same_kind("follower_attention", {"v": v, "the leader's q": q})
    if backend == "triton" and (refused := _refusal(q, k, v)) is not None:
        raise ValueError(
            f"follower_attention: {refused}; give the leader backend='streaming', which takes it"
        )


def check_unchanged(
    before: tuple[int | None, ...], q: Tensor, k: Tensor, mask: Tensor | None
) -> None:
    """Refuse q, k or a mask that changed in place since their `versions` were taken."""
    pairs = zip(("q", "k", "mask"), before, versions(q, k, mask), strict=True)
    if changed := [name for name, then, now in pairs if then != now]:
        raise ValueError(
            f"follower_attention: {' and '.join(changed)} changed in place since the leader ran; "
            "run leader_attention again, or give it a copy"
        )
