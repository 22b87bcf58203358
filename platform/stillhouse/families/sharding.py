"""Networks shared over ranks (FSDP2): what learns is sharded, and made whole to be handed on.

A network is a plain one where no strategy shards it; all functions take both.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Share a network's parameters over the ranks of a mesh, list of modules by list of modules.

    Args:
        network: is called as a whole; the members of its `nn.ModuleList`s are gathered one by one.
        mesh: of the data-parallel ranks.
    """
    # Lists within members of lists first: what is shared already is no part of what lies around it.
    for module in reversed(list(network.modules())):
        if isinstance(module, nn.ModuleList):
            for member in module:
                if not isinstance(member, FSDPModule) and any(True for _ in member.parameters()):
                    fully_shard(member, mesh=mesh)
    fully_shard(network, mesh=mesh)


def reshard(network: nn.Module) -> None:
    """Let the next pass gather the weights as they are by then.

    A pass without a gradient leaves what lies outside of the lists gathered: later passes would
    find it as it was, and as learning as it was.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def empty(network: nn.Module) -> nn.Module:
    """Return a copy without weights, that `filled` makes whole; ties and buffers stay."""
    without: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, without)


def filled(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give an empty copy its weights, and return it."""
    network.load_state_dict(weights, assign=True, strict=False)
    return network


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that no rank has a part of; every rank has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor shared as another one is."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(network: nn.Module) -> bool:
    """Whether ranks have parts of a network."""
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, whole, on the CPU; every rank has to call this."""
    return {name: whole(t.detach()).cpu() for name, t in network.state_dict().items()}
