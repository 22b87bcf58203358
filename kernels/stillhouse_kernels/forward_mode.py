"""Forward-mode derivatives through opaque operators: unpack the dual numbers, run, make them again.

An opaque operator has no forward-mode rule of its own: torch would drop the tangents of its inputs
without a word. So a public function takes the tangents off here, gives them to the operator as
ordinary inputs, and puts the result's tangent on. That sees one level of derivatives. Where
another lies below it, its tangents would be dropped, so that is refused:

| transforms of torch.func, outermost first           | what happens |
|-----------------------------------------------------|--------------|
| jvp; vmap of jvp (jacfwd); a dual level             | right        |
| jvp of jvp, jvp of grad, anything in a dual level   | refused      |
| grad of jvp (torch.autograd around a jvp is right)  | refused      |
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters


def unpack(
    function: str, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Return the tensors without their tangents, and the tangents, None where there is none.

    Args:
        function: the name that a refusal begins with.
        tensors: any.

    Raises:
        NotImplementedError: where a derivative of another level would be lost.
    """
    state = _state()
    if state == "nested":
        refuse(function)
    if state == "recorded":
        raise NotImplementedError(
            f"{function}: torch.func.grad around a forward-mode derivative does not reach into the "
            "fast paths; take torch.autograd.grad or backward(), or backend='reference'"
        )
    if state == "none":
        return tuple(tensors), (None,) * len(tensors)
    pairs = [fwd.unpack_dual(t) for t in tensors]
    return tuple(pair.primal for pair in pairs), tuple(pair.tangent for pair in pairs)


def refuse(function: str) -> NoReturn:
    """Raise for a derivative of a derivative."""
    raise NotImplementedError(
        f"{function}: a forward-mode derivative of another derivative would be lost in the fast "
        "paths; backend='reference' has derivatives of any order"
    )


def refuse_tangents(function: str, *tensors: Tensor | None) -> None:
    """Raise where any of them carries a tangent: a function that takes tangents as arguments."""
    _, tangents = unpack(function, [t for t in tensors if t is not None])
    if any(t is not None for t in tangents):
        refuse(function)


def check_tangents(
    function: str, primals: Mapping[str, Tensor], tangents: Sequence[Tensor | None]
) -> None:
    """Refuse a tangent of another shape, dtype or device than its primal's; any layout will do.

    Args:
        function: the name that the message begins with.
        primals: by the name of the argument; that of a tangent ends in `_t`.
        tangents: in the primals' order, None where there is none.
    """
    for (name, primal), tangent in zip(primals.items(), tangents, strict=True):
        if tangent is None:
            continue
        if tangent.shape != primal.shape:
            raise ValueError(
                f"{function}: {name}_t {tuple(tangent.shape)}, {name} {tuple(primal.shape)}: "
                "expected a tangent of its primal's shape"
            )
        if tangent.dtype != primal.dtype or tangent.device != primal.device:
            raise ValueError(
                f"{function}: {name}_t {tangent.dtype} on {tangent.device}, {name} {primal.dtype} "
                f"on {primal.device}: expected its primal's dtype and device; convert with .to()"
            )


# A compiler asks once, while it traces; it guards the levels and transforms by itself.
@torch.compiler.assume_constant_result
def _state() -> str:
    """The forward-mode derivatives that are being taken here: `none`, `one`, ..."""
    transforms = [it.key().name for it in retrieve_all_functorch_interpreters()]
    if "Jvp" in transforms[:-1]:
        return "nested"
    if fwd._current_level < 0:
        return "none"
    if transforms and transforms[-1] != "Jvp":
        return "nested"
    return "recorded" if "Grad" in transforms else "one"
