"""Run directories as runs write them, for the tests of what reads them."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from stillhouse.tracking.series import append_rows

# Test NLL by seed: the seeds differ more than the roles do, as they do in life.
ALONE = {0: 2.0, 1: 2.6, 2: 2.3}
STUDENT = {0: 1.9, 1: 2.45, 2: 2.25}
TEACHER = {0: 1.5, 1: 2.0, 2: 1.9}


def make_run(
    folder: Path,
    *,
    recipe: str = "word_kd",
    seed: int = 0,
    config_hash: str = "aaaaaaaaaaaa",
    status: str = "done",
    overrides: list[str] | None = None,
    models: dict[str, dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    series: list[tuple[str, int, str, float]] | None = None,
    stages: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory as a run would; return it."""
    folder.mkdir(parents=True)
    results = {
        "recipe": recipe,
        "seed": seed,
        "config_hash": config_hash,
        "git": None,
        "status": status,
        "overrides": overrides or [],
        "stages": stages or {},
        "models": {"student": {"test_nll": 1.0}} if models is None else models,
    }
    (folder / "results.json").write_text(json.dumps(results))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if series is not None:
        append_rows(folder / "metrics.csv", series)
    return folder


def make_word_kd(sweep: Path, seeds: tuple[int, ...] = (2, 0, 1)) -> Path:
    """Write a sweep over seeds, not in their order, with sizes and curves; return it."""
    for job, seed in enumerate(seeds):
        make_run(
            sweep / str(job),
            seed=seed,
            overrides=[f"seed={seed}"],
            models={
                "teacher": {"test_nll": TEACHER[seed], "parameters": 2000},
                "student_alone": {"test_nll": ALONE[seed], "parameters": 500},
                "student": {"test_nll": STUDENT[seed], "parameters": 500, "top1_agreement": 0.5},
            },
            series=[
                ("distil", 0, "val_nll", 3.0 + seed),
                ("distil", 5, "val_nll", 2.0 + seed),
                ("distil", 5, "train_loss", 9.0),
            ],
        )
    return sweep


def make_other(sweep: Path, numbers: dict[int, float]) -> Path:
    """Write a sweep of another group, with nothing but a student; return it."""
    for seed, number in numbers.items():
        make_run(
            sweep / f"seed{seed}",
            seed=seed,
            config_hash="bbbbbbbbbbbb",
            overrides=["method.divergence=reverse_kl", f"seed={seed}"],
            models={"student": {"test_nll": number}},
            config={"method": {"divergence": "reverse_kl", "temperature": 2.0}, "seed": seed},
        )
    return sweep


def make_fractions(sweep: Path, *settings: str, shift: float = 0.0) -> Path:
    """Write a sweep over shared fractions and seeds, not in their order; return it.

    Args:
        sweep: its folder.
        settings: overrides that all of its runs have besides.
        shift: of the test NLL of its students.
    """
    for job, (seed, fraction) in enumerate(product((1, 0), (0.4, 0.0, 0.8, 0.2))):
        number = 2.0 + fraction**2 + seed / 10 + shift
        own = {"parameters": int(1000 - 100 * fraction), "shared_fraction": fraction}
        make_run(
            sweep / str(job),
            recipe="echoatt",
            seed=seed,
            config_hash=f"{fraction} {settings}",
            overrides=[f"sharing.fraction={fraction}", *settings, f"seed={seed}"],
            models={
                "teacher": {"test_nll": 1.9, "parameters": 1000},
                "student": {"test_nll": number, **own, "decode_tokens_per_s": 100 + seed},
                "continual": {"test_nll": number + fraction, **own},
            },
        )
    return sweep
