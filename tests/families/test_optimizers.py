"""Optimisers that take turns: one of all phases is each phase's own, step by step."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from stillhouse.errors import UserError
from stillhouse.families.optimizers import adamw, taking_turns
from stillhouse.families.timestep.turns import Turn, Turns

UPDATES = 6
TURNS = Turns(
    {
        "critic": Turn(trains=["fake_score"], updates=3, from_update=0, optimizer=adamw),
        "late": Turn(trains=["discriminator"], updates=2, from_update=4, optimizer=adamw),
    }
)
# Of each, what is its own: rates, decays, momenta, and how its schedule begins and ends.
OWN = {
    "student": partial(adamw, learning_rate=1e-2, weight_decay=0.3, betas=(0.9, 0.99)),
    "critic": partial(adamw, learning_rate=3e-3, betas=(0.0, 0.999), warmup_fraction=0.5),
    "late": partial(adamw, learning_rate=2e-2, eps=1e-3, final_fraction=1.0),
}
STEPS = TURNS.steps(UPDATES)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for name in OWN}


def loss(network: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return (network(x) - x.sum(1, keepdim=True)).square().mean()


def built(name: str, network: nn.Module) -> Any:
    return OWN[name](network, TURNS.updates(name, STEPS))


def together(found: dict[str, nn.Module]) -> Any:
    return taking_turns([(built(n, found[n]), partial(TURNS.updates, n)) for n in OWN])


def state_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[torch.Tensor]:
    """Return weights and everything that the optimiser knows of them."""
    known = [optimizer.state[p] for p in network.parameters()]
    kept = [p.detach().clone() for p in network.parameters()]
    return kept + [value.clone() for state in known for value in state.values()]


def test_one_optimizer_of_all_phases_is_that_of_each() -> None:
    """Bit for bit, with the moments and step counts of the others, which are passed over."""
    ours, theirs = networks(), networks()
    joint = together(ours)
    optimizer, schedule = joint["optimizer"], joint["lr_scheduler"]["scheduler"]
    assert joint["lr_scheduler"]["interval"] == "step"
    alone = {name: built(name, theirs[name]) for name in OWN}
    for step in range(STEPS):
        name, _ = TURNS.at(step)
        optimizer.zero_grad()
        loss(ours[name], step).backward()
        optimizer.step()
        schedule.step()
        own = alone[name]
        own["optimizer"].zero_grad()
        loss(theirs[name], step).backward()
        own["optimizer"].step()
        own["lr_scheduler"]["scheduler"].step()
        for other in OWN:
            found = state_of(optimizer, ours[other])
            expected = state_of(alone[other]["optimizer"], theirs[other])
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), step
    counts = [float(optimizer.state[next(ours[n].parameters())]["step"]) for n in OWN]
    assert counts == [6, 18, 4]


def test_rates_follow_the_updates_of_their_own() -> None:
    """Two groups a phase: what decays, and what does not."""
    joint = together(networks())
    optimizer, schedule = joint["optimizer"], joint["lr_scheduler"]["scheduler"]
    alone = {name: built(name, network) for name, network in networks().items()}
    factors = {n: b["lr_scheduler"]["scheduler"].lr_lambdas[0] for n, b in alone.items()}
    seen = []
    for step in range(STEPS):
        expected = [
            OWN[name].keywords["learning_rate"] * factors[name](TURNS.updates(name, step))
            for name in OWN
            for _ in range(2)
        ]
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert seen[-1] == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()
    assert len({rates[2] for rates in seen}) > 10
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.3, 0.0, 0.1, 0.0, 0.1, 0.0]


def test_optimizers_of_several_kinds_are_refused() -> None:
    network = nn.Linear(2, 2)
    plain = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = {"scheduler": LambdaLR(plain, lambda _: 1.0)}
    other = {"optimizer": plain, "lr_scheduler": schedule}
    parts = [(adamw(network, 3, learning_rate=0.1), int), (other, int)]
    with pytest.raises(UserError) as refusal:
        taking_turns(parts)
    assert str(refusal.value) == (
        "optimizer: phases are given AdamW and SGD; expected one kind for all"
    )
