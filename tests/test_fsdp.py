"""`trainer=fsdp`: runs whose ranks share weights; killed and gone on with."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, only_run, run_process, start_process
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

SHARED = (
    *TINY,
    "trainer=fsdp",
    "trainer.strategy.shard_teacher=true",
    "trainer.max_steps=60",
    "trainer.val_check_interval=20",
    "callbacks.checkpoint.checkpoint_every_n_steps=4",
    "stages.evaluate=null",
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["word_kd", "echoatt", "ernie_tiny"])
def test_processes_that_share_weights_are_those_that_have_all(tmp_path: Path, recipe: str) -> None:
    """The teacher's weights too, in every stage that trains; the student is an ordinary folder."""
    ran = (*TINY, f"experiment={recipe}", "trainer.max_steps=4", "trainer.val_check_interval=2")
    folders = []
    for name, strategy in (
        ("ddp", "trainer.strategy=ddp_find_unused_parameters_true"),
        ("fsdp", "trainer.strategy.shard_teacher=true"),
    ):
        (tmp_path / name).mkdir()
        # A cache of its own, for the teacher is trained by both.
        done = run_process(
            *ran,
            f"trainer={name}",
            strategy,
            "data.batch_size=2",
            folder=tmp_path / name,
            cache=tmp_path / name / "cache",
        )
        assert done.code == 0, done.err
        folders.append(only_run(tmp_path / name / "outputs"))
    assert done.err == ""
    assert not list(folders[1].rglob("rank_*.log"))
    ddp, fsdp = (folder / "student" for folder in folders)
    assert (fsdp / "config.json").read_text() == (ddp / "config.json").read_text()
    expected, shared = (load_file(folder / "model.safetensors") for folder in (ddp, fsdp))
    assert shared.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "file", "name", "load"),
    [
        (
            "scm_points",
            "transformer/diffusion_pytorch_model.safetensors",
            "PointNetwork",
            lambda path: (
                DiffusionPipeline.from_pretrained(path, trust_remote_code=True).transformer
            ),
        ),
        (
            "word_kd",
            "model.safetensors",
            "LlamaForCausalLM",
            AutoModelForCausalLM.from_pretrained,
        ),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: str, file: str, name: str, load: Callable[[Path], Any]
) -> None:
    """Weights, averages and Adam's states are whole in a checkpoint and shared again behind it."""
    arguments = (*SHARED, f"experiment={recipe}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = run_process(*arguments, folder=whole, cache=whole / "cache")
    assert done.code == 0, done.err
    assert done.err == ""
    process = start_process(*arguments, folder=broken, cache=broken / "cache")
    wanted, deadline = random.randint(20, 100), time.monotonic() + 200
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        series = [p.read_text() for p in broken.glob("outputs/*/*/work/distil/metrics.csv")]
        if series and len(series[0].splitlines()) > wanted:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    folder = only_run(broken / "outputs")
    done = run_process(f"resume={folder}", folder=broken, cache=broken / "cache")
    assert done.code == 0, done.err
    assert "distil: going on from step" in done.out
    student = only_run(whole / "outputs") / "student"
    expected, resumed = load_file(student / file), load_file(folder / "student" / file)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert type(load(student)).__name__ == name
