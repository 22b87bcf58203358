"""The stage `merge`: two model folders into one, in the memory of a few tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.schema import register_schemas
from stillhouse.stages.merge import Merge
from stillhouse.stages.workspace import register_resolvers
from stillhouse.students.weight_merging import cosine, slerp

MERGING = "stillhouse.students.weight_merging"


def merge(path: Any, other: Any, way: str = "slerp", **settings: float) -> Merge:
    node = {"_target_": f"{MERGING}.{way}", "_partial_": True, **(settings or {"weight": 0.25})}
    return Merge(path=str(path), other_path=str(other), merging=node)


@pytest.fixture
def models(tmp_path: Path, language_world, tiny_llama) -> list[Path]:
    """Two models of one shape with the same tokenizer; the first's folder holds more."""
    folders = [tmp_path / "a model", tmp_path / "another"]
    tokenizer = AutoTokenizer.from_pretrained(language_world.model)
    for seed, folder in enumerate(folders):
        tiny_llama(seed, vocab_size=300).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name in ("LICENSE", "manifest.json", "README.md", "pytorch_model.bin.index.json"):
        (folders[0] / name).write_text("{}")
    return folders


def test_every_tensor_is_merged_and_the_rest_is_the_first_s(models, stage_context) -> None:
    context = stage_context("merge")
    result = merge(*models)(context)
    first, second = (load_file(folder / "model.safetensors") for folder in models)
    expected = {name: slerp(first[name], second[name], weight=0.25) for name in first}
    loaded = AutoModelForCausalLM.from_pretrained(context.output)
    found = loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The norms' weights are ones in both models.
    assert not torch.equal(found["lm_head.weight"], first["lm_head.weight"])
    cosines = [cosine(first[name], second[name]) for name in first]
    assert result.metrics == {
        "tensors": len(first),
        "parameters": loaded.num_parameters(),
        "mean_cosine": pytest.approx(sum(filter(None, cosines)) / len(first)),
    }
    names = {path.name for path in models[0].iterdir()}
    not_copied = {"manifest.json", "README.md", "pytorch_model.bin.index.json"}
    assert {path.name for path in context.output.iterdir()} == names - not_copied
    for name in names - not_copied - {"model.safetensors"}:
        assert (context.output / name).read_bytes() == (models[0] / name).read_bytes()
    with safe_open(context.output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert context.console.file.getvalue().startswith(f"merge: {len(first)} of {len(first)}")


def test_files_are_cut_as_the_first_s(models, stage_context, tmp_path: Path) -> None:
    whole = stage_context("whole")
    merge(*models)(whole)
    shards = [tmp_path / "shards of a", tmp_path / "shards of b"]
    for folder, into, size in zip(models, shards, ("20KB", "9KB"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(into, max_shard_size=size)
    counts = [len(list(folder.glob("*.safetensors"))) for folder in shards]
    assert 1 < counts[0] < counts[1]
    expected = AutoModelForCausalLM.from_pretrained(whole.output).state_dict()
    for first, second in (shards, (shards[0], models[1]), (models[0], shards[1])):
        context = stage_context("merge")
        merge(first, second)(context)
        files = {p.name for p in first.iterdir() if "safetensors" in p.name}
        assert {p.name for p in context.output.iterdir() if "safetensors" in p.name} == files
        found = AutoModelForCausalLM.from_pretrained(context.output).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return path


def test_types_of_every_width_in_one_file(tmp_path: Path, stage_context) -> None:
    def tensors(value: float) -> dict[str, torch.Tensor]:
        return {
            "odd": torch.tensor([3, 1, 2], dtype=torch.uint8),
            "half": torch.full((3,), value, dtype=torch.bfloat16),
            "wide": torch.full((2, 1), value, dtype=torch.float64),
            "scalar": torch.tensor(value),
            "none": torch.empty(0, 2),
            "steps": torch.tensor(7),
        }

    a, b = folder_of(tmp_path / "a", tensors(1.0)), folder_of(tmp_path / "b", tensors(3.0))
    context = stage_context("merge")
    assert merge(a, b, "linear", weight=0.5)(context).metrics["tensors"] == 6
    header = (context.output / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0, "what begins elsewhere cannot be mapped"
    found = load_file(context.output / "model.safetensors")
    for name, expected in tensors(2.0).items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    summed = stage_context("sum")
    merge(a, b, "weighted_sum", first_weight=1.0, second_weight=1.0)(summed)
    assert load_file(summed.output / "model.safetensors")["scalar"] == 4.0


ONE = "expected two models of one architecture, such as two trainings of one student"
CHANGES: dict[str, tuple[Any, str]] = {
    "missing": ({"m": None}, f"it has no tensor m, which {{a}} has; {ONE}"),
    "further": ({"c": torch.ones(1)}, f"it has a tensor c, which {{a}} does not have; {ONE}"),
    "shape": (
        {"m": torch.ones(3, 2), "z": torch.ones(5)},
        f"its tensor m has the shape [3, 2], that of {{a}} has [2, 3]; {ONE}",
    ),
    "type": (
        {"m": torch.ones(2, 3, dtype=torch.bfloat16)},
        "its tensor m is of the type BF16, that of {a} of F32; expected two models of one type: "
        "save one anew in the other's",
    ),
    "codes": (
        {"n": torch.tensor([2])},
        "its tensor n differs from that of {a}, and the type I64 cannot be merged; expected one of "
        "F64, F32, F16, BF16, or equal tensors",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_tensor_that_differs_is_named(tmp_path: Path, stage_context, change) -> None:
    tensors = {"m": torch.ones(2, 3), "n": torch.tensor([1]), "z": torch.ones(4)}
    changes, message = CHANGES[change]
    changed = {n: t for n, t in (tensors | changes).items() if t is not None}
    a, b = folder_of(tmp_path / "a", tensors), folder_of(tmp_path / "b", changed)
    with pytest.raises(UserError) as refused:
        merge(a, b)(stage_context("merge"))
    assert str(refused.value) == f"stages.merge.other_path={b}: {message.format(a=a)}"


def test_folders_that_cannot_be_merged(tmp_path: Path, models, stage_context) -> None:
    def refusal(path: Any, other: Any, **settings: float) -> str:
        with pytest.raises(UserError) as refused:
            merge(path, other, **settings)(stage_context("merge"))
        return str(refused.value)

    a, b = models
    bare = tmp_path / "bare"
    bare.mkdir()
    assert refusal(bare, b) == (
        f"stages.merge.path={bare}: the folder has no config.json; expected a model saved with "
        "save_pretrained, for example the student/ of a run directory"
    )
    assert refusal(a, "org/name") == (
        "stages.merge.other_path=org/name: there is no such folder; expected a model folder"
    )
    (bare / "pytorch_model.bin").write_text("")
    assert refusal(a, bare) == (
        f"stages.merge.other_path={bare}: the folder has no model.safetensors and no "
        "model.safetensors.index.json; expected weights as save_pretrained writes them; load the "
        "model and save it again, other formats are not read here"
    )
    (bare / "model.safetensors.index.json").write_text('{"weight_map": {"m": "part.safetensors"}}')
    assert refusal(a, bare) == (
        f"stages.merge.other_path={bare}: its model.safetensors.index.json names part.safetensors, "
        "which is missing; fetch it anew"
    )
    (bare / "model.safetensors.index.json").write_text("[]")
    assert refusal(a, bare).startswith(
        f"stages.merge.other_path={bare}: its model.safetensors.index.json cannot be read: "
    )
    (bare / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-8])
    assert refusal(a, bare).startswith(
        f"stages.merge.other_path={bare}: model.safetensors cannot be read: SafetensorError: "
    )
    assert refusal(a, b, weight=1.5) == (
        "merging.weight=1.5: expected the share of the second model, from 0 to 1"
    )
    config = b / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"num_attention_heads": 8}))
    assert refusal(a, b) == (
        f"stages.merge.other_path={b}: its config.json says num_attention_heads=8, that of {a} "
        f"{written['num_attention_heads']}; {ONE}"
    )
    history = {"use_cache": False, "transformers_version": "5.0.0", "_name_or_path": "b"}
    config.write_text(json.dumps(written | history))
    merge(a, b)(stage_context("merge"))
    config.unlink()
    assert refusal(a, b) == (f"stages.merge.other_path={b}: the folder has no config.json; {ONE}")
    config.write_text(json.dumps(written))
    tokenizer = AutoTokenizer.from_pretrained(b)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(b)
    assert refusal(a, b) == (
        f"stages.merge.other_path={b}: its tokenizer has other tokens than that of {a}; {ONE}"
    )


def test_what_is_not_finite_is_refused(tmp_path: Path, stage_context) -> None:
    fine, large = {"n": torch.ones(3)}, {"n": torch.full((3,), 4e4, dtype=torch.float16)}
    a = folder_of(tmp_path / "a", fine)
    b = folder_of(tmp_path / "b", {"n": torch.tensor([1.0, float("nan"), 1.0])})
    for first, other, where in ((a, b, "other_path"), (b, a, "path")):
        with pytest.raises(UserError) as refused:
            merge(first, other)(stage_context("merge"))
        assert str(refused.value) == (
            f"stages.merge.{where}={b}: its tensor n holds NaN or infinity; expected a model that "
            "was trained without; take an earlier one"
        )
    c, d = (folder_of(tmp_path / name, large) for name in "cd")
    with pytest.raises(UserError) as refused:
        merge(c, d, "weighted_sum", first_weight=1.0, second_weight=1.0)(stage_context("merge"))
    assert str(refused.value) == (
        "stages.merge: the merged tensor n is too large for the type F16; lower the weights of "
        "merging, or save both models as F32"
    )


MEASURE = """
import io, json, sys, threading, time
from pathlib import Path
from rich.console import Console
from stillhouse.stages.merge import Merge
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

a, b, output = sys.argv[1:]
target = "stillhouse.students.weight_merging.slerp"
node = {"_target_": target, "_partial_": True, "weight": 0.5}
output, console = Path(output), Console(file=io.StringIO())
context = StageContext("merge", output, output, FileTracker(None), console)
stage = Merge(path=a, other_path=b, merging=node)
seen, done = [anonymous()], threading.Event()

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
stage(context)
done.set()
watcher.join()
print(json.dumps([len(seen), max(seen) - seen[0]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_two_models_are_merged_in_less_than_the_memory_of_one(tmp_path: Path) -> None:
    """Growth of anonymous resident memory: mapped pages of the inputs can be dropped at any time.

    Two models of 151 MB in 9 tensors; what is allowed is half a model.
    """
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        folder_of(tmp_path / name, {f"t{i}": torch.randn(1 << 22) for i in range(9)})
    output = tmp_path / "output"
    output.mkdir()
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a", tmp_path / "b", output],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    samples, growth = json.loads(measured.stdout)
    model = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert (output / "model.safetensors").stat().st_size == pytest.approx(model, rel=1e-3)
    assert samples > 50
    assert 0.1 * model < growth < 0.5 * model


@pytest.mark.parametrize("merging", sorted(p.stem for p in (ROOT / "conf/merging").glob("*.yaml")))
def test_the_yaml_files_bind_and_list_every_parameter(merging: str) -> None:
    register_schemas()
    register_resolvers()
    added = [
        "+stage@stages.merge=merge",
        "stages.merge.path=org/a",
        "stages.merge.other_path=org/b",
    ]
    config = preflight.compose_job(
        ["experiment=word_kd", *added, f"merging={merging}"], ROOT / "conf"
    )
    OmegaConf.to_container(config, resolve=True)
    signatures.check(config, ["merge"])
    found = dict(signatures.nodes_with_targets(config, ["merge"]))
    assert {"stages.merge", "merging"} <= set(found)
    for path in ("stages.merge", "merging"):
        target = get_object(found[path]._target_)
        assert not set(signatures.keywords_of(target) or {}) - set(found[path])
