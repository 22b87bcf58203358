"""A killed run goes on where it was: resumed equals uninterrupted, bit for bit."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from commands import TINY, kill, only_run, run_process, start_process
from safetensors.torch import load_file

# One short document, so that the stages run across several epochs of their data.
LONG = (
    *TINY,
    "trainer.max_steps=60",
    "stages.teacher.trainer.max_steps=60",
    "trainer.val_check_interval=20",
    "stages.teacher.trainer.val_check_interval=20",
    "callbacks.checkpoint.checkpoint_every_n_steps=4",
    "data.max_train_documents=1",
    "stages.teacher.data.max_train_documents=1",
    "data.shift_windows=true",
    # Dropout makes every step depend on the state of the random generator.
    "student.attention_dropout=0.1",
)
SETTINGS = {
    "alone in the process": ("data.num_workers=0",),
    "two workers, accumulation": (
        "data.num_workers=2",
        "trainer.accumulate_grad_batches=2",
        "stages.teacher.trainer.accumulate_grad_batches=2",
    ),
}


def kill_within(stage: str, arguments: tuple[str, ...], folder: Path, cache: Path) -> int:
    """Start the command and SIGKILL it at a random step of a stage; return the last step seen."""
    wanted = random.randint(5, 50)
    process = start_process(*arguments, folder=folder, cache=cache)
    seen = 0
    deadline = time.monotonic() + 200
    while seen < wanted:
        assert process.poll() is None, f"the command ended before step {wanted} of {stage}"
        assert time.monotonic() < deadline
        series = [*folder.glob(f"outputs/*/*/work/{stage}/metrics.csv")]
        series += cache.glob(f"{stage}-*.work/metrics.csv")
        for path in series:
            rows = path.read_text().splitlines()[1:]
            seen = max([seen, *(int(r.split(",")[1]) for r in rows[:-1])])
        time.sleep(0.002)
    kill(process)
    return seen


def kill_among_shards(arguments: tuple[str, ...], folder: Path, cache: Path) -> None:
    """Start the command and SIGKILL it when a random number of shards is written."""
    wanted = random.randint(1, 12)
    process = start_process(*arguments, folder=folder, cache=cache)
    deadline = time.monotonic() + 200
    while len(list(cache.glob("*.work/shards/*"))) < wanted:
        assert process.poll() is None, f"the command ended before shard {wanted}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill(process)


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        pytest.param(
            "cache",
            ("teacher=cached", "stages.cache.windows_per_shard=20"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "generate",
            (
                "experiment=sequence_kd",
                "stages.generate.batch_size=4",
                "stages.generate.max_sequences=100",
                "decoding.max_new_tokens=12",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "rewrite",
            (
                "experiment=self_data",
                "stages.rewrite.batch_size=4",
                "data.corpus.exercises.addition.train_exercises=100",
                "decoding.max_new_tokens=12",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "pairs",
            ("experiment=instaflow", "stages.pairs.count=160", "stages.pairs.batch_size=4"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_stage_of_shards_goes_on_and_leaves_what_an_uninterrupted_one_leaves(
    tmp_path: Path, stage: str, arguments: tuple[str, ...]
) -> None:
    arguments = (*TINY, *arguments, f"stop_after={stage}")
    contents = []
    for name in ("whole", "broken"):
        folder, cache = tmp_path / name, tmp_path / f"cache of {name}"
        folder.mkdir()
        if name == "broken":
            kill_among_shards(arguments, folder, cache)
            before = {p: p.stat().st_mtime_ns for p in cache.glob("*.work/shards/*")}
            assert before
        done = run_process(*arguments, folder=folder, cache=cache)
        assert done.code == 0, done.err
        (home,) = (p for p in cache.glob(f"{stage}-*") if p.is_dir())
        names = {p.name for p in home.iterdir()} - {"manifest.json", "provenance.json"}
        told = {"signal.json", "dataset_info.json", "state.json"}
        contents.append({n: (home / n).read_bytes() for n in names - told})
    assert contents[0] == contents[1]


def test_interrupted_says_how_to_go_on(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = (*TINY, "experiment=sft", "trainer.max_steps=5000")
    process = start_process(*arguments, folder=tmp_path, cache=cache)
    while not list(tmp_path.glob("outputs/*/*/work/train/checkpoints/*.ckpt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    folder = only_run(tmp_path / "outputs")
    assert out.endswith(f"interrupted; go on with: python run.py resume={folder}\n")
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "interrupted"


@pytest.mark.parametrize(
    "setting",
    ["alone in the process", pytest.param("two workers, accumulation", marks=pytest.mark.slow)],
)
def test_killed_in_every_stage_and_resumed_equals_uninterrupted(tmp_path: Path, setting) -> None:
    arguments = (*LONG, *SETTINGS[setting])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = run_process(*arguments, folder=whole, cache=tmp_path / "cache of whole")
    assert done.code == 0, done.err

    cache = tmp_path / "cache of broken"
    kill_within("teacher", arguments, broken, cache)
    folder = only_run(broken / "outputs")
    again = (f"resume={folder}",)
    kill_within("distil", again, broken, cache)
    kill_within("alone", again, broken, cache)
    last = run_process(*again, folder=broken, cache=cache)
    assert last.code == 0, last.err
    assert "alone: going on from step" in last.out

    reference = only_run(whole / "outputs")
    for stage in ("teacher", "distil", "alone"):
        expected = load_file(reference / "stages" / stage / "model.safetensors")
        resumed = load_file(folder / "stages" / stage / "model.safetensors")
        assert expected.keys() == resumed.keys()
        for name, tensor in expected.items():
            assert tensor.equal(resumed[name]), f"{stage}: {name} differs"
        series = (reference / "stages" / stage / "metrics.csv").read_text()
        assert series == (folder / "stages" / stage / "metrics.csv").read_text()
    results = json.loads((folder / "results.json").read_text())
    expected_models = json.loads((reference / "results.json").read_text())["models"]
    for role, numbers in results["models"].items():
        assert numbers["test_nll"] == expected_models[role]["test_nll"]
    assert {s["status"] for s in results["stages"].values()} <= {"done", "cached"}
