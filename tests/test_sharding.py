"""Networks shared over ranks, on one: whatever lists lie within lists."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from stillhouse.sharding import is_sharded, shard, whole_weights


class Nested(nn.Module):
    """Blocks with a list of layers each, as the attention of diffusers has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def group() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_lists_within_lists_are_shared_once() -> None:
    torch.manual_seed(0)
    network, x = Nested(), torch.randn(2, 3)
    expected, before = network(x), {n: t.clone() for n, t in network.state_dict().items()}
    shard(network, init_device_mesh("cpu", (1,)))
    assert is_sharded(network)
    torch.testing.assert_close(network(x), expected)
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    torch.testing.assert_close(whole_weights(network), before)
