"""Networks shared over ranks, on one: whatever lists lie within lists."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from stillhouse.sharding import (
    empty,
    filled,
    is_sharded,
    reshard,
    shard,
    through,
    whole,
    whole_weights,
)


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
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
    assert is_sharded(network), "gathered weights are shared all the same"
    torch.testing.assert_close(network(x), expected)
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    torch.testing.assert_close(whole_weights(network), before)


class Tied(nn.Module):
    """An embedding that is the head as well, outside of the list; the head is read by others."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3)])
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight


def body(network: Any, ids: Tensor) -> Tensor:
    x = network.words(ids)
    for block in network.blocks:
        x = block(x)
    return x


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("let_go", [True, False])
def test_parts_are_called_through_the_network_and_ties_stay(let_go: bool) -> None:
    torch.manual_seed(0)
    network, ids = Tied(), torch.tensor([1, 4])

    def loss() -> Tensor:
        return through(network, body, ids).matmul(network.head.weight.T).square().sum()

    expected = loss()
    expected.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    plain = empty(network)
    shard(network, init_device_mesh("cpu", (1,)), let_go=let_go)
    with torch.no_grad():
        torch.testing.assert_close(loss(), expected)
    reshard(network)
    loss().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(whole(parameter.grad), gradients[name])
    plain = filled(plain, whole_weights(network))
    torch.testing.assert_close(plain.state_dict(), before)
    assert plain.head.weight is plain.words.weight
