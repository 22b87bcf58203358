"""The cached teacher says what the live one says, and refuses what does not match."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.errors import UserError
from stillhouse.families.attention_sharing.echoatt import echoatt
from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.records.language import LanguageOutput, TopKSignal
from stillhouse.stages.cache import CacheSignal
from stillhouse.students.causal_lm import read_output
from stillhouse.teachers.cached import cached_teacher
from stillhouse.teachers.codecs import Hidden, TopK
from stillhouse.teachers.live import live_teacher

V = 300
CODECS = {
    "all tokens": TopK(k=V, tail_samples=0, dtype="float32"),
    "hidden states": Hidden(dtype="float32"),
    "top 8": TopK(k=8, tail_samples=3, dtype="float16"),
}


def node_of(codec) -> dict:
    target = f"stillhouse.teachers.codecs.{type(codec).__name__}"
    return {"_target_": target, **vars(codec)}


def cache_stage(world, codec, layers=(), **changes) -> CacheSignal:
    teacher = {
        "_target_": "stillhouse.teachers.live.live_teacher",
        "_partial_": True,
        "path": str(world.model),
        "layers": list(layers),
    }
    settings = {"windows_per_shard": 20, "data": world.node()} | changes
    return CacheSignal(teacher=teacher, codec=node_of(codec), **settings)


@pytest.fixture
def cached(language_world, stage_context):
    """A function that caches the signal; returns its folder and the stage's metrics."""

    def cached(codec, **changes):
        context = stage_context("cache")
        result = cache_stage(language_world, codec, **changes)(context)
        return context.output, result.metrics

    return cached


def batches_of(data):
    """Training windows out of order, of unequal lengths, padded."""
    from stillhouse.data.windows import collate_windows

    windows = sorted(data.windows("train").in_order(), key=lambda w: len(w.labels))
    chosen = [windows[i] for i in (40, 0, 7, 90, 33, 1, 50, 2, 81, 12, 60, 21)]
    return [collate_windows(chosen[i : i + 4], pad_token=data.pad_token) for i in (0, 4, 8)]


def loss_and_gradient(student, teacher, batch, *, method=word_kd, layers=(), **options):
    student.zero_grad()
    said = read_output(student, batch, layers=layers)
    loss = method(said, teacher(batch), batch, **options).total
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("name", ["all tokens", "hidden states"])
@pytest.mark.parametrize(
    "options",
    [{}, {"divergence": "jsd", "temperature": 2.0}, {"divergence": "reverse_kl"}],
    ids=str,
)
def test_loss_and_gradient_equal_the_live_teacher_s(
    cached, language_world, tiny_llama, name, options
):
    folder, _ = cached(CODECS[name])
    data, path = language_world.data(), str(language_world.model)
    live = live_teacher(data, path=path)
    read = cached_teacher(data, path=path, signal_path=str(folder), codec=CODECS[name])
    student = tiny_llama(1, vocab_size=V).float()
    for batch in batches_of(data):
        expected = loss_and_gradient(student, live, batch, **options)
        found = loss_and_gradient(student, read, batch, **options)
        for e, f in zip(expected, found, strict=True):
            assert (e - f).norm() <= 1e-6 * e.norm()


@pytest.mark.parametrize("name", ["all tokens", "hidden states"])
def test_echoatt_s_loss_and_gradient_equal_the_live_teacher_s(
    cached, language_world, tiny_llama, name
):
    folder, _ = cached(CODECS[name], layers=(0, 1, 2))
    data, path = language_world.data(), str(language_world.model)
    options = {"layers": (1, 2)}
    live = live_teacher(data, path=path, **options)
    read = cached_teacher(data, path=path, signal_path=str(folder), codec=CODECS[name], **options)
    student = tiny_llama(1, vocab_size=V).float()
    for batch in batches_of(data):
        expected = loss_and_gradient(student, live, batch, method=echoatt, **options)
        found = loss_and_gradient(student, read, batch, method=echoatt, **options)
        for e, f in zip(expected, found, strict=True):
            assert (e - f).norm() <= 1e-6 * e.norm()


def test_a_truncated_signal_is_near_and_says_how_near(cached, language_world):
    _, eight = cached(TopK(k=8, tail_samples=0, dtype="float16"))
    _, sixty_four = cached(TopK(k=64, tail_samples=0, dtype="float16"))
    _, everything = cached(TopK(k=V, tail_samples=0, dtype="float32"))
    assert eight["kl_to_dense"] > sixty_four["kl_to_dense"] > 0
    assert abs(everything["kl_to_dense"]) < 1e-6
    assert eight["bytes_per_token"] < sixty_four["bytes_per_token"] < everything["bytes_per_token"]


def test_the_reported_kl_is_that_of_the_signal_with_its_residual_spread_evenly(
    cached, language_world
):
    codec = TopK(k=8, tail_samples=0, dtype="float32")
    _, metrics = cached(codec)
    data = language_world.data()
    teacher = live_teacher(data, path=str(language_world.model))
    total, count = 0.0, 0
    for batch in data.training_batches(range(len(data.windows("train")))):
        P = teacher(batch).logits[batch.mask].double().softmax(-1)
        kept = P.topk(8, -1)
        rest = (1 - kept.values.sum(-1, keepdim=True)) / (V - 8)
        stored = rest.expand_as(P).scatter(-1, kept.indices, kept.values)
        total += float((P * (P / stored).log()).sum())
        count += len(P)
    assert metrics["tokens"] == count
    assert metrics["kl_to_dense"] == pytest.approx(total / count, rel=1e-4)


def test_without_the_residual_the_tail_is_impossible(cached, language_world):
    folder, _ = cached(CODECS["top 8"])
    data = language_world.data()
    read = partial(
        cached_teacher,
        data,
        path=str(language_world.model),
        signal_path=str(folder),
        codec=CODECS["top 8"],
    )
    batch = batches_of(data)[0]
    whole, cut = read()(batch).at(batch.mask), read(keep_residual=False)(batch).at(batch.mask)
    assert isinstance(whole, TopKSignal)
    assert torch.isfinite(whole.log_residual).all()
    assert torch.equal(cut.log_residual, torch.full_like(whole.log_residual, -torch.inf))


def test_chosen_layers_are_the_live_teacher_s(cached, language_world):
    codec = Hidden(dtype="float32")
    folder, _ = cached(codec, layers=(0, 1))
    data, path = language_world.data(), str(language_world.model)
    live = live_teacher(data, path=path, layers=(0, 1))
    read = cached_teacher(data, path=path, signal_path=str(folder), codec=codec, layers=(0, 1))
    for batch in batches_of(data):
        expected, found = live(batch).at(batch.mask), read(batch).at(batch.mask)
        assert isinstance(found, LanguageOutput)
        assert found.layers.keys() == {0, 1}
        for layer in (0, 1):
            torch.testing.assert_close(
                found.layers[layer], expected.layers[layer], rtol=1e-5, atol=1e-6
            )


def test_live_layers_are_those_of_transformers(language_world):
    data, path = language_world.data(), str(language_world.model)
    teacher = live_teacher(data, path=path, layers=(0, 1))
    batch = batches_of(data)[0]
    states = teacher.model(
        batch.input_ids, attention_mask=batch.attention_mask.long(), output_hidden_states=True
    ).hidden_states
    assert all(torch.equal(teacher(batch).layers[i], states[i]) for i in (0, 1))
    with pytest.raises(UserError, match=r"teacher.layers=\[3\]: .* has the layers 0 to 2"):
        live_teacher(data, path=path, layers=(3,))


def test_a_killed_stage_goes_on_behind_its_last_whole_shard(language_world, stage_context):
    codec = CODECS["top 8"]
    context = stage_context("whole")
    cache_stage(language_world, codec)(context)
    expected = {p.name: p.read_bytes() for p in context.output.iterdir()}
    assert len(expected) > 3

    shards = stage_context("broken").scratch / "shards"
    shards.mkdir()
    names = sorted(name for name in expected if name.startswith("shard"))
    # The first shard is whole, the second was cut short, the third belongs to fewer windows.
    (shards / names[0]).write_bytes(expected[names[0]])
    (shards / names[1]).write_bytes(expected[names[1]][:-50])
    rows = load_file(context.output / names[2])
    save_file({n: t[:-1].clone() for n, t in rows.items()}, shards / names[2], {"kl": "0"})
    untouched = (shards / names[0]).stat().st_mtime_ns

    context = stage_context("broken")
    cache_stage(language_world, codec)(context)
    assert {p.name: p.read_bytes() for p in context.output.iterdir()} == expected
    assert (context.output / names[0]).stat().st_mtime_ns == untouched


@pytest.fixture
def signal(cached, tmp_path: Path) -> Path:
    folder, _ = cached(CODECS["top 8"])
    return shutil.copytree(folder, tmp_path / "signal")


def refusal(world, folder: Path, **changes) -> str:
    data_changes = changes.pop("data", {})
    settings = {"path": str(world.model), "codec": CODECS["top 8"]} | changes
    with pytest.raises(UserError) as caught:
        cached_teacher(world.data(**data_changes), signal_path=str(folder), **settings)
    return str(caught.value)


def test_another_teacher_is_refused(signal, language_world, tiny_llama, tmp_path):
    other = tmp_path / "other"
    tiny_llama(7, vocab_size=V).float().save_pretrained(other)
    assert refusal(language_world, signal, path=str(other)) == (
        f"teacher.signal_path={signal}: the signal is of another teacher; it has to be that of "
        "teacher.path; make it anew with force=cache, or take teacher=live"
    )


def test_another_tokenizer_is_refused(signal, language_world, tmp_path):
    other = shutil.copytree(language_world.model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(language_world, signal, data={"tokenizer_path": str(other)}) == (
        f"teacher.signal_path={signal}: the signal is over another tokenizer's vocabulary; it has "
        "to be that of data.tokenizer_path; make it anew with force=cache, or take teacher=live"
    )


@pytest.mark.parametrize(
    "changes", [{"sequence_length": 23}, {"packing": True}, {"max_train_documents": 2}], ids=str
)
def test_other_windows_are_refused(signal, language_world, changes):
    assert refusal(language_world, signal, data=changes) == (
        f"teacher.signal_path={signal}: the signal is of other training windows; data.corpus, "
        "data.sequence_length, data.packing and data.max_train_documents decide them; make it "
        "anew with force=cache, or take teacher=live"
    )


def test_another_codec_is_refused(signal, language_world):
    assert refusal(language_world, signal, codec=TopK(k=9, tail_samples=3, dtype="float16")) == (
        f"teacher.signal_path={signal}: the signal is stored as TopK(k=8, tail_samples=3, "
        "dtype=float16), not as codec=TopK(k=9, tail_samples=3, dtype=float16); make it anew with "
        "force=cache, or take teacher=live"
    )


def test_a_layer_that_was_not_stored_is_refused(cached, language_world):
    folder, _ = cached(CODECS["top 8"], layers=(0, 1))
    assert refusal(language_world, folder, layers=[1, 2]) == (
        f"teacher.layers=[1, 2]: the signal in {folder} has the layers [0, 1]; set "
        "stages.cache.teacher.layers to them, too"
    )


def test_shifted_windows_are_refused(signal, language_world):
    data = {"shift_windows": True, "packing": True}
    assert refusal(language_world, signal, data=data) == (
        "data.shift_windows=true: a cached signal belongs to fixed windows; set "
        "data.shift_windows=false, or take teacher=live"
    )


def test_a_shard_cut_short_is_refused(signal, language_world):
    shard = signal / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert refusal(language_world, signal) == (
        f"teacher.signal_path={signal}: shard-00001.safetensors was cut short or changed (its "
        "checksum differs from the one in signal.json); make it anew with force=cache"
    )
    shard.unlink()
    assert refusal(language_world, signal) == (
        f"teacher.signal_path={signal}: shard-00001.safetensors is missing; make it anew with "
        "force=cache"
    )


def test_a_folder_without_a_signal_and_another_format_are_refused(signal, language_world, tmp_path):
    assert refusal(language_world, tmp_path) == (
        f"teacher.signal_path={tmp_path}: there is no signal.json that can be read; expected what "
        "the stage `cache` wrote"
    )
    content = json.loads((signal / "signal.json").read_text())
    (signal / "signal.json").write_text(json.dumps({**content, "format": 99}))
    assert refusal(language_world, signal) == (
        f"teacher.signal_path={signal}: the signal has format 99, this version reads 1; make it "
        "anew with force=cache"
    )


def test_more_tokens_than_the_vocabulary_has_are_refused_before_any_work(
    language_world, stage_context
):
    context = stage_context("cache")
    with pytest.raises(UserError, match=r"codec.k=301: the teacher's vocabulary has 300 tokens"):
        cache_stage(language_world, TopK(k=301, tail_samples=0, dtype="float16"))(context)
    assert not list(context.scratch.glob("shards/*"))


def test_the_cached_teacher_has_no_parameters_and_travels_to_another_process(
    signal, language_world
):
    data = language_world.data()
    read = cached_teacher(
        data, path=str(language_world.model), signal_path=str(signal), codec=CODECS["top 8"]
    )
    batch = batches_of(data)[0]
    first = read(batch)
    assert not list(read.parameters())
    again = copy.deepcopy(read)(batch)
    assert torch.equal(first.log_probs, again.log_probs)


def test_stored_float16_is_read_under_autocast(signal, language_world):
    data = language_world.data()
    read = cached_teacher(
        data, path=str(language_world.model), signal_path=str(signal), codec=CODECS["top 8"]
    )
    batch = batches_of(data)[0]
    expected = read(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read(batch).log_probs, expected.log_probs)
