"""The stage `record_pairs`: a flow turns noise that a seed addresses into samples, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.data.images import ImageData
from stillhouse.data.pairs import PairFacts, Pairs, noise_of
from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.solvers import Solver, uniform_grid
from stillhouse.files import content_hash
from stillhouse.ranges import Count, Finite
from stillhouse.records.diffusion import Condition
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.denoiser_folders import check_shape, load_denoiser
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class RecordPairs:
    """Write noise's seed, samples and conditions.

    The conditions are those of the training data, one after the other and over again. A killed
    stage goes on behind its last whole batch.

    Attributes:
        path: the flow, a pipeline's folder.
        data: LightningDataModule, partial, called with (seed).
        solver: of `diffusion.solvers`, without randomness, partial: called with (F, noise, times).
        steps: of the solver, equal angles.
        guidance_scale: of the flow.
        count: pairs.
        batch_size: pairs at a time.
        seed: of the noise.
    """

    path: str
    data: dict[str, Any]
    solver: dict[str, Any]
    steps: Count
    guidance_scale: Finite
    count: Count
    batch_size: Count
    seed: int

    def __call__(self, context: StageContext) -> StageResult:
        """Record the batches that are missing, then write the store."""
        key = f"stages.{context.name}.path"
        data: ImageData = instantiate(self.data, _recursive_=False)(self.seed)
        data.prepare_data()
        network = load_denoiser(self.path, key=key)
        check_shape(network, data, key=key, path=self.path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = network.to(device).eval().requires_grad_(False)
        solver, times = instantiate(self.solver), uniform_grid(self.steps)
        rows = [i % len(data.samples("train")) for i in range(self.count)]
        shards = context.scratch / "shards"
        shards.mkdir(parents=True, exist_ok=True)

        def sampled(places: list[int], condition: Condition) -> Tensor:
            noise = noise_of(self.seed, places, data.image_shape).to(device)
            condition = condition.to(device)
            scale = torch.full((len(places),), self.guidance_scale, dtype=torch.double).to(device)
            with torch.no_grad():
                return solver(
                    lambda x, t: guided(network, x, t, condition, scale), noise, times
                ).cpu()

        x_0: list[Tensor] = []
        conditions: list[Condition] = []
        with WorkProgress(context.name, self.count, "pairs", context.console) as progress:
            for start in range(0, self.count, self.batch_size):
                places = list(range(start, min(start + self.batch_size, self.count)))
                said = data.collate([rows[place] for place in places]).condition
                shard = shards / f"{start:08d}.safetensors"
                if shard.is_file():
                    progress.skip(len(places))
                else:
                    _write(shard, sampled(places, said))
                    progress.advance(len(places))
                x_0.append(load_file(shard)["x_0"])
                conditions.append(said)
        condition = conditions[0].joined(*conditions[1:])
        facts = PairFacts(
            teacher=content_hash(Path(self.path).expanduser()),
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
        )
        Pairs(facts, torch.cat(x_0), condition).write(context.output)
        calls = calls_of(solver, times) * (1 if self.guidance_scale == 1 else 2)
        return StageResult(metrics={"pairs": self.count, "network_calls": calls * self.count})


def calls_of(solver: Solver, times: Sequence[float]) -> int:
    """Return how often a solver asks for a velocity."""
    asked: list[Tensor] = []

    def still(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    solver(still, torch.zeros(1, 1), times)
    return len(asked)


def _write(path: Path, x_0: Tensor) -> None:
    """Write a shard whole or not at all."""
    temporary = path.with_suffix(".partial")
    save_file({"x_0": x_0}, temporary)
    temporary.replace(path)
