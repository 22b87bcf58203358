"""Networks that are differentiated along a direction in two processes, which find them by name."""

from collections.abc import Callable

import pytest
import torch
from rank_kernels import leave
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stillhouse_kernels import attention


class Layers(nn.Module):
    """Two layers of attention on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor, backend: str = "streaming") -> Tensor:
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            out = attention(q, k, v, causal=True, backend=backend)
            x = x + out.transpose(1, 2).flatten(2)
        return x


def loss(out: Tensor, out_t: Tensor) -> Tensor:
    return (out * (out - out_t).detach()).mean()


def batch() -> tuple[Tensor, Tensor]:
    """Two rows, one a rank, and their direction."""
    generator = torch.Generator().manual_seed(1)
    x, x_t = (torch.randn(2, 20, 16, generator=generator) for _ in range(2))
    return x, x_t


def one_pass(network: Callable[[Tensor], Tensor], x: Tensor, x_t: Tensor) -> Tensor:
    out, out_t = torch.func.jvp(network, (x,), (x_t,))
    return loss(out, out_t.detach())


def two_passes(network: Callable[[Tensor], Tensor], x: Tensor, x_t: Tensor) -> Tensor:
    # Data parallelism wraps the pass that is trained; the tangent is the module's own.
    own = getattr(network, "module", network)
    with torch.no_grad():
        _, out_t = torch.func.jvp(own, (x,), (x_t,))
    return loss(network(x), out_t)


def wrapped(wrapping: str) -> nn.Module:
    """The network under `ddp` or `fsdp`."""
    network = Layers()
    if wrapping == "ddp":
        return nn.parallel.DistributedDataParallel(network)
    mesh = init_device_mesh("cpu", (2,))
    for layer in network.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )


def derive(rank: int, folder: str, wrapping: str, passes: str) -> None:
    """Take a step's gradients on one row a rank, and compare them with both rows' at once."""
    join(rank, folder)
    x, x_t = batch()
    truth = Layers()
    one_pass(lambda x: truth(x, "reference"), x, x_t).backward()
    network = wrapped(wrapping)
    step = {"one": one_pass, "two": two_passes}[passes]
    step(network, x[rank : rank + 1], x_t[rank : rank + 1]).backward()
    for found, wanted in zip(network.parameters(), truth.parameters(), strict=True):
        grad = found.grad.full_tensor() if wrapping == "fsdp" else found.grad
        assert (grad - wanted.grad).norm() < 1e-6 * wanted.grad.norm()
    del network
    leave()


def one_pass_under_fsdp2(rank: int, folder: str) -> None:
    """FSDP2's hooks on a layer's output differentiate its tangent too, which raises."""
    join(rank, folder)
    x, x_t = batch()
    network = wrapped("fsdp")
    with pytest.raises(RuntimeError, match="attention: its tangent has no gradient in the fast"):
        one_pass(network, x[rank : rank + 1], x_t[rank : rank + 1]).backward()
    del network
    leave()
