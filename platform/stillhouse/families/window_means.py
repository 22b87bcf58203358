"""Accumulation windows: what is summed over their units is divided by the number of these once."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from stillhouse.records.losses import LossTerms
from stillhouse.sharding import own_part


class WindowMeans:
    """Losses of the micro-batches of a window, and of all ranks, as means over all its units."""

    def __init__(self) -> None:
        self._count = torch.zeros((), dtype=torch.long)
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: LossTerms, count: Tensor) -> None:
        """Take a micro-batch's losses, means over `count` units."""
        self._count = self._count.to(count.device) + count
        for name, mean in [("loss", losses.total.detach()), *losses.terms.items()]:
            self._sums[name] = self._sums.get(name, 0) + mean * count

    def close(self, optimizer: Optimizer, world_size: int) -> tuple[int, dict[str, Tensor]]:
        """Turn summed gradients into those of the mean over all units, and begin a new window.

        Args:
            optimizer: of the parameters whose gradients are sums over a rank's units.
            world_size: ranks; strategies have averaged the gradients over them.

        Returns:
            The number of units, and the mean of every loss over them.
        """
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        # float64 holds every count exactly.
        packed = torch.cat([self._count.double().unsqueeze(0), sums.double()])
        if world_size > 1:
            torch.distributed.all_reduce(packed)
        count, means = packed[0], packed[1:] / packed[0].clamp_min(1)
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        factor = world_size / max(1.0, float(count))
        torch._foreach_mul_([own_part(g) for g in gradients if g is not None], factor)
        self._count = torch.zeros_like(self._count)
        self._sums.clear()
        return int(count), dict(zip(names, means.to(sums.dtype).unbind(), strict=True))
