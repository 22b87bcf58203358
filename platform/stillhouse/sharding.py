"""Networks shared over ranks (FSDP2): what learns is sharded, and made whole to be handed on.

A network is a plain one where no strategy shards it; all functions take both.
"""

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

Result = TypeVar("Result")
# The method of a sharded network that `through` calls: torch gathers weights around methods.
THROUGH = "through"


def shard(network: nn.Module, mesh: DeviceMesh, *, let_go: bool = True) -> None:
    """Share a network's parameters over the ranks of a mesh, list of modules by list of modules.

    Args:
        network: is called as a whole, or with `through`; the members of its `nn.ModuleList`s are
            gathered one by one.
        mesh: of the data-parallel ranks.
        let_go: of the weights of a member behind its call, to gather them for its gradient again.
            Only of networks whose members hand on all that a loss reads as their output.
    """
    # Lists within members of lists first: what is shared already is no part of what lies around it.
    for module in reversed(list(network.modules())):
        if isinstance(module, nn.ModuleList):
            for member in module:
                if not isinstance(member, FSDPModule) and any(True for _ in member.parameters()):
                    fully_shard(member, mesh=mesh, reshard_after_forward=let_go)
    # What lies outside of the lists stays gathered until its gradient is there: a head is read
    # behind the call.
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
    setattr(network, THROUGH, MethodType(_through, network))
    register_fsdp_forward_method(network, THROUGH)


def through(
    network: nn.Module, function: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Call a function that calls parts of a network, as if the network itself were called.

    Args:
        network: whose weights outside of its lists are gathered for the call.
        function: called with (network, *args, **kwargs); its tensors are found where
            `torch.utils._pytree` finds them, so all that a gradient comes from is in its result.
    """
    if isinstance(network, FSDPModule):
        return getattr(network, THROUGH)(function, *args, **kwargs)
    return function(network, *args, **kwargs)


def _through(
    network: nn.Module, function: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    return function(network, *args, **kwargs)


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
    tied: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    network.load_state_dict(weights, assign=True, strict=False)
    for first, *others in tied.values():
        for name in others:
            module, _, own = name.rpartition(".")
            setattr(network.get_submodule(module), own, network.get_parameter(first))
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
    """Whether ranks have parts of a network, be they gathered now or not."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, whole, on the CPU; every rank has to call this."""
    return {name: whole(t.detach()).cpu() for name, t in network.state_dict().items()}
