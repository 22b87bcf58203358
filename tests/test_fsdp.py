"""`trainer=fsdp`: a run whose ranks share the student's weights, killed and gone on with."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import TINY, only_run, run_here, run_process, start_process
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

SHARED = (
    *TINY,
    "experiment=scm_points",
    "trainer=fsdp",
    "trainer.max_steps=60",
    "trainer.val_check_interval=20",
    "callbacks.checkpoint.checkpoint_every_n_steps=4",
    "stages.evaluate=null",
)


def test_a_family_that_calls_parts_of_its_student_is_refused(capfd, here: Path) -> None:
    done = run_here(capfd, *TINY, "trainer=fsdp", "trainer.devices=1", "stop_after=distil")
    assert done.code == 2
    assert done.err == (
        "error: trainer.strategy: this family calls parts of a student by themselves, which a "
        "sharded one does not allow; expected trainer=ddp\n"
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Weights, averages and Adam's states are whole in a checkpoint and shared again behind it."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = run_process(*SHARED, folder=whole, cache=whole / "cache")
    assert done.code == 0, done.err
    assert done.err == ""
    process = start_process(*SHARED, folder=broken, cache=broken / "cache")
    wanted, deadline = random.randint(40, 160), time.monotonic() + 200
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
    file = Path("transformer/diffusion_pytorch_model.safetensors")
    expected, resumed = load_file(student / file), load_file(folder / "student" / file)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    pipeline = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    assert type(pipeline.transformer).__name__ == "PointNetwork"
