"""The section of samples: pictures and continuations of the settings, side by side."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from stillhouse.tracking.gather import Run
from stillhouse.tracking.page.html import Markup, element, join, link, table
from stillhouse.tracking.page.records import Report, key_of, setting, setting_head

# A page of ten runs stays below two megabytes: base64 takes four thirds of it.
ROOM = 1_000_000
WIDEST = 1300
LONGEST_TEXT = 1500


@dataclass
class Budget:
    """Bytes of pictures that the page has room for."""

    left: int = ROOM

    def take(self, size: int) -> bool:
        """Take room for a picture, if there is so much."""
        if size > self.left:
            return False
        self.left -= size
        return True


def samples(report: Report) -> Markup:
    """Write the first seed's pictures and continuations of every setting."""
    first = [group.runs[0] for group in report.groups]
    pictures, texts = _pictures(report, first), _texts(report, first)
    if not pictures and not texts:
        return element("p", "No run has pictures of samples or continuations.", class_="missing")
    seeds = sorted({run.seed for run in first})
    several = any(len(group.runs) > 1 for group in report.groups)
    words = f"Of every setting its first run (seed {', '.join(map(str, seeds))})"
    words += "; those of the other seeds lie in their folders." if several else "."
    return join([element("p", words), *pictures, *texts])


def _pictures(report: Report, runs: Sequence[Run]) -> list[Markup]:
    """Write a row of figures a file name; what is the same in all settings is there once."""
    names = dict.fromkeys(p.name for run in runs for p in run.leavings.samples)
    ordered = sorted(names, key=lambda name: not name.startswith("evaluate"))
    budget = Budget()
    blocks = []
    for name in ordered:
        found = [
            (i, run, path)
            for i, run in enumerate(runs)
            for path in run.leavings.samples
            if path.name == name
        ]
        alike = len(found) > 1 and len({_read(path) for _, _, path in found}) == 1
        figures = [
            _figure(report, path, None if alike else i, budget)
            for i, _, path in (found[:1] if alike else found)
        ]
        absent = [key_of(i) for i in range(len(runs)) if i not in {i for i, _, _ in found}]
        blocks.append(
            element(
                "section",
                element("h3", Path(name).stem.replace("_", " ")),
                element("div", *figures, class_="pictures"),
                element("p", "Without it: ", join(absent, " "), class_="missing")
                if absent
                else None,
            )
        )
    return blocks


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _figure(report: Report, path: Path, index: int | None, budget: Budget) -> Markup:
    of = "all settings" if index is None else report.names[index]
    source = _embedded(path, budget)
    target = report.href(path)
    if source is None:
        why = "Not shown for the sake of the page's size, or not readable: "
        shown = element("p", why, link(target, path.name), class_="missing")
    else:
        picture = element("img", src=source, alt=f"{path.stem} of {of}", loading="lazy")
        shown = link(target, picture, title="the picture in its folder")
    caption = "the same in all settings" if index is None else setting(report, index)
    return element(
        "figure",
        element("figcaption", caption),
        shown,
        data_g=None if index is None else str(index),
    )


def _embedded(path: Path, budget: Budget) -> str | None:
    """Return a picture as a data address, without its margins; None without room or picture."""
    try:
        with Image.open(io.BytesIO(_read(path))) as picture:
            whole = _without_margins(picture.convert("RGB"))
        whole.thumbnail((WIDEST, 4 * WIDEST))
        # Grids of few and flat pixels are smaller without loss, photographs with it.
        content = min(_packed(whole, lossless=True), _packed(whole, lossless=False), key=len)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if not budget.take(len(content)):
        return None
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _packed(picture: Image.Image, *, lossless: bool) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=lossless, quality=75, method=4)
    return file.getvalue()


def _without_margins(picture: Image.Image) -> Image.Image:
    """Cut off what is white all round."""
    white = Image.new("RGB", picture.size, "white")
    box = ImageChops.difference(picture, white).getbbox()
    return picture.crop(box) if box else picture


def _texts(report: Report, runs: Sequence[Run]) -> list[Markup]:
    """Write a table a prompt: a row a role, a column a setting that has continuations."""
    told = [i for i, run in enumerate(runs) if run.leavings.texts]
    found: dict[str, dict[str, dict[int, str]]] = {}
    for i in told:
        for model, prompt, text in runs[i].leavings.texts:
            found.setdefault(prompt, {}).setdefault(model, {})[i] = text
    blocks = []
    for prompt, models in found.items():
        heads = [setting_head(report, i, "col") for i in told]
        rows = [
            [model, *(_text(by_group.get(i)) for i in told)] for model, by_group in models.items()
        ]
        blocks.append(
            table(join(["Prompt: ", element("q", prompt)]), ["role", *heads], rows, class_="texts")
        )
    return [element("section", element("h3", "Continuations"), *blocks)] if blocks else []


def _text(text: str | None) -> Markup:
    if text is None:
        return element("td", "–", class_="none")
    cut = f"{text[:LONGEST_TEXT]} …" if len(text) > LONGEST_TEXT else text
    return element("td", cut)
