"""Documents: what a corpus holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages in turn; a model learns the assistant's.

    Attributes:
        messages: each with `role` (system, user, assistant, …) and `content`.
        place: file and line that it was read from, for messages of errors.
    """

    messages: Sequence[Message]
    place: str


@dataclass(frozen=True)
class TokenDocument:
    """A document as tokens.

    Attributes:
        tokens: all ids, special ones included.
        learned: whether each of them is learnt, as the label of the token before it.
        follows_end: whether an end token has to stand before it, from which its first token is
            predicted; a document that starts by itself needs none, and its first token is not
            learnt.
    """

    tokens: Sequence[int]
    learned: Sequence[bool]
    follows_end: bool


Document = str | Conversation | TokenDocument
