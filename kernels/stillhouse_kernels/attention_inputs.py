"""What comes into an attention: cast, checked, and freed of what nobody sees, before anything runs.

B batch, h query heads, h_kv (or g) key/value heads, N queries, M keys, d and e widths.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def autocast(t: Tensor) -> Tensor:
    """Cast as autocast casts SDPA's inputs: every floating type but float64."""
    device = t.device.type
    castable = t.is_floating_point() and t.dtype != torch.float64
    if not (castable and torch.amp.is_autocast_available(device)):
        return t
    return t.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


def autocast_off(t: Tensor) -> torch.autocast:
    """Return the context in which operations on t keep the types they are given."""
    return torch.autocast(t.device.type, enabled=False)


def check(
    function: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> None:
    """Refuse what does not fit together, with every shape in the message.

    Args:
        function: the name that the message begins with.
        q: [B, h, N, d].
        k: [B, h_kv, M, d].
        v: [B, h_kv, M, e].
        mask: None or boolean, broadcastable to [B, h, N, M].
        causal: whether the last query is aligned with the last key.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    # Messages are put together only where they are needed: a compiler cannot print symbolic sizes.
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(
            f"{function}: {_shapes(q, k, v)}: expected [batch, heads, tokens, head_dim] "
            "each, no size 0"
        )
    check_same_kind(function, {"q": q, "k": k, "v": v})
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"{function}: {_shapes(q, k, v)}: expected one batch size, and one head dim in q and k"
        )
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"{function}: {_shapes(q, k, v)}: expected k and v of equal heads and tokens"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{function}: {_shapes(q, k, v)}: {k.shape[1]} key/value heads do not divide "
            f"{q.shape[1]} query heads"
        )
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"{function}: {_shapes(q, k, v)}: causal needs at least as many keys as queries; "
            "the last query is aligned with the last key"
        )
    if mask is not None:
        _check_mask(function, mask, q, k, v)


def check_same_kind(function: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors, by name, of several dtypes or devices, or of integers."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{function}: {found}: expected one floating-point dtype; cast with .to()")
    if len({t.device for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{function}: {found}: expected one device; move with .to()")


def unused_queries(mask: Tensor, causal: bool, queries: int, keys: int) -> Tensor:
    """Whether a query sees no key [B or 1, h or 1, N or 1], of a mask before it is expanded."""
    used = mask.any(3)
    if causal:
        # Left padding leaves them too: the first key of the row's mask is still ahead of it.
        first = mask.to(torch.uint8).argmax(3)
        used = used & (first <= torch.arange(queries, device=mask.device) + keys - queries)
    return ~used


def zero_unused(t: Tensor, unused_keys: Tensor) -> Tensor:
    """Set to 0 the keys or values [B, g, M, d] that no query of their heads attends to.

    Args:
        t: keys, values or their tangents.
        unused_keys: boolean [B or 1, h or 1, M].
    """
    heads, groups = unused_keys.shape[1], t.shape[1]
    if heads not in (1, groups):
        unused_keys = unused_keys.unflatten(1, (groups, heads // groups)).all(2)
    return t.masked_fill(unused_keys[..., None], 0)


def _check_mask(function: str, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{function}: mask is {mask.dtype}: expected torch.bool, True = attend; "
            "mask == 0 turns an additive mask of 0 and -inf into one"
        )
    if mask.device != q.device:
        raise ValueError(
            f"{function}: mask lies on {mask.device}, q on {q.device}: move it with mask.to()"
        )
    full = (*q.shape[:3], k.shape[2])
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, want) for size, want in zip(sizes, full, strict=True)):
        raise ValueError(
            f"{function}: mask {tuple(mask.shape)}, {_shapes(q, k, v)}: expected a mask "
            f"that broadcasts to [batch, heads, queries, keys] = {full}"
        )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
