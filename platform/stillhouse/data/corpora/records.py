"""From records of any source to documents."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.data.conversations import answers_of
from stillhouse.data.documents import Conversation, Document, Message
from stillhouse.errors import UserError, did_you_mean

PROMPT, COMPLETION = "prompt", "completion"
ROLES = ("system", "user", "assistant", "tool")
JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class RecordKeys:
    """Where a record holds its document.

    A record is the first of three that it has: messages, a list of objects with `role` and
    `content`; a text; `prompt` and `completion`, two strings, which become a question of the user
    and the assistant's answer. A key whose value is null counts as absent, and other keys are left
    out.

    Attributes:
        text: key of a text.
        messages: key of messages.
    """

    text: str
    messages: str

    def columns(self, names: Sequence[str]) -> list[str]:
        """Return the columns of a table that make its documents; all where none do."""
        wanted = (self.messages, self.text, PROMPT, COMPLETION)
        whole = self.messages in names or self.text in names or {PROMPT, COMPLETION} <= set(names)
        return [n for n in names if n in wanted] if whole else list(names)

    def document(self, record: object, place: str) -> Document:
        """Return the document of a record that was read at `place`.

        Raises:
            UserError: for a record that is none of the three, or has a value that cannot be used.
        """
        if not isinstance(record, Mapping):
            raise UserError(
                f"{place}: the record is {kind_of(record)}; expected an object with {self._choices}"
            )
        present = {str(key): value for key, value in record.items() if value is not None}
        if self.messages in present:
            return _conversation(present[self.messages], self.messages, place)
        if self.text in present:
            return filled(present[self.text], repr(self.text), place)
        if PROMPT in present and COMPLETION in present:
            prompt = string(present[PROMPT], repr(PROMPT), place)
            answer = filled(present[COMPLETION], repr(COMPLETION), place)
            turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
            return Conversation(turns, place)
        near = did_you_mean(self.text, present) or did_you_mean(self.messages, present)
        raise UserError(
            f"{place}: the record has none of {self._choices}; it has {listed(present)}; name the "
            f"right key with data.corpus.text_key=<key> or data.corpus.messages_key=<key>{near}"
        )

    @property
    def _choices(self) -> str:
        return f"{self.messages!r}, {self.text!r}, or {PROMPT!r} and {COMPLETION!r}"


def _conversation(messages: object, key: str, place: str) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        found = "an empty list" if messages == [] else kind_of(messages)
        raise UserError(f"{place}: {key!r} is {found}; expected a list of messages")
    read = [_message(message, f"{key}[{i}]", place) for i, message in enumerate(messages)]
    conversation = Conversation(read, place)
    answers_of(conversation)
    return conversation


def _message(message: Any, name: str, place: str) -> Message:
    """Read a message; what an assistant says is not empty, what it hears may be."""
    if not isinstance(message, Mapping):
        raise UserError(
            f"{place}: {name} is {kind_of(message)}; expected an object with 'role' and 'content'"
        )
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f"{place}: {name} has no {key!r}; it has {listed(message)}")
    role = string(message["role"], f"{name}.role", place)
    if role not in ROLES:
        raise UserError(
            f"{place}: {name}.role is {role!r}; expected {', '.join(ROLES)}; rename it"
            f"{did_you_mean(role, ROLES)}"
        )
    read = filled if role == "assistant" else string
    return {"role": role, "content": read(message["content"], f"{name}.content", place)}


def filled(value: object, name: str, place: str) -> str:
    """Return a value that has to be a string and hold more than white space.

    Raises:
        UserError: naming the value and its place.
    """
    text = string(value, name, place)
    if not text.strip():
        raise UserError(f"{place}: {name} is empty; expected some text; fill it or drop the record")
    return text


def string(value: object, name: str, place: str) -> str:
    """Return a value that has to be a string of whole characters.

    Raises:
        UserError: naming the value and its place.
    """
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {kind_of(value)}; expected a string")
    # JSON can write half of a surrogate pair, which no encoding can.
    if (half := next((c for c in value if "\ud800" <= c <= "\udfff"), None)) is not None:
        raise UserError(
            f"{place}: {name} holds half a surrogate pair, \\u{ord(half):x}; expected Unicode "
            "text; write the whole character"
        )
    return value


def kind_of(value: object) -> str:
    """Say in a word what JSON calls a value."""
    return JSON_NAMES.get(type(value), f"a {type(value).__name__}")


def listed(names: Iterable[object]) -> str:
    """Return the keys of a record, for a message."""
    return ", ".join(repr(str(name)) for name in names) or "no keys"
