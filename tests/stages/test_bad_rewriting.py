"""Rewriting that cannot be done: one line says why."""

import pytest
from exercise_cases import GREEDY, save_chat_model, script, stage, sums
from transformers import AutoTokenizer

from stillhouse.data.corpora.rewritten import rewritten
from stillhouse.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_llama):
    return save_chat_model(tmp_path_factory.mktemp("seed"), tiny_llama)


WANTED = "expected {instruction} and {reference}, where an exercise's texts go"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"prompt": "Rewrite:\n{instruction}"},
            "stages.rewrite.prompt='Rewrite:\\n{instruction}': the template has no {reference}; "
            f"{WANTED}",
        ),
        (
            {"prompt": "{reference}"},
            f"stages.rewrite.prompt='{{reference}}': the template has no {{instruction}}; {WANTED}",
        ),
        (
            {"prompt": "{instruction} {reference} {label}"},
            "stages.rewrite.prompt='{instruction} {reference} {label}': the template asks for "
            f"{{label}}; {WANTED}; write other braces twice",
        ),
        (
            {"prompt": "{instruction} {reference} {"},
            "stages.rewrite.prompt='{instruction} {reference} {': Single '{' encountered in format "
            f"string; {WANTED}; write other braces twice",
        ),
        (
            {"forbidden": ["a", ""]},
            "stages.rewrite.forbidden=['a', '']: an empty phrase stands in every answer; drop it",
        ),
    ],
)
def test_values_that_cannot_be_used_are_refused(path, stage_context, changes, line):
    with pytest.raises(UserError) as caught:
        stage(path, GREEDY, **changes)(stage_context("rewrite"))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        (
            "chat_template",
            ", sum 0: the tokenizer {path} has no chat template, by which a question is asked; "
            "name a model whose tokenizer has one",
        ),
        (
            "eos_token",
            ": the tokenizer {path} has no end token, by which an answer is known to be whole; "
            "name a model whose tokenizer has one",
        ),
    ],
)
def test_a_tokenizer_that_cannot_ask_is_refused(
    tmp_path, tiny_llama, stage_context, attribute, words
):
    mute = save_chat_model(tmp_path / "mute", tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(mute)
    setattr(tokenizer, attribute, None)
    (mute / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(mute)
    with pytest.raises(UserError) as caught:
        stage(mute, GREEDY)(stage_context("rewrite"))
    assert str(caught.value) == f"stages.rewrite.path={mute}{words.format(path=mute)}"


def test_a_template_that_closes_answers_otherwise_is_refused(tmp_path, tiny_llama, stage_context):
    """As Gemma's: the end token ends the text, another one the turn, and no answer seems whole."""
    turns = save_chat_model(tmp_path / "turns", tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(turns)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<end_of_turn>")
    tokenizer.save_pretrained(turns)
    with pytest.raises(UserError) as caught:
        stage(turns, GREEDY)(stage_context("rewrite"))
    assert str(caught.value) == (
        f"stages.rewrite.path={turns}: the chat template of {turns} closes an answer with "
        "'<end_of_turn>' and not with the end token '<|im_end|>', by which it is known to be "
        "whole; make the token of the template the eos_token of the tokenizer and save it"
    )


def test_a_template_that_refuses_a_question_is_named(tmp_path, tiny_llama, stage_context):
    strict = save_chat_model(tmp_path / "strict", tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tokenizer.save_pretrained(strict)
    with pytest.raises(UserError) as caught:
        stage(strict, GREEDY)(stage_context("rewrite"))
    assert str(caught.value) == (
        f"stages.rewrite.path={strict}, sum 0: the tokenizer {strict} has a chat template that "
        "refuses the question: no system role; mend the exercise, or name a model whose template "
        "takes it"
    )


def test_answers_of_other_exercises_are_refused(path, stage_context):
    context = stage_context("rewrite")
    stage(path, script(path, {}))(context)
    with pytest.raises(UserError) as caught:
        rewritten(rewritten_path=str(context.output), exercises=sums(count=21))
    assert str(caught.value) == (
        f"data.corpus.rewritten_path={context.output}: the answers are of other training exercises "
        "than data.corpus.exercises; name the same ones in both"
    )


def test_a_folder_without_rewritten_answers_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        rewritten(rewritten_path=str(tmp_path), exercises=sums(count=2))
    assert str(caught.value) == (
        f"data.corpus.rewritten_path={tmp_path}: there are no rewritten answers that can be read; "
        "expected what the stage `rewrite` wrote"
    )
