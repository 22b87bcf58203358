"""The stage `rewrite`, and the corpus made of what it wrote."""

import json

import huggingface_hub
import pytest
import torch
from chats import CHATML, END, chat_tokenizer
from datasets import load_from_disk
from exercise_cases import (
    FORBIDDEN,
    GREEDY,
    PROMPT,
    checked_sums,
    node,
    save_chat_model,
    save_hub_model,
    save_trained_model,
    script,
    stage,
    sums,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.data.corpora.rewritten import rewritten
from stillhouse.data.language import LanguageData
from stillhouse.data.tasks.accepting import REASONS
from stillhouse.evaluation.exercises import nll_of_answers
from stillhouse.stages import rewrite as module
from stillhouse.students.blocks import without_other_blocks
from stillhouse.teachers.signals import model_identity
from stillhouse.tracking.work import WorkProgress

SAMPLED = {
    **GREEDY,
    "_target_": "stillhouse.teachers.decoding.sampled",
    "temperature": 1.0,
    "top_p": 1.0,
}


@pytest.fixture(scope="module")
def stylist(tmp_path_factory, tiny_llama):
    """A model that answers sixteen sums in words of its own."""
    return save_trained_model(tmp_path_factory.mktemp("stylist"), tiny_llama, count=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_llama):
    return save_chat_model(tmp_path_factory.mktemp("seed"), tiny_llama)


def rows_of(context):
    return load_from_disk(str(context.output)).to_list()


def test_the_model_sees_question_and_reference_by_its_chat_template(path, stage_context):
    """Greedy by hand on every rendered prompt alone: padding in a batch changes nothing."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    context = stage_context("rewrite")
    stage(path, GREEDY, exercises=node(count=20, context="Add."), opening="Well")(context)
    rows = rows_of(context)
    assert len(rows) == 20
    for row in rows:
        ids = tokenizer(
            f"<|im_start|>system\nAdd.{END}\n<|im_start|>user\n{row['instruction']} as "
            f"{row['reference']}{END}\n<|im_start|>assistant\nWell",
            return_tensors="pt",
        )["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                token = model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            if int(token) == tokenizer.eos_token_id:
                break
        tokens = ids[0, start:].tolist()
        assert row["generated"] == "Well" + tokenizer.decode(tokens).removesuffix(END)


def test_the_system_speaks_before_an_exercise_s_own_context(path):
    tokenizer = AutoTokenizer.from_pretrained(path)

    def system_turn(system, context):
        (first, _) = stage(path, GREEDY, system=system)._requests(
            sums(count=2, context=context), tokenizer, "place"
        )
        text = tokenizer.decode(first.tokens)
        assert text.endswith(f"<|im_start|>user\n0+1=? as 0+1=1{END}\n<|im_start|>assistant\n"), (
            "question and label as without"
        )
        return text.partition("<|im_start|>user")[0]

    assert system_turn(None, None) == ""
    assert system_turn(None, "Add.") == f"<|im_start|>system\nAdd.{END}\n"
    assert system_turn("Be exact.", None) == f"<|im_start|>system\nBe exact.{END}\n"
    assert system_turn("Be exact.", "Add.") == f"<|im_start|>system\nBe exact.\n\nAdd.{END}\n"


def test_a_seed_s_own_answers_are_likelier_than_labels_to_it_and_to_what_pruning_left(
    stylist, stage_context
):
    """End to end with a model that rewrites; the mean NLL a token is the method's seventh check."""
    context = stage_context("rewrite")
    metrics = stage(stylist, {**GREEDY, "max_new_tokens": 12})(context).metrics
    rows = rows_of(context)
    assert [r["target"] for r in rows[:16]] == [f"It is {n + 1}." for n in range(16)]
    assert metrics["accepted"] == sum(r["accepted"] for r in rows) >= 16
    assert metrics["accepted_nll"] < 0.1 < 1 < metrics["replaced_nll"]
    assert "warning" not in context.console.file.getvalue()
    tokenizer = AutoTokenizer.from_pretrained(stylist)
    seed = AutoModelForCausalLM.from_pretrained(stylist)
    exercises = sums(count=20).splits["train"][:16]
    own, labels = (
        nll_of_answers(
            without_other_blocks(seed, [0, 2]).eval(),
            tokenizer,
            [e.answered(row[column]) for e, row in zip(exercises, rows[:16], strict=True)],
            batch_size=8,
        )
        for column in ("target", "reference")
    )
    assert own < labels
    corpus = rewritten(rewritten_path=str(context.output), exercises=sums(count=20))
    learnt = [document.messages[-1]["content"] for document in corpus.documents("train")]
    assert learnt == [r["generated"] if r["accepted"] else r["reference"] for r in rows]


@pytest.mark.parametrize(("of_labels", "warned"), [(1.9, True), (2.0, False), (2.1, False)])
def test_answers_that_are_less_likely_than_labels_are_warned_of(
    path, stage_context, monkeypatch, of_labels, warned
):
    nats = iter([2.0, of_labels])
    monkeypatch.setattr(module, "nll_of_answers", lambda *_, **__: next(nats))
    context = stage_context("rewrite")
    stage(path, script(path, {}))(context)
    said = " ".join(context.console.file.getvalue().split())
    warning = (
        " warning: rewrite: the model's own answers are less likely to it than the labels that "
        "they replace; it may not understand what it is asked; change stages.rewrite.prompt"
    )
    assert said.endswith(
        f"rewrite: accepted answers 2.000 nats a token, their labels {of_labels:.3f}"
        f"{warning if warned else ''}"
    )


def test_every_target_is_the_answer_or_the_label_and_all_are_counted(path, stage_context):
    exercises = sums(count=20).splits["train"]
    # Rightly in other words, wrongly, and without an end.
    answers = {e.answer: f"That is {n + 1}{END}" for n, e in enumerate(exercises) if n < 8}
    answers |= {e.answer: f"That is 7{END}" for n, e in enumerate(exercises) if 8 <= n < 14}
    answers |= {e.answer: "That is" for n, e in enumerate(exercises) if n >= 14}
    context = stage_context("rewrite")
    metrics = stage(path, script(path, answers))(context).metrics
    rows = rows_of(context)
    assert [r["instruction"] for r in rows] == [e.instruction for e in exercises]
    for row, exercise in zip(rows, exercises, strict=True):
        assert row["reference"] == exercise.answer
        assert row["target"] == (row["generated"] if row["accepted"] else row["reference"])
        assert row["accepted"] is (row["reason"] is None)
        assert exercise.check is None or exercise.check(row["target"])
    # Of 8 to 13, 9 and 12 are open-ended: what cannot be checked is not wrong.
    assert [n for n, row in enumerate(rows) if row["accepted"]] == [*range(8), 9, 12]
    assert (metrics["exercises"], metrics["accepted"], metrics["accepted_fraction"]) == (
        20,
        10,
        0.5,
    )
    kept = {n: c for n, c in metrics.items() if n.startswith("kept_label_")}
    assert set(kept) == {f"kept_label_{reason}" for reason in REASONS}
    assert {n: c for n, c in kept.items() if c} == {"kept_label_wrong": 4, "kept_label_limit": 6}
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert metrics["generated_tokens"] == sum(map(len, tokenizer([*answers.values()])["input_ids"]))
    assert "rewrite: 10 of 20 accepted; labels kept: 6 limit, 4 wrong\n" in (
        context.console.file.getvalue()
    )


def test_accepted_answers_and_their_labels_are_weighed_as_they_are_learnt(path, stage_context):
    """Nats a token by hand: asked normally, without the reference, the end token included."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    exercises = sums(count=20).splits["train"]
    answers = {e.answer: f"That is {n + 1}{END}" for n, e in enumerate(exercises) if n < 8}
    context = stage_context("rewrite")
    metrics = stage(path, script(path, answers), dtype="float64", batch_size=3)(context).metrics
    accepted = [row for row in rows_of(context) if row["accepted"]]
    # An open-ended sum is answered by nonsense, which nothing speaks against.
    assert len(accepted) == 8 + 4
    for name, column in (("accepted_nll", "generated"), ("replaced_nll", "reference")):
        nats, count = 0.0, 0
        for row in accepted:
            question = f"<|im_start|>user\n{row['instruction']}{END}\n<|im_start|>assistant\n"
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(f"{question}{row[column]}{END}")["input_ids"]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            said = log_probs.gather(1, ids[0, 1:, None])[start - 1 :]
            nats, count = nats - said.sum().item(), count + len(said)
        assert metrics[name] == pytest.approx(nats / count, rel=1e-9)
    assert metrics["accepted_nll"] != pytest.approx(metrics["replaced_nll"], rel=1e-3)


def test_nothing_is_weighed_where_nothing_is_accepted(path, stage_context):
    context = stage_context("rewrite")
    metrics = stage(path, script(path, {}), exercises=node("checked_sums", count=2))(
        context
    ).metrics
    assert metrics["accepted"] == 0
    assert "accepted_nll" not in metrics
    assert " ".join(context.console.file.getvalue().split()).endswith(
        "rewrite: 0 of 1 accepted; labels kept: 1 wrong "
        "warning: rewrite: no answer was accepted, so all targets are labels, and to learn them is "
        "SFT; the reasons stand above; change stages.rewrite.prompt or decoding, or take a "
        "stronger model"
    )


def test_a_label_beyond_the_positions_is_not_weighed(tmp_path, stage_context, tiny_llama):
    """The prompt just fits; the label with what closes its turn does not."""
    tokenizer = chat_tokenizer(CHATML)
    question = f"<|im_start|>user\n1+1=?so 1+1=2{END}\n<|im_start|>assistant\n"
    positions = len(tokenizer(question)["input_ids"]) + 1
    exercises = node("checked_sums", count=2)
    for room, weighed in ((0, False), (2, True)):
        short = save_chat_model(
            tmp_path / f"short {room}", tiny_llama, max_position_embeddings=positions + room
        )
        decoding = script(short, {"so 1+1=2": f"2{END}"}) | {"max_new_tokens": 1}
        changes = {"exercises": exercises, "prompt": "{instruction}{reference}"}
        metrics = stage(short, decoding, **changes)(stage_context(f"rewrite {room}")).metrics
        assert metrics["accepted"] == 1
        assert ("accepted_nll" in metrics) is weighed


def test_a_prompt_without_room_for_its_answer_keeps_its_label(tmp_path, tiny_llama, stage_context):
    short = save_chat_model(tmp_path / "short", tiny_llama, max_position_embeddings=54)
    tokenizer = AutoTokenizer.from_pretrained(short)
    context = stage_context("rewrite")
    labels = [e.answer for e in sums(count=20).splits["train"]]
    answers = {label: f"It is {n + 1}.{END}" for n, label in enumerate(labels)}
    metrics = stage(short, script(short, answers))(context).metrics
    for n, row in enumerate(rows_of(context)):
        asked = PROMPT.format(instruction=row["instruction"], reference=row["reference"])
        text = f"<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n"
        too_long = len(tokenizer(text)["input_ids"]) + 12 > 54
        assert row["reason"] == ("prompt_too_long" if too_long else None)
        assert row["generated"] == (None if too_long else f"It is {n + 1}.")
        assert not too_long or row["target"] == row["reference"]
    asked_of_the_model = list((context.scratch / "shards").iterdir())
    done = sum(len(json.loads(part.read_text())) for part in asked_of_the_model)
    assert done == 20 - metrics["kept_label_prompt_too_long"]
    assert 3 < metrics["kept_label_prompt_too_long"] < 17


def windows(path, corpus):
    data = LanguageData(
        0,
        corpus=corpus,
        tokenizer_path=str(path),
        sequence_length=64,
        batch_size=4,
        evaluation_batch_size=4,
        packing=False,
    )
    return data.windows("train")


def test_a_generator_of_nonsense_gives_the_labels_and_the_training_of_sft(path, stage_context):
    context = stage_context("rewrite")
    exercises = node("checked_sums", count=30)
    stage(path, script(path, {}), exercises=exercises)(context)
    labels = [e.answer for e in checked_sums(count=30).splits["train"]]
    assert [r["target"].encode() for r in rows_of(context)] == [y.encode() for y in labels]
    folder = "stillhouse.data.corpora"
    sft = {"_target_": f"{folder}.answered.answered", "exercises": exercises}
    own = {"_target_": f"{folder}.rewritten.rewritten", "exercises": exercises}
    own["rewritten_path"] = str(context.output)
    assert windows(path, own).identity() == windows(path, sft).identity()


def test_a_rewritten_corpus_asks_normally_and_shows_no_reference(path, stage_context):
    exercises = sums(count=20, context="Add.")
    train = exercises.splits["train"]
    answers = {e.answer: f"That is {n + 1}{END}" for n, e in enumerate(train)}
    context = stage_context("rewrite")
    stage(path, script(path, answers), exercises=node(count=20, context="Add."))(context)
    corpus = rewritten(rewritten_path=str(context.output), exercises=exercises)
    for n, (document, exercise) in enumerate(zip(corpus.documents("train"), train, strict=True)):
        assert document.messages == [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": exercise.instruction},
            {"role": "assistant", "content": f"That is {n + 1}"},
        ]
        assert document.place == f"data.corpus.rewritten_path={context.output}, row {n}"
    for split in ("validation", "test"):
        assert corpus.documents(split) == [e.answered(e.answer) for e in exercises.splits[split]]
    assert (corpus.name, corpus.licence) == ("sums, rewritten by a model", "CC0")


def test_a_killed_stage_goes_on_behind_its_last_whole_batch(path, stage_context):
    whole = stage_context("whole")
    stage(path, SAMPLED)(whole)
    parts = sorted((whole.scratch / "shards").iterdir())
    assert len(parts) == 3
    broken = stage_context("broken")
    (broken.scratch / "shards").mkdir()
    for part in parts:
        (broken.scratch / "shards" / part.name).write_text(part.read_text())
    # One was never written and one was cut short; the last is marked, to show that it is kept.
    (broken.scratch / "shards" / parts[0].name).unlink()
    (broken.scratch / "shards" / parts[1].name).write_text(parts[1].read_text()[:-20])
    again = stage_context("again")
    stage(path, SAMPLED)(again)
    stage(path, SAMPLED)(broken)
    assert rows_of(broken) == rows_of(whole) == rows_of(again)

    end = AutoTokenizer.from_pretrained(path).eos_token_id
    count = len(json.loads(parts[2].read_text()))
    (broken.scratch / "shards" / parts[2].name).write_text(json.dumps([[70, end]] * count))
    kept = stage_context("broken")
    metrics = stage(path, SAMPLED)(kept).metrics
    differing = [a != b for a, b in zip(rows_of(kept), rows_of(whole), strict=True)]
    assert sum(differing) == count
    assert metrics["tokens_per_s"] == 0.0, "nothing was generated anew"


def test_tokens_a_second_are_of_the_time_that_it_took(path, stage_context, monkeypatch):
    monkeypatch.setattr(WorkProgress, "seconds", lambda self: 8.0)
    context = stage_context("rewrite")
    metrics = stage(path, SAMPLED)(context).metrics
    assert metrics["tokens_per_s"] == metrics["generated_tokens"] / 8 > 1
    assert f"  {metrics['tokens_per_s']:.0f} tokens/s\n" in context.console.file.getvalue()


def test_draws_depend_on_the_seed(path, stage_context):
    found = []
    for name, seed in (("one", 0), ("other", 1)):
        context = stage_context(name)
        stage(path, SAMPLED, seed=seed)(context)
        found.append([r["generated"] for r in rows_of(context)])
    assert found[0] != found[1]


def test_some_exercises_are_spread_evenly(path, stage_context):
    context = stage_context("rewrite")
    stage(path, script(path, {}), max_exercises=4)(context)
    assert [r["instruction"] for r in rows_of(context)] == ["0+1=?", "5+1=?", "10+1=?", "15+1=?"]


def test_provenance_says_how_it_was_made(path, stage_context):
    context = stage_context("rewrite")
    stage(path, SAMPLED, opening="Well", system="Be exact.", seed=3)(context)
    kept = json.loads((context.output / "provenance.json").read_text())
    assert (kept["model"], kept["model_sha256"]) == (str(path), model_identity(str(path)))
    assert kept["system"] == "Be exact."
    assert kept["exercises_sha256"] == sums(count=20).identity("train")
    assert kept["exercises_sha256"] != sums(count=19).identity("train")
    assert (kept["prompt"], kept["opening"], kept["seed"]) == (PROMPT, "Well", 3)
    assert (kept["decoding"], kept["forbidden"]) == (SAMPLED, FORBIDDEN)


def test_a_model_of_the_hub_is_named_with_its_commit(
    tmp_path, tiny_llama, monkeypatch, stage_context
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    save_hub_model(tmp_path, "org/tiny", "ab" * 20, tiny_llama)
    context = stage_context("rewrite")
    stage("org/tiny", GREEDY)(context)
    kept = json.loads((context.output / "provenance.json").read_text())
    assert {n: v for n, v in kept.items() if n.startswith("model")} == {
        "model": "org/tiny",
        "model_revision": "ab" * 20,
    }


def test_the_columns_have_their_types_when_one_is_null_everywhere(path, stage_context):
    context = stage_context("rewrite")
    stage(path, script(path, {}, f"It is 5.{END}"))(context)
    features = load_from_disk(str(context.output)).features
    assert {n: f.dtype for n, f in features.items()} == {
        "task": "string",
        "instruction": "string",
        "context": "string",
        "reference": "string",
        "generated": "string",
        "target": "string",
        "accepted": "bool",
        "reason": "string",
    }


def test_a_template_may_hold_braces_and_so_may_the_texts(path, stage_context):
    context = stage_context("rewrite")
    stage(path, script(path, {}), prompt="{{x}} {instruction} {reference}")(context)
    assert len(rows_of(context)) == 20
