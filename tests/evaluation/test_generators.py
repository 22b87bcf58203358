"""Generators as rows: their names, what they draw for the test split, and what it costs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import POINTS, data_of, point_generator, saved
from torch import Tensor, nn

from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.solvers import ddim, few_step, uniform_grid
from stillhouse.errors import UserError
from stillhouse.evaluation.generators import Sampler, drawn, flow_samplers, real_samples, samplers
from stillhouse.records.diffusion import Condition
from stillhouse.students.denoisers import Denoiser

TIMES = {"1": [1.5708], "3": [1.5708, 1.1, 0.4]}


class Counted(nn.Module):
    """A network of points that counts what it is asked, by sample."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network = network
        self.asked = 0

    def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        self.asked += len(x)
        return self.network(x, t, condition, scale)


def by_hand(velocity: Any, steps: int, times: list[float] | None = None, seed: int = 2) -> Tensor:
    """Return samples for the test split, whose 12 come in batches of 5, 5 and 2."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch in data_of(POINTS).evaluation_batches("test"):
        noise = torch.randn(batch.x_0.shape, generator=generator)

        def said(x: Tensor, t: Tensor, condition=batch.condition) -> Tensor:
            return velocity(x, t, condition)

        with torch.no_grad():
            if times is None:
                parts.append(ddim(said, noise, uniform_grid(steps)))
            else:
                parts.append(few_step(said, noise, times, generator))
    return torch.cat(parts)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 1), (3.0, 2)])
def test_a_flow_has_a_row_for_each_number_of_steps(scale: float, calls: int) -> None:
    """Guided, it is asked twice; what is reported is what it was asked."""
    network = point_generator()
    counted = Counted(network)
    rows = flow_samplers("teacher", counted, steps=[6, 1], guidance_scale=scale)
    assert list(rows) == ["teacher@6", "teacher@1"]
    parameters = sum(p.numel() for p in network.parameters())
    for steps, sampler in zip((6, 1), rows.values(), strict=True):
        assert sampler.cost == {"network_calls": steps * calls, "parameters": parameters}
        counted.asked = 0
        found = drawn(sampler, data_of(POINTS), seed=2, repeats=1)
        # Twice besides for the latency of one, of which the first is not measured.
        assert counted.asked == (12 + 2) * steps * calls

        def velocity(x: Tensor, t: Tensor, said: Condition) -> Tensor:
            return guided(network, x, t, said, torch.full((len(x),), scale).double())

        torch.testing.assert_close(found.samples, by_hand(velocity, steps))
        assert found.cost["latency_ms"] > 0
        assert dict(found.cost).keys() == {"network_calls", "parameters", "latency_ms"}


def test_what_is_known_by_formula_has_no_parameters() -> None:
    class Known(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            return torch.zeros_like(x)

    (sampler,) = flow_samplers("teacher", Known(), steps=[2], guidance_scale=1.0).values()
    assert sampler.cost == {"network_calls": 2}


def test_a_consistency_model_brings_its_own_steps(tmp_path: Path) -> None:
    """And its own scale: those of the flow are not for it."""
    network = point_generator()
    network.save(tmp_path, data_of(POINTS), times=TIMES, guidance_scale=2.5)
    rows = samplers("student", str(tmp_path), steps=[50], guidance_scale=9.0)
    assert list(rows) == ["student@1", "student@3"]
    scales: list[Tensor | None] = []
    forward = Denoiser.forward

    def watched(self: Any, x: Tensor, t: Tensor, said: Condition, scale: Any = None) -> Tensor:
        scales.append(scale)
        return forward(self, x, t, said, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "forward", watched)
        found = drawn(rows["student@3"], data_of(POINTS), seed=2, repeats=1)
    assert len(scales) == (3 + 2) * 3
    assert all(scale is not None and (scale == 2.5).all() for scale in scales)
    assert rows["student@3"].cost["network_calls"] == 3

    def velocity(x: Tensor, t: Tensor, said: Condition) -> Tensor:
        return network(x, t, said)

    torch.testing.assert_close(found.samples, by_hand(velocity, 3, TIMES["3"]))


def test_a_flow_of_a_folder_is_integrated(tmp_path: Path) -> None:
    path = saved(point_generator(), tmp_path, POINTS)
    rows = samplers("teacher", path, steps=[8, 2], guidance_scale=2.0)
    assert {row: s.cost["network_calls"] for row, s in rows.items()} == {
        "teacher@8": 16,
        "teacher@2": 4,
    }


def test_the_same_noise_for_every_row_and_another_for_another_seed() -> None:
    seen: list[Tensor] = []

    def draw(noise: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        seen.append(noise)
        return noise

    sampler = Sampler(draw, {"network_calls": 1})
    first, again = (drawn(sampler, data_of(POINTS), seed=4, repeats=1) for _ in range(2))
    assert torch.equal(first.samples, again.samples)
    assert not torch.equal(
        first.samples, drawn(sampler, data_of(POINTS), seed=5, repeats=1).samples
    )
    assert len(first.samples) == 12
    assert [len(noise) for noise in seen[:5]] == [5, 5, 2, 1, 1]


def test_the_median_of_the_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([0.004, 0.001, 0.5])
    now = [0.0]

    def clock() -> float:
        return now[0]

    calls = 0

    def draw(noise: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        # The split's three batches, one single sample to warm up, three that are measured.
        now[0] += next(durations) if calls > 4 else 100.0
        return noise

    monkeypatch.setattr("stillhouse.evaluation.generators.time.perf_counter", clock)
    found = drawn(Sampler(draw, {}), data_of(POINTS), seed=0, repeats=3)
    assert math.isclose(found.cost["latency_ms"], 4.0, rel_tol=1e-6)


def test_real_samples_are_the_whole_split_in_order() -> None:
    data = data_of(POINTS)
    whole = real_samples(data, "validation")
    samples = data.source.splits["validation"]
    assert samples.labels is not None
    assert whole.condition.labels is not None
    assert torch.equal(whole.x_0, samples.values)
    assert torch.equal(whole.condition.labels, samples.labels)


def test_a_folder_without_a_generator(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        samplers("student", str(tmp_path), steps=[1], guidance_scale=1.0)
    assert str(refusal.value) == (
        f"models.student={tmp_path}: no model_index.json can be read there; expected the model "
        "folder of a run of the family timestep"
    )
