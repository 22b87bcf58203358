"""Modules that tests of the kernels train in two processes, which find them by name."""

from pathlib import Path

import torch
from attention_cases import normal
from torch import Tensor, nn
from vocabulary_heads import problem

from stillhouse_kernels import follower_attention, leader_attention, linear_divergence


def leave() -> None:
    """End the group together, after its users: gloo aborts where a thread outlives its group."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Layers(nn.Module):
    """A leader and two followers on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk = nn.Linear(16, 32)
        self.v = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, backend: str) -> Tensor:
        q, k = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qk(x).chunk(2, -1))
        state = None
        for layer in self.v:
            v = layer(x).unflatten(-1, (2, 8)).transpose(1, 2)
            if state is None:
                out, state = leader_attention(q, k, v, causal=True, backend=backend)
            else:
                out = follower_attention(state, v)
            x = x + out.transpose(1, 2).flatten(2)
        return x.square().mean()


def train_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    model = nn.parallel.DistributedDataParallel(Layers())
    batch = normal(world, 20, 16, dtype=torch.float32)
    for _ in range(2):
        model(batch[rank : rank + 1], "streaming").backward()
    torch.save([p.grad for p in model.parameters()], Path(folder) / f"{rank}.pt")
    del model
    leave()


def average_losses(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    p = problem(n=16).to(torch.float32)
    head = nn.Linear(8, 63)
    with torch.no_grad():
        head.weight.copy_(p.W), head.bias.copy_(p.b)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, X: Tensor, Y: Tensor) -> Tensor:
            weight, bias = self.head.weight, self.head.bias
            return linear_divergence(X, weight, Y, p.U, student_bias=bias, teacher_bias=p.c)

    half = slice(8 * rank, 8 * rank + 8)
    student = nn.parallel.DistributedDataParallel(Student())
    student(p.X[half], p.Y[half]).backward()
    _, _, dW, db = p()
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    torch.testing.assert_close(head.weight.grad, dW, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.bias.grad, db, rtol=1e-4, atol=1e-7)
    del student
    leave()
