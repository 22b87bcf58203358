"""Conversations as tokens, through the tokenizer's own chat template.

What is learnt is found in the characters of the rendered conversation and never by token ids: an
end token that is the pad token too stays learnt.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stillhouse.data.documents import Conversation, Message, TokenDocument
from stillhouse.errors import UserError

Stretch = tuple[int, int]

GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


def conversation_as_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> TokenDocument:
    """Render a conversation and learn the assistant's tokens.

    Of an answer, all is learnt up to the token that closes the turn, and this token too, so that a
    student learns to stop. Headers, the other turns and white space between turns are not.

    Raises:
        UserError: for a tokenizer without a chat template or without offsets, a template that
            refuses the conversation or rewrites its earlier turns, and a conversation without an
            answer.
    """
    template = _template(conversation, tokenizer)
    answers = answers_of(conversation)
    try:
        if GENERATION_MARK.search(template):
            text, turns = _marked(conversation, tokenizer, template)
        else:
            text, turns = _compared(conversation, tokenizer, answers)
    except TemplateError as error:
        raise UserError(
            f"{conversation.place}: the chat template of "
            f"data.tokenizer_path={tokenizer.name_or_path} refuses the conversation: {error}; "
            "mend the record, or name a tokenizer whose template takes it"
        ) from error
    of_answer = bytearray(len(text))
    for start, stop in turns:
        stop = _end_of_turn(text, start, stop, str(tokenizer.eos_token))
        of_answer[start:stop] = b"\1" * (stop - start)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token that begins before an answer is the header's. Some tokenizers leave white space out of
    # their offsets; a token of nothing else is then empty and lies behind its last character.
    learned = [
        bool(of_answer[max(0, min(start, stop - 1))]) for start, stop in encoded["offset_mapping"]
    ]
    return TokenDocument(encoded["input_ids"], [False, *learned[1:]], follows_end=False)


def answers_of(conversation: Conversation) -> list[int]:
    """Return which messages are the assistant's.

    Raises:
        UserError: when none is.
    """
    answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if not answers:
        raise UserError(
            f"{conversation.place}: no message has the role 'assistant'; expected an answer to "
            "learn; add one, or drop the record"
        )
    return answers


def _template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer_path={tokenizer.name_or_path}: the tokenizer gives no offsets, by "
            f"which the answers in {conversation.place} are found; name one with a tokenizer.json"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"data.tokenizer_path={tokenizer.name_or_path}: the tokenizer has no chat template, "
            f"which {conversation.place} needs; name a tokenizer with one, or give records with "
            "a text"
        ) from error


def _marked(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[Stretch]]:
    """Return the rendering and what the template marks as generated.

    The library's token mask comes from the same stretches; but it loses the last bytes of a
    character that is several tokens, so the stretches themselves are taken.
    """
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    # Annotated as a string, but it returns two lists.
    rendered: Any = render_jinja_template(
        conversations=[_plain(conversation.messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **names,
    )
    (text,), (stretches,) = rendered
    return text, stretches


def _compared(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, answers: Sequence[int]
) -> tuple[str, list[Stretch]]:
    """Return the rendering, and what every answer adds to the prompt before it."""
    messages = conversation.messages
    if answers[0] == 0:
        raise UserError(
            f"{conversation.place}: the first message is the assistant's; expected a message "
            "before it, to which it answers; add one, or drop it"
        )
    whole = _render(messages, tokenizer)
    turns: list[Stretch] = []
    for i in answers:
        prompt = _render(messages[:i], tokenizer, add_generation_prompt=True)
        answered = _render(messages[: i + 1], tokenizer)
        subject = (
            f"{conversation.place}: the chat template of "
            f"data.tokenizer_path={tokenizer.name_or_path}"
        )
        if not whole.startswith(answered):
            raise UserError(
                f"{subject} rewrites earlier turns, so that the answer in message {i + 1} cannot "
                "be told from them; mark answers in the template with {% generation %}, or give "
                "each answer a record of its own"
            )
        if not answered.startswith(prompt):
            raise UserError(
                f"{subject} begins the answer in message {i + 1} otherwise than its generation "
                "prompt, so that it cannot be told from it; mark answers in the template with "
                "{% generation %}"
            )
        turns.append((len(prompt), len(answered)))
    return whole, turns


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        _plain(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [dict(message) for message in messages]


def _end_of_turn(text: str, start: int, stop: int, end: str) -> int:
    """Return where an answer ends: behind its end token, before the white space that follows."""
    # Marks often leave out the end token, and a student that never sees it would not stop.
    if text.startswith(end, stop):
        return stop + len(end)
    return start + len(text[start:stop].rstrip())
