"""The stage `generate` and the corpus made of what it wrote."""

import json

import pytest
import torch
from datasets import load_from_disk

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.generated import generated
from stillhouse.data.corpora.king_james import king_james
from stillhouse.data.documents import TokenDocument
from stillhouse.data.windows import TokenWindows, Window
from stillhouse.errors import UserError
from stillhouse.evaluation.bleu import sentence_bleu
from stillhouse.stages import generate as module
from stillhouse.stages.generate import Generate
from stillhouse.students.causal_lm import load_causal_lm

END = 0
DECODING = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 1.0},
    "beam": {"num_beams": 3, "length_penalty": 1.0},
    "nearest_in_beam": {"num_beams": 3, "length_penalty": 1.0},
}


def stage(world, decoding="greedy", **changes) -> Generate:
    node = {
        "_target_": f"stillhouse.teachers.decoding.{decoding}",
        "_partial_": True,
        "max_new_tokens": 6,
        **DECODING[decoding],
    }
    settings = {
        "path": str(world.model),
        "data": world.node(),
        "decoding": node,
        "prompt_tokens": 5,
        "max_sequences": 20,
        "batch_size": 8,
        "seed": 0,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    return Generate(**(settings | changes))


def rows_of(context):
    return load_from_disk(str(context.output)).to_list()


@pytest.fixture
def teacher(language_world):
    model = load_causal_lm(
        str(language_world.model), dtype="float32", attn_implementation="sdpa", key="teacher"
    )
    return model.eval()


@torch.no_grad()
def greedy_by_hand(model, prompt, steps):
    ids = torch.tensor([prompt])
    for _ in range(steps):
        token = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if int(token) == END:
            break
    return ids[0, len(prompt) :].tolist()


def test_greedy_rows_are_the_likeliest_continuations_of_the_windows(
    language_world, stage_context, teacher
):
    context = stage_context("generate")
    result = stage(language_world)(context)
    windows = language_world.data().windows("train")
    rows = rows_of(context)
    assert [r["window"] for r in rows] == sorted(r["window"] for r in rows)
    assert len(rows) == result.metrics["sequences"] > 10
    for row in rows:
        window = windows.window(row["window"])
        text = [*window.input_ids[:1].tolist(), *window.labels.tolist()]
        assert row["prompt_ids"] == text[:5]
        assert row["completion_ids"] == greedy_by_hand(teacher, row["prompt_ids"], 6)
    data = language_world.data()
    assert rows[3]["completion"] == data.tokenizer.decode(rows[3]["completion_ids"])
    tokens = sum(len(r["completion_ids"]) for r in rows)
    assert result.metrics["completion_tokens"] == tokens


def test_prompts_of_other_lengths_in_a_batch_do_not_change_a_continuation(
    language_world, stage_context, teacher, monkeypatch
):
    """Padding on the left is masked: prompts of 2 to 9 tokens in one batch."""
    cut = module._cut

    def uneven(window: Window, prompt_tokens: int):
        return cut(window, 2 + window.index % 8)

    monkeypatch.setattr(module, "_cut", uneven)
    context = stage_context("generate")
    stage(language_world, batch_size=20)(context)
    rows = rows_of(context)
    assert len({len(r["prompt_ids"]) for r in rows}) > 4
    for row in rows:
        assert row["completion_ids"] == greedy_by_hand(teacher, row["prompt_ids"], 6)


@torch.no_grad()
def log_likelihood(model, row) -> float:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    ids = torch.tensor([prompt + completion])
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return float(log_p[places, ids[0, len(prompt) :]].sum())


def test_a_beam_finds_likelier_sequences_and_the_nearest_entry_is_nearer(
    language_world, stage_context, teacher
):
    found = {}
    for decoding in ("greedy", "beam", "nearest_in_beam"):
        context = stage_context(decoding)
        stage(language_world, decoding)(context)
        found[decoding] = rows_of(context)
    mean = {
        name: sum(log_likelihood(teacher, r) / len(r["completion_ids"]) for r in rows) / len(rows)
        for name, rows in found.items()
    }
    assert mean["beam"] > mean["greedy"] + 1e-3
    windows = language_world.data().windows("train")

    def nearness(row):
        return sentence_bleu(
            row["completion_ids"], windows.window(row["window"]).labels[4:].tolist()
        )

    near = {name: sum(map(nearness, rows)) for name, rows in found.items()}
    assert near["nearest_in_beam"] > near["beam"]
    pairs = zip(found["nearest_in_beam"], found["beam"], strict=True)
    assert all(nearness(a) >= nearness(b) for a, b in pairs)


def test_draws_depend_on_the_seed_and_follow_the_model(language_world, stage_context):
    found = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        context = stage_context(name)
        stage(language_world, "sampled", seed=seed)(context)
        found.append([r["completion_ids"] for r in rows_of(context)])
    assert found[0] == found[1] != found[2]


def test_a_killed_stage_goes_on_behind_its_last_whole_batch(language_world, stage_context):
    whole = stage_context("whole")
    stage(language_world, "sampled")(whole)
    parts = sorted((whole.scratch / "shards").iterdir())
    assert len(parts) == 3
    broken = stage_context("broken")
    (broken.scratch / "shards").mkdir()
    kept = broken.scratch / "shards" / parts[0].name
    # Marked, so that it shows that the batch was not made again; the second was cut short.
    marked = [[7, 7, 7]] * len(json.loads(parts[0].read_text()))
    kept.write_text(json.dumps(marked))
    (broken.scratch / "shards" / parts[1].name).write_text(parts[1].read_text()[:-20])
    stage(language_world, "sampled")(broken)
    expected, found = rows_of(whole), rows_of(broken)
    differing = [e["window"] for e, f in zip(expected, found, strict=True) if e != f]
    assert len(differing) == len(marked)
    assert sum(f["completion_ids"] == [7, 7, 7] for f in found) == len(marked)


def test_provenance_says_how_it_was_made(language_world, stage_context):
    context = stage_context("generate")
    stage(language_world, "sampled")(context)
    kept = json.loads((context.output / "provenance.json").read_text())
    assert kept["model"] == str(language_world.model)
    assert kept["decoding"]["temperature"] == 1.0
    assert kept["seed"] == 0
    assert kept["windows_sha256"] == language_world.data().windows("train").identity()


def test_prompts_longer_than_every_window_are_refused(language_world, stage_context):
    with pytest.raises(UserError) as caught:
        stage(language_world, prompt_tokens=25)(stage_context("generate"))
    assert str(caught.value) == (
        "stages.generate.prompt_tokens=25: no training window is longer; its length is "
        "data.sequence_length=24"
    )


def test_a_conversation_is_cut_before_its_first_learnt_token():
    document = TokenDocument([5, 6, 7, 8, 9], [False, False, False, True, True], follows_end=False)
    (window,) = TokenWindows([document], length=9, end_token=END, packing=False).in_order()
    prompt = module._cut(window, 2)
    assert prompt is not None
    assert (prompt.tokens, prompt.reference) == ([5, 6, 7], [8, 9])


def test_a_generated_corpus_learns_the_continuations_only(language_world, stage_context):
    context = stage_context("generate")
    stage(language_world)(context)
    corpus = generated(generated_path=str(context.output), corpus=king_james())
    assert corpus.documents("test") == king_james().documents("test")
    node = {"_target_": "stillhouse.data.corpora.generated.generated"}
    node |= {"generated_path": str(context.output), "corpus": language_world.data().corpus_node}
    data = language_world.data(corpus=node, max_train_documents=None)
    windows = data.windows("train").in_order()
    assert len(windows) == len(rows_of(context))
    for row, window in zip(rows_of(context), windows, strict=True):
        assert window.input_ids.tolist() == (row["prompt_ids"] + row["completion_ids"])[:-1]
        assert window.labels[window.learned].tolist() == row["completion_ids"]


def test_sequences_of_another_tokenizer_are_refused(language_world, stage_context):
    context = stage_context("generate")
    stage(language_world)(context)
    provenance = context.output / "provenance.json"
    content = json.loads(provenance.read_text())
    provenance.write_text(json.dumps({**content, "tokenizer_sha256": "0"}))
    node = {"_target_": "stillhouse.data.corpora.generated.generated"}
    node |= {"generated_path": str(context.output), "corpus": language_world.data().corpus_node}
    with pytest.raises(UserError, match="was made with another tokenizer"):
        language_world.data(corpus=node).windows("train")


def test_a_folder_without_sequences_is_refused(tmp_path):
    corpus = Corpus("a corpus", "none", {"train": [], "validation": [], "test": []})
    with pytest.raises(UserError) as caught:
        generated(generated_path=str(tmp_path), corpus=corpus)
    assert str(caught.value) == (
        f"data.corpus.generated_path={tmp_path}: there are no generated sequences that can be "
        "read; expected what the stage `generate` wrote"
    )
