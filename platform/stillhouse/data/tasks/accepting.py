"""Whether a model's own answer may stand in place of the label.

Section 3 of "Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning" (Yang et
al., arXiv 2402.13669), as "Self-Data Distillation for Recovering Quality in Pruned Large Language
Models" (Thangarasa et al., arXiv 2410.09982) takes it over:

    accept = no forbidden phrase  AND  (no checkable answer  OR  extract(ŷ) == extract(y))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.data.tasks.exercises import Exercise

TOO_LONG, LIMIT, NOT_TEXT, EMPTY = "prompt_too_long", "limit", "not_text", "empty"
PHRASE, START, WRONG = "forbidden_phrase", "forbidden_start", "wrong"
REASONS = (TOO_LONG, LIMIT, NOT_TEXT, EMPTY, PHRASE, START, WRONG)

# What a decoder writes for bytes that are no character.
BROKEN = "\ufffd"
# The apostrophe of typesetting, which chat models write.
APOSTROPHE = "\u2019"


@dataclass(frozen=True)
class Written:
    """What a model wrote for one exercise.

    Attributes:
        opening: the beginning that it was given.
        continuation: what it wrote itself, without the end token.
        ended: whether it came to an end by itself.
        has_special_token: whether it wrote one before the end.
    """

    opening: str
    continuation: str
    ended: bool
    has_special_token: bool

    @property
    def text(self) -> str:
        """The whole answer."""
        return self.opening + self.continuation


def reason_against(
    written: Written, exercise: Exercise, *, forbidden: Sequence[str], forbidden_start: str
) -> str | None:
    """Return why an answer is not accepted, the first of `REASONS` that holds; None if it is.

    Args:
        written: the answer.
        exercise: what it answers.
        forbidden: phrases that speak of the reference or of the task, in any case.
        forbidden_start: how neither the text nor what the model wrote of it may begin, in any
            case; empty forbids nothing.
    """
    if not written.ended:
        return LIMIT
    if written.has_special_token or BROKEN in written.continuation:
        return NOT_TEXT
    if not written.continuation.strip():
        return EMPTY
    text, own = _plain(written.text), _plain(written.continuation)
    if any(_plain(phrase) in text for phrase in forbidden):
        return PHRASE
    # Behind an opening no text begins with anything else.
    if forbidden_start and any(t.lstrip().startswith(_plain(forbidden_start)) for t in (text, own)):
        return START
    if exercise.check is not None and not exercise.check(written.text):
        return WRONG
    return None


def _plain(text: str) -> str:
    """Return a text as phrases are looked for in it: in no case, with the keyboard's apostrophe."""
    return text.casefold().replace(APOSTROPHE, "'")
