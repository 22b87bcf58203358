"""What an update of a few-step student costs, in updates of its teacher.

    python benchmarks/timestep_methods.py [turns=5] [threads=1] [recipe overrides …]

Networks, batch and phases are those of the recipes, with random weights. A row is a phase of a
method: loss and gradients of a batch, no optimiser. `time` is that of the phase over that of a step
of flow matching, median and quartiles of turns in which all rows alternate; `memory` is the most
that it allocates at once, over the same. A `cycle` is an update of the student with those of the
critic that go with it.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from stillhouse.config import preflight
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

# The tests measure memory in the same way.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from memory import peak_bytes

ROOT = Path(__file__).parents[1]
RECIPES = ("scm", "tbcm", "dmd2", "swiftbrush", "rcm", "sana_sprint")
PLAIN = "flow matching"


def main(*words: str) -> None:
    """Print the table."""
    turns, threads, overrides = 5, 1, []
    for word in words:
        key, _, value = word.partition("=")
        if key == "turns":
            turns = int(value)
        elif key == "threads":
            threads = int(value)
        else:
            overrides.append(word)
    torch.set_num_threads(threads)
    register_schemas()
    register_resolvers()
    rows: dict[str, Callable[[], None]] = {}
    cycles: dict[str, dict[str, int]] = {}
    for recipe in RECIPES:
        module, batch, plain = built(recipe, overrides)
        rows.setdefault(PLAIN, plain)
        rows |= {f"{recipe}, {phase}": step(module, batch, phase) for phase in module.methods}
        others = {f"{recipe}, {name}": turn.updates for name, turn in module.turns.others.items()}
        cycles[recipe] = {f"{recipe}, student": 1, **others}
    memory = {name: peak_bytes(run) for name, run in rows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(turns):
        for name, run in rows.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    print("| phase | time | memory |\n|---|---|---|")
    for name in rows:
        ratios = [a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)]
        print(f"| {name} | {spread(ratios)} | {memory[name] / memory[PLAIN]:.2f} |")
    for recipe, parts in cycles.items():
        if len(parts) > 1:
            ratios = [
                sum(count * seconds[name][turn] for name, count in parts.items()) / plain
                for turn, plain in enumerate(seconds[PLAIN])
            ]
            most = max(memory[name] for name in parts) / memory[PLAIN]
            print(f"| {recipe}, cycle | {spread(ratios)} | {most:.2f} |")


def built(recipe: str, overrides: list[str]) -> tuple[TimestepDistiller, Any, Callable[[], None]]:
    """Return a recipe's module, a batch, and a step of flow matching of the same network."""
    config = preflight.compose_job([f"experiment={recipe}", *overrides], ROOT / "conf")
    data = instantiate(config.data, _recursive_=False)(0)
    torch.manual_seed(0)
    student = instantiate(config.stages.teacher.student)(data)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    stage = config.stages.distil
    module = instantiate(stage.family)(student, teacher, instantiate(stage.method), None)
    batch = data.collate(range(data.batch_size))
    flow = instantiate(config.stages.teacher.method)
    learner = copy.deepcopy(student)

    def plain() -> None:
        gradients(
            flow(
                Networks(learner, None, None), batch, Phase(0, 1), torch.Generator().manual_seed(0)
            ),
            learner,
        )

    return module, batch, plain


def step(module: TimestepDistiller, batch: Any, phase: str) -> Callable[[], None]:
    """Return loss and gradients of a phase."""

    def run() -> None:
        module.let_learn(phase)
        generator = torch.Generator().manual_seed(0)
        losses = module.methods[phase](module.networks, batch, Phase(1, 2), generator)
        gradients(losses, module)

    return run


def gradients(losses: Any, module: torch.nn.Module) -> None:
    """Take the gradients, and let them go."""
    losses.total.backward()
    module.zero_grad(set_to_none=True)


def spread(values: list[float]) -> str:
    """Return the median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
