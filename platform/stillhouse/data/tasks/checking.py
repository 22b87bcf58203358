"""Where a text says its answer, and whether it is the right one.

The answer is what follows the last `####` or `Answer:` of the text, or else the whole text; one
that is an integer is the last number in it.
"""

import re

MARK = re.compile(r"####|\banswer\s*:", re.IGNORECASE)
# The minus of typesetting, which chat models write.
MINUS = "\u2212"
# A minus behind a digit subtracts; a comma parts thousands only.
NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")


def said_answer(text: str) -> str:
    """Return the part of a text that says the answer, without white space and emphasis around."""
    marks = list(MARK.finditer(text))
    return text[marks[-1].end() :].strip(" \t\r\n*`") if marks else text.strip()


def said_integer(text: str) -> int | None:
    """Return the last number of what a text says; None where there is none, or it is not whole."""
    numbers = NUMBER.findall(said_answer(text).replace(MINUS, "-"))
    if not numbers:
        return None
    whole, _, fraction = numbers[-1].replace(",", "").partition(".")
    try:
        return int(whole) if not fraction.strip("0") else None
    except ValueError:  # thousands of digits, as a model writes that cannot stop
        return None


def says_integer(text: str, *, expected: int) -> bool:
    """Whether a text answers with this integer."""
    return said_integer(text) == expected


def says_exactly(text: str, *, expected: str) -> bool:
    """Whether a text is the answer, but for white space around it."""
    return text.strip() == expected
