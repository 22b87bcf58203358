"""Lines of a user's own files, and records in JSON lines, each with its place."""

import json
from collections.abc import Iterator
from pathlib import Path

from stillhouse.errors import UserError


def lines(path: Path, place: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line, without its end and without a byte order mark.

    Raises:
        UserError: for a line that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place}, line {number}: not UTF-8: byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}; write the file anew in UTF-8, for example with "
                    "iconv -t UTF-8"
                ) from error
            yield number, text.removesuffix("\n").removesuffix("\r")


def json_records(path: Path, place: str, *, example: str) -> Iterator[tuple[str, object]]:
    """Yield place and value of every line that is not blank.

    Args:
        path: the file.
        place: of the file, for messages.
        example: of a line, for messages.

    Raises:
        UserError: for a line that is not JSON in UTF-8.
    """
    for number, line in lines(path, place):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}, line {number}: not JSON: {error.msg} at column {error.colno}; expected "
                f"a record a line, such as {example}"
            ) from error
        yield f"{place}, line {number}", record
