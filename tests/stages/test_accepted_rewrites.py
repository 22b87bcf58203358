"""Which answers stand in place of their labels, and how the stage `rewrite` reads them."""

import pytest
from chats import END
from datasets import load_from_disk
from exercise_cases import node, save_chat_model, script, stage, sums
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillhouse.data.tasks.accepting import REASONS, reason_against
from stillhouse.stages import rewrite as module


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_llama):
    return save_chat_model(tmp_path_factory.mktemp("seed"), tiny_llama)


def answered_as(path, stage_context, answer, **changes):
    """Return the row and the metrics of one exercise, sum 1, that is answered so."""
    context = stage_context("rewrite")
    decoding = script(path, {"so 1+1=2": answer})
    result = stage(path, decoding, exercises=node("checked_sums", count=2), **changes)(context)
    (row,) = load_from_disk(str(context.output)).to_list()
    return row, result.metrics


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (f"It is 2.{END}", None),
        (f" \nIt is 2.\n{END}", None),
        ("It is 2.", "limit"),
        (f"It <|im_start|>is 2.{END}", "not_text"),
        (f" \n{END}", "empty"),
        (END, "empty"),
        (f"As the Reference ANSWER says, 2.{END}", "forbidden_phrase"),
        (f" Your TURN: 2.{END}", "forbidden_start"),
        (f"Now it is your turn, 2.{END}", None),
        (f"It is 3.{END}", "wrong"),
        (f"It is not known.{END}", "wrong"),
    ],
)
def test_what_is_accepted_and_why_a_label_is_kept(path, stage_context, answer, reason):
    row, metrics = answered_as(path, stage_context, answer)
    text = answer.removesuffix(END)
    expected = "so 1+1=2" if reason else text
    assert (row["reason"], row["accepted"]) == (reason, reason is None)
    assert (row["target"], row["generated"]) == (expected, text)
    counted = {n.removeprefix("kept_label_"): c for n, c in metrics.items() if n.startswith("kept")}
    assert counted == {r: int(r == reason) for r in REASONS}


def test_half_a_character_is_not_text(path):
    """Broken bytes would be learnt as another character than the one that was begun."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(f"2 é{END}")["input_ids"]
    exercise = sums(count=2).splits["train"][0]
    reader = module._Reader(tokenizer, "")
    reasons = [
        reason_against(reader(t), exercise, forbidden=[], forbidden_start="")
        for t in (tokens, [*tokens[:-2], tokens[-1]])
    ]
    assert reasons == [None, "not_text"]


def test_a_space_behind_the_opening_is_kept_by_decoders_that_drop_the_first():
    """As SentencePiece's: a text's first space is the tokenizer's own, and dropped."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", END], show_progress=False)
    pieces.train_from_iterator(["Step by step. First we add."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=END, unk_token="<unk>")
    tokens = tokenizer("Step by step. First we add.")["input_ids"]
    opening = tokenizer("Step by step.")["input_ids"]
    assert tokens[: len(opening)] == opening
    written = module._Reader(tokenizer, "Step by step.")([*tokens[len(opening) :], 1])
    assert written.text == "Step by step. First we add."
    alone = module._Reader(tokenizer, "")([*tokens, 1])
    assert alone.text == "Step by step. First we add."
    assert alone.ended


@pytest.mark.parametrize(
    ("opening", "answer", "target", "reason"),
    [
        ("Well,", f" it is 2.{END}", "Well, it is 2.", None),
        ("It is 2", f".{END}", "It is 2.", None),
        ("My ", f"response: 2.{END}", "so 1+1=2", "forbidden_phrase"),
        ("Well, ", f"Your turn: 2.{END}", "so 1+1=2", "forbidden_start"),
        ("Your ", f"turn: 2.{END}", "so 1+1=2", "forbidden_start"),
        ("Well, ", f"it is your turn: 2.{END}", "Well, it is your turn: 2.", None),
        ("2", END, "so 1+1=2", "empty"),
    ],
)
def test_an_opening_belongs_to_the_answer_and_is_judged_with_it(
    path, stage_context, opening, answer, target, reason
):
    row, _ = answered_as(path, stage_context, answer, opening=opening)
    assert (row["target"], row["reason"]) == (target, reason)


@pytest.mark.parametrize("written", ["'", "\u2019"])
@pytest.mark.parametrize("forbidden", ["'", "\u2019"])
def test_an_apostrophe_is_one_however_it_is_set(path, stage_context, written, forbidden):
    answer = f"Now it{written}s your turn: 2.{END}"
    phrase = f"now it{forbidden}s your turn"
    assert answered_as(path, stage_context, answer, forbidden=[phrase])[0]["reason"] == (
        "forbidden_phrase"
    )
    start = {"forbidden": [], "forbidden_start": phrase}
    assert answered_as(path, stage_context, answer, **start)[0]["reason"] == "forbidden_start"
