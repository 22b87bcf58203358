"""Short names of settings: what a column or a caption has room for."""

import re
from collections.abc import Sequence

OVERRIDE = re.compile(r"(~?)([\w./@-]+)=(.*)", re.DOTALL)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def short_names(labels: Sequence[str]) -> list[str]:
    """Shorten keys and dotted values to their last part; names that would not differ stay whole."""
    words = [label.split(" ") for label in labels]
    keys = {found[2] for own in words for word in own if (found := OVERRIDE.fullmatch(word))}
    ends = [short_key(key) for key in keys]
    # Two keys with one end are told apart by all of their parts.
    short = {key: short_key(key) if ends.count(short_key(key)) == 1 else key for key in keys}
    names = [" ".join(_word(word, short) for word in own) for own in words]
    return names if len(set(names)) == len(names) else list(labels)


def short_key(key: str) -> str:
    """Return the last part of a key that says something."""
    parts = [part for part in re.split(r"[./@]", key) if part not in ("", "_target_")]
    return parts[-1] if parts else key


def short_value(value: str) -> str:
    """Return the last part of a dotted path; other values are as they are."""
    return value.rsplit(".", 1)[-1] if DOTTED.fullmatch(value) else value


def _word(word: str, keys: dict[str, str]) -> str:
    found = OVERRIDE.fullmatch(word)
    return f"{found[1]}{keys[found[2]]}={short_value(found[3])}" if found else word
