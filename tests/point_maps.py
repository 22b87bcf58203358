"""A small generator of points, and how experiments train it."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import one_hot

from stillhouse.families.timestep.networks import Phase
from stillhouse.records.diffusion import Condition
from stillhouse.records.losses import LossTerms


class PointMap(nn.Module):
    """F of an MLP of a point in the plane, of two frequencies of t and of the class, if any."""

    def __init__(self, classes: int = 0, width: int = 64) -> None:
        super().__init__()
        self.classes = classes
        layers = [nn.Linear(6 + classes, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        angles = torch.stack([t / 2, t], 1).to(x.dtype)
        seen = [x, angles.sin(), angles.cos()]
        if self.classes:
            assert condition.labels is not None
            seen.append(one_hot(condition.labels, self.classes).to(x.dtype))
        return self.layers(torch.cat(seen, 1))


def learnt(
    start: PointMap,
    loss: Callable[[PointMap, Phase, Generator], LossTerms],
    *,
    steps: int,
    seed: int,
    rate: float = 1e-3,
) -> PointMap:
    """Return the moving average of a copy that is trained with Adam and a cosine."""
    student = copy.deepcopy(start).requires_grad_()
    average = copy.deepcopy(start).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss(student, Phase(step, steps), generator).total.backward()
        optimizer.step()
        schedule.step()
        share = 1 - min(0.99, (1 + step) / (10 + step))
        for kept, new in zip(average.parameters(), student.parameters(), strict=True):
            kept.lerp_(new.detach(), share)
    return average
