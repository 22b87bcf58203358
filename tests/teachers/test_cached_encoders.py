"""The cached teacher of encoders says what the live one says, and refuses what does not match."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_fits import EncoderWorld
from encoders import make_batch, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig

from stillhouse.errors import UserError
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.stages.cache_encoder import CacheEncoder
from stillhouse.teachers.cached_encoders import CachedEncoder, cached_encoder
from stillhouse.teachers.encoder_signals import INDEX, keys_of, read_index
from stillhouse.teachers.encoders import live_encoder

FAMILY = "stillhouse.families.progressive.ernie_tiny"
MAP = {
    "_target_": "stillhouse.students.layer_maps.uniform",
    "_partial_": True,
    "embeddings": True,
}
LIVE = "stillhouse.teachers.encoders.live_encoder"
CACHED = "stillhouse.teachers.cached_encoders.cached_encoder"
OR_LIVE = "make it anew with force=<its stage>, or take teacher=encoder"
DECIDE = "data.corpus, data.sequence_length, data.train_labels and the stage's splits decide them"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EncoderWorld:
    return EncoderWorld.make(tmp_path_factory.mktemp("encoders"))


def save_teacher(folder: Path, seed: int = 0) -> str:
    """Write a fine-tuned encoder of four layers; large weights, so that no two texts look alike."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=10,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.4,
        id2label={0: "even", 1: "odd"},
        pad_token_id=1,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer(10).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def cache(world, path, stage_context):
    """A function that caches the signal; returns its folder and the stage's metrics."""

    def cache(name: str = "cache", **changes: Any) -> tuple[Path, Any]:
        context = stage_context(name)
        settings = {
            "teacher": {"_target_": LIVE, "_partial_": True, "path": path},
            "data": world.data(),
            "layer_map": MAP,
            "student_layers": 2,
            "batches_per_shard": 2,
        }
        metrics = CacheEncoder(**(settings | changes))(context).metrics
        return context.output, metrics

    return cache


def shuffled(world: EncoderWorld, **changes: Any) -> list[EncoderBatch]:
    """Return batches of the texts that are trained on, in another order and of other widths."""
    data = world.made(**changes)
    rows = list(data.rows("train"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [data.collate([rows[i] for i in order[n : n + 5]]) for n in range(0, len(order), 5)]


def tensors(said: EncoderOutput, mask: Tensor, *, inside: bool = True) -> dict[str, Tensor]:
    """Return a record's tensors at its tokens, or at its padding."""
    where = mask if inside else ~mask
    found = {f"hidden {n}": x[where] for n, x in said.hidden_states.items()}
    for n, tap in said.attention.items():
        for name, x in vars(tap).items():
            if name in ("queries", "keys", "values"):
                found[f"{name} {n}"] = x.transpose(1, 2)[where]
    if inside:
        assert said.logits is not None
        found["logits"] = said.logits
    return found


ASKED: Any = {"hidden_layers": [0, 2, 4], "attention_layers": [2, 4]}


def test_it_says_what_the_live_teacher_says(world, path, cache) -> None:
    folder, _ = cache()
    data = world.made()
    live, read = live_encoder(data, path=path), cached_encoder(data, path=path, signal_path=folder)
    assert not list(read.parameters())
    assert read.config.num_hidden_layers == 4
    for batch in [*shuffled(world), *data.evaluation_batches("validation")]:
        expected, found = live(batch, **ASKED), read(batch, **ASKED)
        wanted, got = (tensors(said, batch.attention_mask) for said in (expected, found))
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)
        assert found.attention[2].queries.shape == expected.attention[2].queries.shape
        for tensor in tensors(found, batch.attention_mask, inside=False).values():
            assert not tensor.any(), "padding holds zeros"
    (batch, *_) = shuffled(world)
    assert list(read(batch, hidden_layers=[4]).hidden_states) == [4], "what is asked for, no more"
    assert not read(batch).attention


def test_nothing_is_lost_on_the_way(world, path, cache) -> None:
    """On the very batches that were cached, every bit is the live teacher's."""
    folder, _ = cache()
    data = world.made()
    live, read = live_encoder(data, path=path), cached_encoder(data, path=path, signal_path=folder)
    for split in ("train", "validation"):
        for batch in data.evaluation_batches(split):
            wanted = tensors(live(batch, **ASKED), batch.attention_mask)
            found = tensors(read(batch, **ASKED), batch.attention_mask)
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def method(name: str, form: str) -> dict[str, Any]:
    settings = {"relation_heads": 4} if form == "relation" else {}
    latent = {"_target_": f"{FAMILY}.{form}", "_partial_": True, **settings}
    return {"_target_": f"{FAMILY}.{name}", "_partial_": True, "latent_loss": latent}


@pytest.mark.parametrize(
    ("name", "form"), [("latent", "minilm"), ("latent", "tinybert"), ("ernie_tiny", "relation")]
)
def test_training_equals_that_with_the_live_teacher(
    world, path, cache, stage_context, name, form
) -> None:
    """To rounding: in batches of other widths, the teacher's sums have another order."""
    folder, _ = cache()
    settings = {
        "method": method(name, form),
        "family": {"layer_map": MAP, "projection": form == "tinybert"},
        "trainer": {"max_steps": 8, "val_check_interval": 4},
    }
    live = {"_target_": LIVE, "_partial_": True, "path": path}
    cached = {"_target_": CACHED, "_partial_": True, "path": path, "signal_path": str(folder)}
    expected, found = (
        world.fit(teacher=teacher, **settings)(stage_context("fit")).metrics
        for teacher in (live, cached)
    )
    assert expected.pop("teacher_parameters") > found.pop("teacher_parameters") == 0
    assert {"train_loss", "val_loss"} <= expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


def test_bytes_are_those_of_the_folder_and_padding_is_not_stored(cache) -> None:
    folder, metrics = cache()
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert metrics["bytes_per_text"] == pytest.approx(size / metrics["texts"])
    shards = [load_file(file) for file in sorted(folder.glob("shard-*.safetensors"))]
    # 3 hidden states, and 3 of each of two taps.
    assert {shard["tokens"].shape[1] for shard in shards} == {(3 + 2 * 3) * 24}
    assert sum(len(shard["tokens"]) for shard in shards) == metrics["tokens"]
    assert metrics["texts"] == 64
    half, in_half = cache("half", dtype="float16")
    assert load_file(half / "shard-00000.safetensors")["tokens"].dtype == torch.float16
    assert in_half["bytes_per_text"] < 0.7 * metrics["bytes_per_text"]


def test_half_precision_is_near_and_read_as_float32(world, path, cache) -> None:
    folder, _ = cache(dtype="float16")
    data = world.made()
    live, read = live_encoder(data, path=path), cached_encoder(data, path=path, signal_path=folder)
    for batch in shuffled(world):
        wanted = tensors(live(batch, **ASKED), batch.attention_mask)
        for name, tensor in tensors(read(batch, **ASKED), batch.attention_mask).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=2e-3, atol=2e-3)
        with torch.autocast("cpu", torch.bfloat16):
            assert read(batch, **ASKED).hidden_states[2].dtype == torch.float32


def test_logits_alone_are_kept_without_a_map(world, path, cache) -> None:
    folder, _ = cache(layer_map=None, student_layers=None)
    data = world.made()
    live, read = live_encoder(data, path=path), cached_encoder(data, path=path, signal_path=folder)
    for batch in shuffled(world):
        found = read(batch)
        torch.testing.assert_close(found.logits, live(batch).logits, rtol=1e-5, atol=1e-5)
        assert not found.hidden_states
        assert not found.attention


@pytest.mark.parametrize(
    ("student_layers", "layers"),
    [(2, [0, 2, 4]), (0.75, [0, 1, 3, 4]), ([0, 3], [0, 2, 4]), (None, [0, 1, 2, 3, 4])],
)
def test_layers_are_those_of_a_student_of_so_many_or_of_such_blocks(
    cache, student_layers: Any, layers: list[int]
) -> None:
    folder, _ = cache(student_layers=student_layers)
    index = read_index(folder, key="here")
    assert (index.hidden_layers, index.attention_layers) == (layers, layers[1:])


def test_a_shared_signal_names_no_folder_of_the_run_that_made_it(cache, path) -> None:
    folder, _ = cache()
    assert path not in (folder / INDEX).read_text()


def test_a_signal_of_all_texts_serves_fewer_labels(world, path, cache) -> None:
    folder, _ = cache()
    few = world.made(train_labels=6, subset_seed=3)
    live, read = live_encoder(few, path=path), cached_encoder(few, path=path, signal_path=folder)
    (batch,) = few.evaluation_batches("train")
    torch.testing.assert_close(read(batch).logits, live(batch).logits, rtol=1e-5, atol=1e-5)


def test_a_key_is_that_of_a_text_and_its_types_whatever_stands_beside_it() -> None:
    batch = make_batch((7, 4, 9))
    types: Any = batch.token_type_ids
    keys = keys_of(batch)
    assert len(set(keys)) == 3
    alone = [
        EncoderBatch(batch.input_ids[i : i + 1, :n], torch.ones(1, n).bool(), types[i : i + 1, :n])
        for i, n in enumerate((7, 4, 9))
    ]
    assert [key for one in alone for key in keys_of(one)] == keys
    left = F.pad(alone[1].input_ids, (3, 0), value=8), F.pad(alone[1].attention_mask, (3, 0))
    assert keys_of(EncoderBatch(*left, F.pad(types[1:2, :4], (3, 0)))) == [keys[1]]
    assert not set(keys_of(batch._replace(token_type_ids=torch.zeros_like(types)))) & set(keys)
    assert not set(keys_of(batch._replace(token_type_ids=None))) & set(keys)


def test_a_killed_stage_goes_on_behind_its_last_whole_shard(cache, stage_context) -> None:
    folder, _ = cache("whole")
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    names = sorted(name for name in expected if name.startswith("shard"))
    assert len(names) == 4
    shards = stage_context("broken").scratch / "shards"
    shards.mkdir()
    (shards / names[0]).write_bytes(expected[names[0]])
    (shards / names[1]).write_bytes(expected[names[1]][:-50])
    untouched = (shards / names[0]).stat().st_mtime_ns
    folder, _ = cache("broken")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    assert (folder / names[0]).stat().st_mtime_ns == untouched


@pytest.fixture
def signal(cache, tmp_path: Path) -> Path:
    folder, _ = cache()
    return shutil.copytree(folder, tmp_path / "signal")


def refusal(world: EncoderWorld, path: str, signal: Path, **changes: Any) -> str:
    data = world.made(**changes)
    with pytest.raises(UserError) as refused:
        cached_encoder(data, path=path, signal_path=str(signal))
    return str(refused.value)


def test_another_teacher_and_another_tokenizer_are_refused(world, path, signal, tmp_path) -> None:
    other = save_teacher(tmp_path / "other", seed=1)
    assert refusal(world, other, signal) == (
        f"teacher.signal_path={signal}: the signal is of another teacher; it has to be that of "
        f"teacher.path; {OR_LIVE}"
    )
    make_tokenizer(9).save_pretrained(tmp_path / "nine")
    assert refusal(world, path, signal, tokenizer_path=str(tmp_path / "nine")) == (
        f"teacher.signal_path={signal}: the signal is over another tokenizer's vocabulary; it has "
        f"to be that of data.tokenizer_path; {OR_LIVE}"
    )


def test_texts_that_were_not_cached_are_refused(world, path, signal, cache, tmp_path) -> None:
    longer = sum(len(row.tokens) > 5 for row in world.made().rows("train"))
    assert refusal(world, path, signal, sequence_length=5) == (
        f"teacher.signal_path={signal}: {longer} of 32 texts of train were not cached; {DECIDE}; "
        f"{OR_LIVE}"
    )
    folder, _ = cache("only train", splits=["train"])
    # One of them is a training text as well.
    assert refusal(world, path, folder).startswith(
        f"teacher.signal_path={folder}: 31 of 32 texts of validation were not cached; data.corpus, "
    )
    read = cached_encoder(world.made(), path=path, signal_path=str(signal))
    (batch, *_) = shuffled(world)
    batch.input_ids[0, 0] = 3
    with pytest.raises(UserError) as refused:
        read(batch)
    assert str(refused.value) == (
        f"teacher.signal_path={signal}: 1 of 5 texts of a batch were not cached; {DECIDE}; "
        f"{OR_LIVE}"
    )


def test_layers_that_were_not_cached_are_refused(world, path, signal) -> None:
    read: CachedEncoder = cached_encoder(world.made(), path=path, signal_path=str(signal))
    (batch, *_) = shuffled(world)
    for asked, there in (("hidden_layers", "[0, 2, 4]"), ("attention_layers", "[2, 4]")):
        with pytest.raises(UserError) as refused:
            read(batch, **{asked: [1, 2, 3]})
        assert str(refused.value) == (
            f"teacher.signal_path={signal}: the signal has the teacher's layers {there}, not "
            "[1, 3]; give its stage the fit's layer_map and student_layers, and "
            f"{OR_LIVE}"
        )


def test_a_folder_that_holds_no_whole_signal_is_refused(world, path, signal, tmp_path) -> None:
    assert refusal(world, path, tmp_path) == (
        f"teacher.signal_path={tmp_path}: there is no {INDEX} that can be read; expected what the "
        "stage `cache_encoder` wrote"
    )
    shard = signal / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert refusal(world, path, signal) == (
        f"teacher.signal_path={signal}: shard-00001.safetensors was cut short or changed (its "
        f"checksum differs from the one in {INDEX}); make it anew with force=<its stage>"
    )
    content = json.loads((signal / INDEX).read_text())
    (signal / INDEX).write_text(json.dumps({**content, "format": 99}))
    assert refusal(world, path, signal) == (
        f"teacher.signal_path={signal}: the signal has format 99, this version reads 2; make it "
        "anew with force=<its stage>"
    )


def test_settings_of_the_stage_that_cannot_be_are_refused(cache) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(UserError) as refused:
            cache(**settings)
        return str(refused.value)

    assert refused(splits=["train", "dev"]) == (
        "stages.cache.splits=['train', 'dev']: expected one or more of train, validation, test"
    )
    assert refused(student_layers=1.5) == (
        "student.blocks=1.5: expected a fraction between 0 and 1, both excluded, or a list of "
        "indices"
    )
    assert refused(student_layers=5) == (
        "stages.<stage>.layer_map: the student has 5 layers, the teacher 4; expected no more than "
        "the teacher's, or the map `given`, which may name one twice"
    )
