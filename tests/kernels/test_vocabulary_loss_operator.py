"""The loss inside of autograd, torch.compile, checkpointing, autocast and DDP."""

import inspect
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_kernels import average_losses
from torch import Tensor
from vocabulary_heads import Problem, assert_same, loss_of, problem, some, top_k

from stillhouse_kernels.vocabulary_loss import TeacherTopK, linear_divergence
from stillhouse_kernels.vocabulary_loss.operators import linear_divergence_op


def op_arguments(p: Problem, teacher: TeacherTopK | None = None, **changes: Any) -> dict[str, Any]:
    dense = (p.Y, p.U, p.c) if teacher is None else (None,) * 3
    tensors = [p.X.requires_grad_(), p.W.requires_grad_(), p.b.requires_grad_(), *dense]
    tensors += [*(teacher or (None,) * 5), some(p.X.shape[0])]
    options = ["jsd", 0.5, 2.0, 4.0, 1.0, 3.0, 1.0, None, p.X.dtype, p.Y.dtype, 4, "streaming"]
    names = inspect.signature(linear_divergence_op._init_fn).parameters
    return dict(zip(names, [*tensors, *options, True, True, True], strict=True)) | changes


def test_opcheck() -> None:
    p = problem(n=5, V=11)
    for arguments in (op_arguments(p), op_arguments(p, top_k(p, 3, 2), wants_weight=False)):
        torch.library.opcheck(linear_divergence_op, (), arguments)


def test_second_derivative_raises() -> None:
    p = problem()
    X = p.X.requires_grad_()
    loss = linear_divergence(X, p.W, p.Y, p.U)
    (dX,) = torch.autograd.grad(loss, X, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence has no second derivative"):
        dX.square().sum().backward()
    # Beside a path that has a derivative, and to one input alone, nothing is lost in silence.
    with pytest.raises(RuntimeError, match="linear_divergence has no second derivative"):
        torch.autograd.grad(loss + dX.square().sum(), X)
    with pytest.raises(RuntimeError, match="linear_divergence has no second derivative"):
        (loss + dX.square().sum()).backward(inputs=[X])
    (again,) = torch.autograd.grad(linear_divergence(X, p.W, p.Y, p.U, backend="reference"), X)
    torch.testing.assert_close(dX.detach(), again)


def test_a_teacher_that_could_learn_makes_no_loss_that_can() -> None:
    p = problem()
    for backend in ("reference", "streaming"):
        loss = loss_of(p, requires="YU", backend=backend)
        assert not loss.requires_grad


def test_an_id_that_stands_twice_gets_both_gradients() -> None:
    p = problem()
    for k in (4, p.W.shape[0]):
        kept = top_k(p, k)
        ids = kept.ids.clone()
        ids[:, 1] = ids[:, 0]
        options: dict[str, Any] = {"teacher_topk": kept._replace(ids=ids), "divergence": "jsd"}
        expected = p(backend="reference", **options)
        assert_same(p(backend="streaming", **options), expected)


def compiled_matches(backend: str) -> None:
    p = problem().to(torch.float32)
    for teacher in (None, top_k(p.to(torch.float64), 4)):

        def step(X: Tensor, W: Tensor, b: Tensor, mask: Tensor, teacher: Any = teacher) -> Tensor:
            Y, U = (p.Y, p.U) if teacher is None else (None, None)
            options: dict[str, Any] = {"divergence": "jsd", "mask": mask, "teacher_topk": teacher}
            return linear_divergence(2 * X, W, Y, U, student_bias=b, **options)

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        arguments = [x.detach().requires_grad_() for x in (p.X, p.W, p.b)]
        for mask in (some(13), ~some(13)):
            results = []
            for function in (step, compiled):
                loss = function(*arguments, mask)
                results.append([loss.detach(), *torch.autograd.grad(3 * loss, arguments)])
            assert_same(results[1], results[0], 1e-6)


def test_compiles_into_one_graph() -> None:
    compiled_matches("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiles_with_inductor() -> None:
    from torch._inductor.utils import fresh_cache

    # The cache on disk knows the operator by name: it may hold sizes of another version of it.
    with fresh_cache():
        compiled_matches("inductor")


def test_checkpointing() -> None:
    p = problem()
    X, W = p.X.requires_grad_(), p.W.requires_grad_()

    def run(X: Tensor) -> Tensor:
        return linear_divergence(X.tanh(), W, p.Y, p.U, chunk_size=5)

    plain = torch.autograd.grad(run(X), (X, W))
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(run, X, use_reentrant=False), (X, W)
    )
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("backend", ["streaming", "reference"])
def test_autocast_multiplies_as_a_linear_layer(backend: str) -> None:
    p = problem(20, 300, 16, 16).to(torch.float32)
    p = replace(p, U=p.U / 4, W=p.W / 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *gradients = p(backend=backend)
        mixed = replace(p, X=p.X.bfloat16())(backend=backend)
    rounded = p.to(torch.bfloat16).to(torch.float64)(backend="reference")
    assert_same([loss, *gradients], rounded, 1e-2)
    assert abs(loss - rounded[0]) < 1e-5
    assert [x.dtype for x in (loss, *gradients)] == [torch.float32] * 4
    assert torch.equal(mixed[0], loss)
    assert mixed[1].dtype == torch.bfloat16


def test_only_what_is_wanted() -> None:
    p = problem()
    assert not loss_of(p, "").requires_grad
    with torch.no_grad():
        assert not loss_of(p).requires_grad
    p.U.requires_grad_(), p.Y.requires_grad_()
    loss = linear_divergence(p.X.requires_grad_(), p.W, p.Y, p.U)
    loss.backward()
    assert p.U.grad is None
    assert p.W.grad is None
    loss = linear_divergence(p.X.float(), p.W.float(), p.Y.bfloat16(), p.U.bfloat16())
    torch.testing.assert_close(loss.double(), loss_of(p).detach(), rtol=1e-2, atol=1e-2)


def test_a_graph_may_be_kept() -> None:
    p = problem()
    X = p.X.requires_grad_()
    loss = linear_divergence(X, p.W, p.Y, p.U)
    loss.backward(retain_graph=True)
    assert X.grad is not None
    first = X.grad.clone()
    X.grad.zero_()
    loss.backward()
    assert torch.equal(X.grad, first)


@pytest.mark.slow
def test_two_processes_average(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(average_losses, (os.fspath(tmp_path / "store"),), nprocs=2)
