"""The gradients of an operator that has a tangent: the primal's, and a refusal of every other.

Such an operation is three opaque operators: `forward`, `jvp`, which has the primal's inputs, their
tangents and its settings, and `backward`, the gradients of the primal. A loss that forgets to
detach the tangent is told so, and not given half a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.library import CustomOpDef


def register_gradients(
    function: str,
    forward: CustomOpDef,
    jvp: CustomOpDef,
    backward: CustomOpDef,
    *,
    save: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    gradients: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]],
    settings: int,
) -> None:
    """Give the three operators of a function their formulas under autograd.

    Args:
        function: the name that a refusal begins with.
        forward: of three tensors and the settings; its first output is the primal.
        jvp: of the tensors, their tangents and the settings; then the tangent comes second.
        backward: has no derivative.
        save: keeps in `ctx` what `gradients` needs, for the inputs and outputs of either, and marks
            the outputs that have no gradient.
        gradients: those of the three tensors, for `ctx` and the primal's.
        settings: how many inputs are neither tensors nor tangents, a mask included.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, inputs, output)
        # What nobody differentiates comes as None: a gradient of the tangent is told from zeros.
        ctx.set_materialize_grads(False)

    def of_primal(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return None, None, None
        if fwd._current_level >= 0:
            raise RuntimeError(
                f"{function}: a backward pass under forward-mode AD would lose the gradient's "
                "tangent; call it behind the dual level, or take backend='reference'"
            )
        return gradients(ctx, grad_out)

    def of_forward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        return *of_primal(ctx, grad_out), *(None,) * settings

    def of_jvp(
        ctx: Any, grad_out: Tensor | None, grad_out_t: Tensor | None, *_: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_out_t is not None:
            raise RuntimeError(
                f"{function}: its tangent has no gradient in the fast paths; detach the tangent "
                "(the losses of sCM and MeanFlow stop the gradient there), or take "
                "backend='reference'"
            )
        return *of_primal(ctx, grad_out), *(None,) * (3 + settings)

    def of_backward(*_: Any) -> None:
        raise RuntimeError(
            f"{function}: the fast paths have no second derivative; backend='reference' has one"
        )

    forward.register_autograd(of_forward, setup_context=setup)
    jvp.register_autograd(of_jvp, setup_context=setup)
    backward.register_autograd(of_backward)
