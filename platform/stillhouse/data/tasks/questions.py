"""Questions as tokens, by the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stillhouse.data.documents import Message
from stillhouse.errors import UserError


def end_and_pad(tokenizer: PreTrainedTokenizerBase, *, place: str) -> tuple[int, int]:
    """Return the tokens that end an answer and fill a batch; the end token where none pads.

    Raises:
        UserError: for a tokenizer without an end token, or whose chat template closes an answer
            with something else.
    """
    special: Any = tokenizer
    end, pad = special.eos_token_id, special.pad_token_id
    if end is None:
        raise UserError(
            f"{place}: the tokenizer {tokenizer.name_or_path} has no end token, by which an answer "
            "is known to be whole; name a model whose tokenizer has one"
        )
    if tokenizer.chat_template is not None:
        _check_that_it_closes_answers(tokenizer, str(special.eos_token), place)
    return end, end if pad is None else pad


def _check_that_it_closes_answers(tokenizer: PreTrainedTokenizerBase, end: str, place: str) -> None:
    answer = "an answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # questions themselves say what such a template refuses
        return
    assert isinstance(text, str)
    closing = text.rpartition(answer)[2].strip()
    if not closing.startswith(end):
        raise UserError(
            f"{place}: the chat template of {tokenizer.name_or_path} closes an answer with "
            f"{closing!r} and not with the end token {end!r}, by which it is known to be whole; "
            "make the token of the template the eos_token of the tokenizer and save it"
        )


def question_tokens(
    question: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, opening: str, place: str
) -> list[int]:
    """Return the tokens of a question, up to where its answer begins.

    Args:
        question: the messages.
        tokenizer: the model's own.
        opening: the beginning of the answer that the model goes on from; may be empty.
        place: of the question, for messages.

    Raises:
        UserError: for a tokenizer without a chat template, or one that refuses the question.
    """
    subject = f"{place}: the tokenizer {tokenizer.name_or_path}"
    if tokenizer.chat_template is None:
        raise UserError(
            f"{subject} has no chat template, by which a question is asked; name a model whose "
            "tokenizer has one"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in question], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise UserError(
            f"{subject} has a chat template that refuses the question: {error}; mend the exercise, "
            "or name a model whose template takes it"
        ) from error
    assert isinstance(text, str)
    # The template has written the special tokens already.
    return tokenizer(text + opening, add_special_tokens=False, verbose=False)["input_ids"]
