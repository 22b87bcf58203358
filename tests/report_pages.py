"""Pages of comparisons, made and read: a tree of elements, and runs that they are of."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from stillhouse.schema import Comparison
from stillhouse.tracking.compare import compare_runs

VOID = {"meta", "img", "br", "link", "input"}


@dataclass
class Element:
    """An element of a page with what lies in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str, class_: str = "") -> list["Element"]:
        """Return the elements below with the tag and the class, in order."""
        found = []
        for child in self.children:
            classes = (child.attributes.get("class") or "").split()
            if child.tag == tag and (not class_ or class_ in classes):
                found.append(child)
            found += child.all(tag, class_)
        return found


class Tree(HTMLParser):
    """A page as a tree; every element must be closed in its order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is there twice: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def parse(path: Path) -> Element:
    """Read a page."""
    tree = Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    assert len(tree.open) == 1
    return tree.root


def compare(folder: Path, *runs: Path, **values: Any) -> Path:
    """Compare runs; return the page."""
    to = folder / "to"
    names = [str(run) for run in runs]
    config = Comparison(_target_="compare", runs=names, to=str(to), **values)
    compare_runs(OmegaConf.structured(config), folder)
    return to / "report.html"


def section(page: Element, name: str) -> Element:
    """Return a section of a page."""
    (found,) = (s for s in page.all("section") if s.attributes.get("id") == name)
    return found


def links(page: Element) -> list[str]:
    """Return the addresses of a page's links that leave it."""
    found = [a.attributes["href"] or "" for a in page.all("a")]
    return [href for href in found if not href.startswith("#")]


def draw_samples(run: Path, name: str, shade: int = 0, size: tuple[int, int] = (60, 20)) -> None:
    """Draw a grid of samples where a run would."""
    (run / "pictures").mkdir(exist_ok=True)
    picture = Image.new("RGB", size, "white")
    picture.paste((shade, 0, 0), (10, 5, 50, 15))
    picture.save(run / "pictures" / name)


def write_texts(run: Path, rows: Any) -> None:
    """Write continuations where an evaluation would."""
    (run / "stages" / "evaluate").mkdir(parents=True, exist_ok=True)
    (run / "stages" / "evaluate" / "samples.json").write_text(json.dumps(rows))
