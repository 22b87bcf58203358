"""A training step of the default recipe against a bare PyTorch loop of the same mathematics.

    python benchmarks/overhead.py [steps] [block]

Both sides train the same student from the same teacher on batches of the same size, in turns of
`block` steps within one process: the platform's side is the stage's own trainer with its loggers,
checkpoints and progress lines; the other is what one would write by hand. Printed is the ratio of
their times a step, the median over the turns and its quartiles.
"""

import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

from stillhouse.cli import config_folder
from stillhouse.config.preflight import compose_job
from stillhouse.data.language import LanguageData
from stillhouse.schema import register_schemas
from stillhouse.stages.runner import quiet_libraries
from stillhouse.stages.stage import StageContext
from stillhouse.stages.workspace import register_resolvers
from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.tracker import FileTracker


def bare_loop(
    student: nn.Module, teacher: nn.Module, data: LanguageData, max_steps: int
) -> Callable[[int], None]:
    """Return a function that takes n steps of word-level distillation, written by hand."""
    tokens, length, batch_size = data.windows("train").tokens.long(), 128, data.batch_size
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=4e-3,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps)))
    )
    order = torch.randperm((len(tokens) - 1) // length).tolist()

    def batch() -> Tensor:
        starts = [order.pop() * length for _ in range(batch_size)]
        return torch.stack([tokens[s : s + length] for s in starts])

    def steps(count: int) -> None:
        student.train()
        for _ in range(count):
            input_ids = batch()
            with torch.no_grad():
                teacher_logits = teacher(input_ids=input_ids, use_cache=False).logits
            student_logits = student(input_ids=input_ids, use_cache=False).logits
            log_p = teacher_logits.log_softmax(-1)
            log_q = student_logits.log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()

    return steps


class TakeTurns(pl.Callback):
    """After every `block` steps of the trainer, let the other side take as many."""

    def __init__(self, *, block: int) -> None:
        self.block = block
        self.ratios: list[float] = []
        self._mark = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Copy the student for the other side and start the clock."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        student = copy.deepcopy(pl_module.student)
        self.other = bare_loop(student, pl_module.teacher.model, data, trainer.max_steps)
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Close the trainer's turn and take the other's."""
        if trainer.global_step % self.block:
            return
        ours = time.perf_counter() - self._mark
        began = time.perf_counter()
        self.other(self.block)
        theirs = time.perf_counter() - began
        self.ratios.append(ours / theirs)
        self._mark = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        """Print the ratio; the first turns, which warm caches and allocators up, are left out."""
        ratios = self.ratios[2:]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"training step, platform / bare loop: median {median:.3f}, quartiles {low:.3f} to "
            f"{high:.3f}, {len(ratios)} turns of {self.block} steps"
        )


def resolved(config: DictConfig, key: str) -> dict[str, Any]:
    """Return a node of the config as plain values."""
    node = OmegaConf.to_container(OmegaConf.select(config, key), resolve=True)
    assert isinstance(node, dict)
    return {str(k): v for k, v in node.items() if k != "shared"}


def main(steps: int = 240, block: int = 8) -> None:
    """Measure and print."""
    register_schemas()
    register_resolvers()
    quiet_libraries()
    overrides = [f"trainer.max_steps={steps}", "trainer.limit_val_batches=0"]
    config = compose_job(overrides, config_folder())
    with tempfile.TemporaryDirectory() as name:
        teacher, scratch, output = (Path(name) / part for part in ("teacher", "work", "student"))
        for folder in (teacher, scratch, output):
            folder.mkdir()
        quiet = StageContext("tokenizer", teacher, scratch, FileTracker(None), Console())
        instantiate(resolved(config, "stages.tokenizer"), _recursive_=False)(quiet)

        node = resolved(config, "stages.distil")
        node["data"]["tokenizer_path"] = node["teacher"]["path"] = str(teacher)
        node["callbacks"]["turns"] = {"_target_": "__main__.TakeTurns", "block": block}
        # The teacher's weights do not change the cost of a step, so they stay random.
        data = instantiate(node["data"], _recursive_=False)(0)
        instantiate(resolved(config, "stages.teacher.student"))(data).save_pretrained(teacher)

        tracker = FileTracker(SeriesLogger(scratch / "metrics.csv", "distil"))
        fit = instantiate(node, _recursive_=False, _convert_="all")
        fit(StageContext("distil", output, scratch, tracker, Console()))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
