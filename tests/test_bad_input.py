"""Bad input: one line that names the key, the value, what was expected and how to mend it."""

import errno
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ROOT, TINY, Finished, only_run, run_here, run_process
from filelock import FileLock

from stillhouse.cli import config_folder
from stillhouse.config import messages
from stillhouse.errors import UserError

RECIPES = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml"))
TEACHERS = sorted(p.stem for p in (ROOT / "conf/teacher").glob("*.yaml"))
METHODS = sorted(p.stem for p in (ROOT / "conf/method").glob("*.yaml"))
KEYS_OF_WORD_KD = (
    "divergence, beta, alpha, temperature, scale_by_temperature_squared, cross_entropy_weight"
)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["experiment=word_kdd"],
            "experiment=word_kdd: the group experiment has no such option; expected "
            f"{', '.join(RECIPES)}; did you mean 'word_kd' or 'word_kd_smollm2'?",
        ),
        (
            ["teacher=life"],
            "teacher=life: the group teacher has no such option; expected "
            f"{', '.join(TEACHERS)}; did you mean 'live'?",
        ),
        (
            ["method.temprature=2"],
            "method.temprature: the config has no such key; did you mean 'method.temperature'?",
        ),
        (
            ["method=null"],
            f"method=null: a group takes the name of an option; expected {', '.join(METHODS)}",
        ),
        (
            ["experiment=echoatt", "teacher.layers=[3]"],
            "teacher.layers: the recipe has settings there, which a list does not replace; take "
            "them out first: '~teacher.layers' '+teacher.layers=[3]'",
        ),
        (
            ["experiment=ernie_tiny", "stages.task_specific=null"],
            "stages.cache_encoder.layer_map takes its value from "
            "stages.task_specific.family.layer_map, and stages.task_specific is left out (null): "
            "keep stages.task_specific, set stages.cache_encoder.layer_map by itself, or leave "
            "that out too",
        ),
        (
            ["metod=sft"],
            "metod: the config has no such key; did you mean 'method'?",
        ),
        (
            ["max_steps=5"],
            "max_steps: the config has no such key; did you mean "
            "'stages.teacher.trainer.max_steps' or 'trainer.max_steps'?",
        ),
        (
            ["stages.distil.trainer.max_steps=5"],
            "stages.distil.trainer.max_steps: stages.distil.trainer is ${trainer}, the recipe's "
            "main value; set trainer.max_steps=5",
        ),
        (
            ["stages.teacher.learning_rate=3"],
            "stages.teacher.learning_rate: the config has no such key; did you mean "
            "'stages.teacher.optimizer.learning_rate' or 'optimizer.learning_rate'?",
        ),
        (
            ["stages.techer.seed=3"],
            "stages.techer.seed: the config has no such key; did you mean 'stages.teacher.seed'?",
        ),
        (
            ["seed=abc"],
            "seed: Value 'abc' of type 'str' could not be converted to Integer",
        ),
        (["trainer.max_steps=abc"], "trainer.max_steps=abc: expected int"),
        (
            ["method.divergence=kl"],
            "method.divergence=kl: expected forward_kl or reverse_kl or jsd or skew_forward_kl or "
            "skew_reverse_kl or total_variation",
        ),
        (
            ["stages.distil.family.loss_backend=fast"],
            "stages.distil.family.loss_backend=fast: expected auto or reference or streaming or "
            "triton or null",
        ),
        (
            ["+method.tau=3"],
            f"method.tau: word_kd takes no 'tau'; it takes {KEYS_OF_WORD_KD}",
        ),
        (
            ["+method.temprature=3"],
            f"method.temprature: word_kd takes no 'temprature'; it takes {KEYS_OF_WORD_KD}; "
            "did you mean 'temperature'?",
        ),
        (["teacher=hf"], "teacher.path has no value; set it with teacher.path=<value>"),
        (
            ["teacher=hf", "teacher.path=/no/such/model"],
            "teacher.path=/no/such/model: there is no such file or folder",
        ),
        (
            ["stop_after=distill"],
            "stop_after=distill: this recipe has no stage of that name; its stages are tokenizer, "
            "teacher, cache, distil, alone, evaluate; did you mean 'distil'?",
        ),
        (
            ["force=[teachr]"],
            "force=teachr: this recipe has no stage of that name; its stages are tokenizer, "
            "teacher, cache, distil, alone, evaluate; did you mean 'teacher'?",
        ),
        (
            ["stages.teacher=null"],
            "stages.evaluate needs the artifact of the stage 'teacher', which is left out; leave "
            "evaluate out, too, or keep teacher",
        ),
        (
            ["data.corpus.train_path=a,b"],
            "data.corpus.train_path=a,b: values apart by commas are for a sweep, -m; a text with a "
            "comma goes between double quotes, 'data.corpus.train_path=\"a,b\"', a list between "
            "brackets, 'data.corpus.train_path=[a,b]'",
        ),
        (
            ["trainer.accelerator=gpu"],
            "stage distil: Lightning refuses its trainer (accelerator=gpu, devices=1): No "
            "supported gpu backend found!",
        ),
        (
            ["resume=nowhere"],
            "resume=nowhere: the folder does not exist; expected one that a run wrote, with "
            "config.yaml and .hydra/ in it, such as outputs/<recipe>/<time>",
        ),
        (
            ["resume=."],
            "resume=.: the folder is no run directory; expected one that a run wrote, with "
            "config.yaml and .hydra/ in it, such as outputs/<recipe>/<time>",
        ),
        (
            ["=3"],
            "the argument '=3' is not of the form key=value; quote values with spaces or commas as "
            "a whole: 'key=[a,b]'",
        ),
        (
            ["--config-name", "comparre"],
            "--config-name comparre: there is no such job; expected compare, evaluate, export, "
            "jobs, run, sample; did you mean 'compare'?",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_line_and_nothing_left_behind(capfd, here: Path, arguments, line: str) -> None:
    own = [] if "--config-name" in arguments else TINY
    assert run_here(capfd, *own, *arguments) == Finished(2, "", f"error: {line}\n")
    assert not list(here.rglob("*.yaml")), "a run that never began left files"


def test_a_teacher_folder_without_config(capfd, here: Path) -> None:
    (here / "teacher").mkdir()
    (here / "teacher" / "tokenizer.json").write_text("{}")
    done = run_here(capfd, *TINY, "teacher=hf", "teacher.path=./teacher")
    assert done == Finished(
        2,
        "",
        "error: teacher.path=./teacher: the folder has no config.json; expected a model saved with "
        "save_pretrained, for example the student/ of a run directory\n",
    )


def test_a_teacher_with_another_tokenizer_is_refused_before_training(capfd, here: Path) -> None:
    small = run_here(capfd, *TINY, "experiment=sft", "stages.tokenizer.vocab_size=270")
    assert small.code == 0, small.err
    other = run_here(capfd, *TINY, "experiment=sft", "paths.outputs=other")
    assert other.code == 0, other.err
    teacher, data = only_run(here / "outputs") / "student", only_run(here / "other") / "student"
    done = run_here(
        capfd,
        *TINY,
        "paths.outputs=third",
        "teacher=hf",
        f"teacher.path={teacher}",
        f"data.tokenizer_path={data}",
    )
    assert done.code == 2
    assert "step" not in done.out, "training had begun"
    assert done.err.startswith(
        f"error: teacher.path={teacher}: its tokenizer has 270 tokens, the data's 300, and "
    )
    assert done.err.endswith(
        "this family compares distributions over one vocabulary, so teacher, student and data need "
        "one tokenizer: take a teacher and a student of one family (teacher=hf teacher.path=…, "
        "which the data follow); student=llama is made for any\n"
    )
    assert done.err.count("\n") == 1


def test_resuming_with_another_config_shows_the_difference(capfd, here: Path) -> None:
    assert run_here(capfd, *TINY, "experiment=sft").code == 0
    folder = only_run(here / "outputs")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    done = run_here(
        capfd, *TINY, "experiment=sft", "optimizer.learning_rate=0.5", "seed=7", f"resume={folder}"
    )
    assert done == Finished(
        2,
        "",
        f"error: resume={folder}: its config differs from this command's (2 keys, then -> now): "
        "optimizer.learning_rate: 0.004 -> 0.5; seed: 0 -> 7; give the same keys, or start a new "
        "run\n",
    )
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_file_in_the_place_of_the_cache(capfd, here: Path) -> None:
    (here / "cache").write_text("not a folder")
    done = run_here(capfd, *TINY)
    assert done.code == 2
    assert done.err == (
        f"error: the folder {here / 'cache'} cannot be made: File exists: {here / 'cache'}; move "
        "what is in its way, or choose another cache with paths.cache=<folder>\n"
    )


@pytest.mark.parametrize(
    "name", ["model.safetensors", pytest.param("step=1.ckpt", marks=pytest.mark.slow)]
)
def test_no_room_on_the_disk(capfd, here: Path, monkeypatch, name: str) -> None:
    """A full disk while the teacher is written, or its checkpoint."""
    import lightning.fabric.utilities.cloud_io as lightning_io
    import transformers.modeling_utils as modeling

    full = OSError(errno.ENOSPC, "No space left on device", f"/full/{name}")

    def refuse(*args: object, **kwargs: object) -> None:
        raise full

    if name.endswith("safetensors"):
        monkeypatch.setattr(modeling, "safe_save_file", refuse)
    else:
        monkeypatch.setattr(lightning_io.torch, "save", refuse)
    done = run_here(capfd, *TINY)
    assert done.code == 2
    folder = only_run(here / "outputs")
    assert done.err == (
        f"error: no space left on the disk for /full/{name}; free some, or move the cache "
        f"({here / 'cache'}) with paths.cache=<folder>; then go on with "
        f"resume={folder}\n"
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["stages"]["teacher"]["status"] == "failed"
    assert not list((here / "cache").glob("teacher-*[0-9a-f]/")), "half a teacher in the cache"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    again = run_here(capfd, f"resume={folder}")
    assert again.code == 0, again.err


def test_a_nan_loss_stops_with_step_and_batch_and_keeps_the_last_good_checkpoint(
    capfd, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.families.sequence import sft as module

    original = module.token_cross_entropy
    calls: list[int] = []

    def poisoned(*args: object):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(module, "token_cross_entropy", poisoned)
    done = run_here(
        capfd,
        *TINY,
        "experiment=sft",
        "trainer.max_steps=9",
        "trainer.val_check_interval=9",
        "callbacks.checkpoint.checkpoint_every_n_steps=1",
    )
    assert done.code == 2
    assert done.err == (
        "error: the loss is nan at step 4, batch 4; an earlier checkpoint, if there is one, is "
        "kept; lower optimizer.learning_rate, or clip with trainer.gradient_clip_val\n"
    )
    folder = only_run(here / "outputs")
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == results["stages"]["train"]["status"] == "failed"
    assert "the loss is nan at step 4" in results["stages"]["train"]["error"]
    assert (folder / "work" / "train" / "checkpoints" / "step=4.ckpt").is_file()
    assert "train_loss" in (folder / "metrics.csv").read_text(), "the curve up to the fault is kept"


def test_a_sweeper_that_searches_is_refused(capfd, here: Path) -> None:
    done = run_here(capfd, *TINY, "-m", "hydra/sweeper=optuna", "method.temperature=interval(1,2)")
    assert done == Finished(
        2,
        "",
        "error: hydra/sweeper=optuna: a sweeper that searches gets no number from the jobs; search "
        "with W&B (wandb sweep conf/wandb_sweep/<name>.yaml), or list the values: "
        "key=value,value\n",
    )
    assert not list(here.iterdir())


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_ray_launcher") is not None, reason="the launcher is installed"
)
@pytest.mark.parametrize("launcher", ["ray", "ray_tasks"])
def test_a_launcher_whose_package_is_not_installed(capfd, here: Path, launcher: str) -> None:
    done = run_here(capfd, *TINY, "-m", f"hydra/launcher={launcher}", "seed=0,1")
    assert done == Finished(
        2,
        "",
        "error: hydra/launcher: ray needs a package that is not installed: pip install "
        "'ray[default]' boto3 && pip install --no-deps hydra-ray-launcher\n",
    )
    assert not list(here.iterdir())


def test_two_processes_do_not_share_a_run_directory(capfd, here: Path) -> None:
    assert run_here(capfd, *TINY, "experiment=sft", "stop_after=tokenizer").code == 0
    folder = only_run(here / "outputs")
    with FileLock(folder / ".lock"):
        done = run_here(capfd, f"resume={folder}")
    assert done.code == 2
    assert done.err == f"error: {folder}: another process is working in this run directory\n"


def test_a_key_tried_in_the_command_of_the_shell(tmp_path: Path) -> None:
    """The same through a real process: nothing but the line on stderr."""
    done = run_process("method.temprature=2", folder=tmp_path, cache=tmp_path / "cache")
    assert done == Finished(
        2,
        "",
        "error: method.temprature: the config has no such key; did you mean "
        "'method.temperature'?\n",
    )
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("offline", "more"),
    [("1", " HF_HUB_OFFLINE is set, and nothing is fetched: unset it"), ("", "")],
)
def test_a_hub_that_the_environment_keeps_away(
    monkeypatch: pytest.MonkeyPatch, offline: str, more: str
) -> None:
    """The library says that it could not connect, as if the network were at fault."""
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    error = UserError("teacher.path=a/b: We couldn't connect to\n'https://huggingface.co'.")
    line = "teacher.path=a/b: We couldn't connect to 'https://huggingface.co'."
    assert messages.one_line(error, [], config_folder()) == line + more
