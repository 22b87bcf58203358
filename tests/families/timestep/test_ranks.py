"""Two gloo processes, with all weights or with parts of them, equal one on the whole batch."""

import pytest
import torch
from rank_methods import SomeUpdates
from sharded_trainers import Sharing


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [Sharing.NOTHING, Sharing.TEACHER_TOO])
@pytest.mark.parametrize("recipe", ["scm", "dmd2"])
@pytest.mark.filterwarnings("ignore:.*in distributed setting")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_two_ranks_are_one_process_with_the_same_draws(
    stage_context, recipe: str, sharing: Sharing
) -> None:
    """Updates by plain descent, clipped, so that the weights tell the gradients."""
    together, alone = (stage_context(f"on {devices}") for devices in (2, 1))
    metrics = SomeUpdates(recipe=recipe, devices=2, sharing=sharing)(together).metrics
    assert metrics == pytest.approx(SomeUpdates(recipe=recipe, devices=1)(alone).metrics, rel=1e-4)
    before, expected = torch.load(alone.output / "seen_0.pt")
    seen = [torch.load(together.output / f"seen_{rank}.pt")[-1] for rank in (0, 1)]
    learnt = {"student"} if recipe == "scm" else {"student", "fake_score", "discriminator"}
    for network, weights in expected.items():
        moved = any(not torch.equal(before[network][n], w) for n, w in weights.items())
        assert moved == (network in learnt)
        for name, weight in weights.items():
            moves = weight - before[network][name]
            for other in seen:
                assert (other[network][name] - weight).norm() <= 1e-4 * moves.norm() + 1e-6
