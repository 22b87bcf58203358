"""A training step with the teacher's cached signal against one with the live teacher.

    python benchmarks/cached.py [turns] [key=value …]

The default recipe's student takes a step with either teacher by turns, in one process, on the same
batches; further arguments are overrides of the recipe (`codec.k=16`, `codec=hidden`). Printed are
the ratio of their times a step and the bytes that a token takes in the cache. Weights are random:
they change neither.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from overhead import resolved
from rich.console import Console
from torch import nn

from stillhouse.cli import config_folder
from stillhouse.config.preflight import compose_job
from stillhouse.data.stream import BatchStream
from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.records.language import SequenceBatch
from stillhouse.schema import register_schemas
from stillhouse.stages.runner import quiet_libraries
from stillhouse.stages.stage import StageContext
from stillhouse.stages.workspace import register_resolvers
from stillhouse.students.causal_lm import read_output
from stillhouse.tracking.tracker import FileTracker


def step(student: Any, teacher: nn.Module, optimizer: Any, batch: SequenceBatch) -> float:
    """Take a step and return its seconds."""
    began = time.perf_counter()
    signal = teacher(batch)
    loss = word_kd(read_output(student, batch), signal, batch).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - began


def main(turns: int, overrides: list[str]) -> None:
    """Measure and print."""
    register_schemas()
    register_resolvers()
    quiet_libraries()
    limit = "data.max_train_documents=60"
    config = compose_job(["teacher=cached", limit, *overrides], config_folder())
    with tempfile.TemporaryDirectory() as name:
        folders = {part: Path(name) / part for part in ("teacher", "signal", "work")}
        for folder in folders.values():
            folder.mkdir()

        def context(stage: str, output: Path) -> StageContext:
            return StageContext(stage, output, folders["work"], FileTracker(None), Console())

        tokenizer = resolved(config, "stages.tokenizer")
        instantiate(tokenizer, _recursive_=False)(context("tokenizer", folders["teacher"]))
        path = str(folders["teacher"])
        cache = resolved(config, "stages.cache")
        cache["data"]["tokenizer_path"] = cache["teacher"]["path"] = path
        data = instantiate(cache["data"], _recursive_=False)(0)
        instantiate(resolved(config, "stages.teacher.student"))(data).save_pretrained(path)
        made = instantiate(cache, _recursive_=False)(context("cache", folders["signal"]))

        node = resolved(config, "teacher") | {"path": path, "signal_path": str(folders["signal"])}
        teachers = {
            "live": instantiate(cache["teacher"])(data),
            "cached": instantiate(node)(data),
        }
        student = instantiate(resolved(config, "student"))(data)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        batches = BatchStream(
            data.windows("train"),
            batch_size=config.data.batch_size,
            num_batches=turns + 3,
            seed=0,
            collate=data.collate,
        )
        seconds: dict[str, list[float]] = {"live": [], "cached": []}
        for batch in batches:
            for side, teacher in teachers.items():
                seconds[side].append(step(student, teacher, optimizer, batch))
    # The first turns warm caches and allocators up.
    pairs = list(zip(seconds["cached"], seconds["live"], strict=True))[3:]
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    print(
        f"training step, cached / live: median {median:.3f}, quartiles {low:.3f} to {high:.3f}, "
        f"{len(pairs)} turns; {made.metrics['bytes_per_token']:.0f} bytes a token in the cache"
    )


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    main(numbers[0] if numbers else 60, [a for a in sys.argv[1:] if not a.isdigit()])
