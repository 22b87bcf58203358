"""W&B runs laid on the stub's server as runs of ours leave them, without running anything."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tracking.public_stub import PublicStub
from tracking.wandb_stub import ENTITY, StubRun

GROUP = f"wandb:{ENTITY}/stillhouse/word_kd"
STAGES = ("teacher", "distil", "evaluate")
MODELS = {
    "teacher": {"test_nll": 1.5, "parameters": 2000},
    "student": {"test_nll": 1.75, "parameters": 500, "kl_to_teacher": math.nan},
}
Put = Callable[..., StubRun]


def put_on(server: PublicStub) -> Put:
    """Return a function that lays a stage's W&B run on the server."""
    return partial(_put, server)


def _put(
    server: PublicStub, stage: str, *, of: str = "a", seed: int = 0, **changes: Any
) -> StubRun:
    """Lay the W&B run of a stage of the run `of`; `changes` are keys of its config."""
    run = StubRun(f"{of}-{stage}", "stillhouse")
    run.created = f"2026-01-01T00:00:{len(server.runs):02}Z"
    fingerprints = {"teacher": "f0", "distil": f"f{seed + 1}", "evaluate": f"f{seed + 4}"}
    run.fields = {"groupName": "word_kd", "jobType": stage, "displayName": f"{of}/{stage}"}
    run.config = {
        "recipe": "word_kd",
        "seed": seed,
        "method": {"temperature": 2.0},
        "run": f"{of}-teacher",
        "stage": stage,
        "last_stage": "evaluate",
        "artifact": f"{stage}-{fingerprints[stage]}",
        "artifacts": [f"{s}-{fingerprints[s]}" for s in STAGES],
        "overrides": [f"seed={seed}"],
        "config_hash": "aaaa",
        "git": None,
    } | changes
    run.begun, run.exit_codes = 1, [0]
    run.summary = {"models": json.dumps(MODELS)}
    if stage != "evaluate":
        run.history = [
            {"_step": 0, "step": 0, "val_nll": 3.0 + seed, "train_loss": 4},
            {"_step": 1, "step": 5, "val_nll": "NaN"},
            {"_step": 2, "samples": {"_type": "table-file"}},
        ]
    server.runs[run.id] = run
    return run
