"""Gradients of shared attention, by two routes with equal results.

Eager: a follower's backward pass computes dV_l and leaves (V_l, dO_l, delta_l) in a stash. Each
follower consumes a `ticket` of its leader, so the engine runs the leader last; the leader then does
one pass over the scores for the whole group, 3m + 2 or 2m + 2 products in place of 5m.

Compiled: a backward pass may have no side effects, so each operator brings its own dQ and dK, and
autograd adds them up.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from stillhouse_kernels.shared_attention import operators

_NO_SECOND_DERIVATIVE = "shared attention has no second derivative; backend='reference' has one"


class _Entries(list[tuple[Tensor, Tensor, Tensor]]):
    """V_l, dO_l and delta_l of the followers that ran; unlike a plain list, weakly referable."""


class GradientStash:
    """What the followers' backward passes leave for their leader's: V_l, dO_l and delta_l.

    Kept by graph task (one call of backward or grad), so that a repeated, a partial or a nested
    backward pass never reads another's entries. The task alone owns them, by its callback: what no
    leader takes goes with the task, also where the pass raises.
    """

    def __init__(self) -> None:
        self._by_task: WeakValueDictionary[int, _Entries] = WeakValueDictionary()

    def add(self, v: Tensor, grad_out: Tensor, delta: Tensor) -> None:
        """Leave a follower's entry in the running graph task."""
        task = torch._C._current_graph_task_id()
        entries = self._by_task.get(task)
        if entries is None:
            entries = self._by_task[task] = _Entries()
            queue: Callable[..., None] = torch.autograd.Variable._execution_engine.queue_callback  # pyright: ignore[reportAttributeAccessIssue]
            queue(entries.clear)
        entries.append((v, grad_out, delta))

    def take(self, followers: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the running task's entries, one for each ticket that came back."""
        left = self._by_task.pop(torch._C._current_graph_task_id(), _Entries())
        entries = list(left)
        left.clear()  # The task holds the list until it ends; the tensors are to go before.
        if len(entries) != followers:
            raise RuntimeError(
                f"shared attention: {followers} followers sent a gradient, {len(entries)} left "
                "their values; the leader's and the followers' backward passes must run in one call"
            )
        return entries

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._by_task.values())


class _Saved(NamedTuple):
    """What a backward pass needs; unpacked once a pass, as checkpointing asks."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    probabilities: Tensor
    mask: Tensor | None
    out: Tensor


def _differentiable_once(
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """Make a second derivative raise, also where the incoming gradient is a constant.

    torch's `once_differentiable` lets that case through, and the term is silently missing. The node
    that raises is a function of all that the gradients depend on: q, k, v and what came in (by the
    ticket, also of the followers' values), so that it lies on the path to each of them.
    """

    @wraps(backward)
    def once(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        saved = _Saved(*ctx.saved_tensors)
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        if not torch.is_grad_enabled():
            return grads
        sources = (*(g if g is None else g.detach() for g in grads), *saved[:3], *grad_outputs)
        message = _NO_SECOND_DERIVATIVE.encode()
        refuse = torch._C._functions.DelayedError(message, len(sources))  # pyright: ignore
        return refuse(*sources)[: len(grads)]

    return once


class Leader(torch.autograd.Function):
    """(q, k, v, mask, causal, scale, backend, stash) -> O, lse, what is kept of A, the ticket.

    The ticket's gradient counts the followers. It lies on the CPU, so counting waits for no device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
        stash: GradientStash,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        settings = (causal, scale, backend)
        out, lse, probabilities = operators.leader_forward(q, k, v, mask, *settings)
        _save_leader(ctx, (q, k, v, mask, *settings), (out, lse, probabilities))
        ctx.stash = stash
        return out, lse, probabilities, torch.zeros((), device="cpu")

    @staticmethod
    @_differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: _Saved, grad_out: Tensor | None, *others: Tensor | None
    ) -> tuple[Any, ...]:
        tickets = others[-1]
        entries = ctx.stash.take(0 if tickets is None else int(tickets.detach()))
        return *_leader_gradients(ctx, saved, grad_out, entries), None, None, None, None, None


class Follower(torch.autograd.Function):
    """(v, ticket, q, k, mask, lse, A, causal, scale, backend, stash) -> O; gradients for v only."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        ticket: Tensor | None,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        lse: Tensor,
        probabilities: Tensor,
        causal: bool,
        scale: float,
        backend: str,
        stash: GradientStash | None,
    ) -> Tensor:
        inputs = (q, k, v, lse, probabilities, mask, causal, scale, backend)
        out = operators.follower_forward(*inputs)
        _save_follower(ctx, inputs, out)
        ctx.stash = stash if ticket is not None else None
        return out

    @staticmethod
    @_differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, saved: _Saved, grad_out: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 11
        ticket = None
        if ctx.stash is not None:
            ctx.stash.add(saved.v, grad_out, _delta(grad_out, saved.out))
            ticket = torch.ones((), device="cpu")
        needs_v = ctx.needs_input_grad[0]
        grad_v = _value_gradient(saved, ctx.settings, grad_out) if needs_v else None
        return grad_v, ticket, *(None,) * 9


def _save_leader(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, causal, scale, backend = inputs
    out, lse, probabilities = output
    ctx.save_for_backward(q, k, v, lse, probabilities, mask, out)
    ctx.settings = (causal, scale, backend)
    ctx.mark_non_differentiable(lse, probabilities)
    ctx.set_materialize_grads(False)


def _save_follower(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, lse, probabilities, mask, causal, scale, backend = inputs
    ctx.save_for_backward(q, k, v, lse, probabilities, mask, output)
    ctx.settings = (causal, scale, backend)
    ctx.set_materialize_grads(False)


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """rowsum(dO o O) [B, h, N], in float32 or better."""
    working = torch.promote_types(out.dtype, torch.float32)
    return (grad_out.to(working) * out.to(working)).sum(-1)


def _value_gradient(saved: _Saved, settings: tuple[Any, ...], grad_out: Tensor) -> Tensor:
    q, k, v, lse, probabilities, mask, _ = saved
    causal, scale, backend = settings
    return operators.value_backward(
        q, k, lse, probabilities, grad_out, mask, causal, scale, v.shape[1], backend
    )


def _score_gradients(
    saved: _Saved, settings: tuple[Any, ...], entries: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    q, k, _, lse, probabilities, mask, _ = saved
    values, grad_outs, deltas = (list(column) for column in zip(*entries, strict=True))
    # rowsum(A o dP) = sum_l rowsum(dO_l o O_l)
    delta = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(0)
    return operators.score_backward(
        q, k, lse, probabilities, values, grad_outs, delta, mask, *settings
    )


def _leader_gradients(
    ctx: Any,
    saved: _Saved,
    grad_out: Tensor | None,
    entries: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    grad_q = grad_k = grad_v = None
    if grad_out is not None:
        entries = [(saved.v, grad_out, _delta(grad_out, saved.out)), *entries]
        grad_v = _value_gradient(saved, ctx.settings, grad_out) if needs_v else None
    if entries and (needs_q or needs_k):
        grad_q, grad_k = _score_gradients(saved, ctx.settings, entries)
    return grad_q, grad_k, grad_v


def _leader_backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    saved = _Saved(*ctx.saved_tensors)
    return *_leader_gradients(ctx, saved, grad_out, []), None, None, None, None


def _follower_backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    saved = _Saved(*ctx.saved_tensors)
    needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
    grad_q = grad_k = grad_v = None
    if needs_q or needs_k:
        entry = (saved.v, grad_out, _delta(grad_out, saved.out))
        grad_q, grad_k = _score_gradients(saved, ctx.settings, [entry])
    if needs_v:
        grad_v = _value_gradient(saved, ctx.settings, grad_out)
    return grad_q, grad_k, grad_v, *(None,) * 6


def _refuse(*_: Any) -> None:
    raise RuntimeError(_NO_SECOND_DERIVATIVE)


operators.leader_forward.register_autograd(_leader_backward, setup_context=_save_leader)
operators.follower_forward.register_autograd(_follower_backward, setup_context=_save_follower)
operators.value_backward.register_autograd(_refuse)
operators.score_backward.register_autograd(_refuse)
