"""What comes into shared attention: cast, checked, and the backend chosen, before anything runs."""

import torch
from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend


def autocast(t: Tensor) -> Tensor:
    """Cast as autocast casts SDPA's inputs: every floating type but float64."""
    device = t.device.type
    castable = t.is_floating_point() and t.dtype != torch.float64
    if not (castable and torch.amp.is_autocast_available(device)):
        return t
    return t.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


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


def unused_queries(mask: Tensor, causal: bool, queries: int, keys: int) -> Tensor:
    """Whether a query sees no key [B or 1, h or 1, N or 1], of a mask before it is expanded."""
    used = mask.any(3)
    if causal:
        # Left padding leaves them too: the first key of the row's mask is still ahead of it.
        first = mask.to(torch.uint8).argmax(3)
        used = used & (first <= torch.arange(queries, device=mask.device) + keys - queries)
    return ~used


def zero_unused(t: Tensor, unused_keys: Tensor) -> Tensor:
    """Set to 0 the keys or values [B, g, M, d] that no query of their heads attends to."""
    heads, groups = unused_keys.shape[1], t.shape[1]
    if heads not in (1, groups):
        unused_keys = unused_keys.unflatten(1, (groups, heads // groups)).all(2)
    return t.masked_fill(unused_keys[..., None], 0)


def versions(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[int | None, ...]:
    """What torch has counted of changes in place; None for what it does not count."""
    return tuple(None if t is None or t.is_inference() else t._version for t in (q, k, mask))


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_leader(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    """Refuse what does not fit together, with every shape in the message."""
    # Messages are put together only where they are needed: a compiler cannot print symbolic sizes.
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            f"leader_attention: {_shapes(q, k, v)}: expected [batch, heads, tokens, head_dim] "
            "each, no size 0"
        )
    _check_same_kind("leader_attention", {"q": q, "k": k, "v": v})
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"leader_attention: {_shapes(q, k, v)}: expected one batch size, and one head dim in "
            "q and k"
        )
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"leader_attention: {_shapes(q, k, v)}: expected k and v of equal heads and tokens"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"leader_attention: {_shapes(q, k, v)}: {k.shape[1]} key/value heads do not divide "
            f"{q.shape[1]} query heads"
        )
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"leader_attention: {_shapes(q, k, v)}: causal needs at least as many keys as queries; "
            "the last query is aligned with the last key"
        )
    if mask is not None:
        _check_mask(mask, q, k, v)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(
            f"leader_attention: mask is {mask.dtype}: expected torch.bool, True = attend; "
            "mask == 0 turns an additive mask of 0 and -inf into one"
        )
    if mask.device != q.device:
        raise ValueError(
            f"leader_attention: mask lies on {mask.device}, q on {q.device}: move it with mask.to()"
        )
    full = (*q.shape[:3], k.shape[2])
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, want) for size, want in zip(sizes, full, strict=True)):
        raise ValueError(
            f"leader_attention: mask {tuple(mask.shape)}, {_shapes(q, k, v)}: expected a mask "
            f"that broadcasts to [batch, heads, queries, keys] = {full}"
        )


def _check_same_kind(function: str, tensors: dict[str, Tensor]) -> None:
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{function}: {found}: expected one floating-point dtype; cast with .to()")
    if len({t.device for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{function}: {found}: expected one device; move with .to()")


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
    _check_same_kind("follower_attention", {"v": v, "the leader's q": q})
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
