"""Markup that cannot be broken by what it shows: text is escaped unless it is markup already."""

import html
import re
from collections.abc import Iterable

VOID = frozenset({"br", "img", "input", "link", "meta"})
# HTML has no place for control characters and lone surrogates; the former have pictures.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]|[\ud800-\udfff]")


class Markup(str):
    """Text that is markup: it is not escaped again."""

    __slots__ = ()


def plain(text: object) -> str:
    """Replace characters that HTML cannot hold by ones that show them."""
    return CONTROL.sub(_picture_of, str(text))


def _picture_of(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def escape(text: object) -> Markup:
    """Escape text for an element or an attribute; markup stays."""
    return text if isinstance(text, Markup) else Markup(html.escape(plain(text), quote=True))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Write an element.

    Args:
        name: of the element.
        children: markup as it is, everything else as text; None is left out.
        attributes: `_` at the end is left out and `_` within is `-`; None and False leave an
            attribute out, True writes its name alone.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    start = f"<{name}{''.join(written)}>"
    if name in VOID:
        return Markup(start)
    return Markup(f"{start}{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Put parts one behind another; None is left out."""
    return Markup(between.join(escape(part) for part in parts if part is not None))


def link(target: str, /, *children: object, **attributes: object) -> Markup:
    """Write a link."""
    return element("a", *children, href=target, **attributes)


def unfolded(title: str, *children: object) -> Markup:
    """Write what is there to be opened: a title, and what lies behind it."""
    return element("details", element("summary", title), *children, class_="more")


def table(
    caption: object,
    columns: Iterable[object],
    rows: Iterable[Iterable[object]],
    *,
    headers: int = 1,
    class_: str = "",
) -> Markup:
    """Write a table in a frame that scrolls.

    Args:
        caption: what the table shows.
        columns: header cells, text or `th` elements.
        rows: cells, content or whole `td` elements.
        headers: how many cells of a row name it.
        class_: of the table.
    """
    head = element("tr", *(_cell("th", c, scope="col") for c in columns))
    body = [
        element(
            "tr",
            *(
                _cell("th", c, scope="row") if i < headers else _cell("td", c)
                for i, c in enumerate(row)
            ),
        )
        for row in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", join(body, "\n")),
        class_=class_ or None,
    )
    # A frame that scrolls must be reached by the keyboard.
    return element(
        "div", whole, class_="frame", tabindex="0", role="region", aria_label=_words(caption)
    )


def _cell(name: str, content: object, **attributes: object) -> Markup:
    if isinstance(content, Markup) and content.startswith(("<td", "<th")):
        return content
    return element(name, content, **attributes)


def _words(markup: object) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", escape(markup)))
