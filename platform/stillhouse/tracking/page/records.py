"""What the page of a comparison is made of, and how it names and links its parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from stillhouse.tracking.folding import Cell, Group
from stillhouse.tracking.gather import Run
from stillhouse.tracking.page.html import Markup, element, join, link
from stillhouse.tracking.page.names import short_names
from stillhouse.tracking.page.svg import look, swatch
from stillhouse.tracking.varied import Varied, varied_keys


@dataclass(frozen=True)
class Report:
    """A comparison, as its page tells it.

    Attributes:
        groups: settings with their runs.
        cells: of the table, with what of the gap is closed.
        metrics: columns of the table.
        quality: metric that charts have on their vertical axis; None where there is but a size.
        x: metric on the horizontal axis of the picture of quality.
        baseline: what differences are to, as the user gave it; None for none.
        command: that makes this comparison.
        warnings: a line for each thing left out.
        to: folder in which the page lies; links are relative to it.
        varied: keys that tell the groups apart.
        names: short labels of the groups.
    """

    groups: tuple[Group, ...]
    cells: tuple[Cell, ...]
    metrics: tuple[str, ...]
    quality: str | None
    x: str
    baseline: str | None
    command: str
    warnings: tuple[str, ...]
    to: Path
    varied: tuple[Varied, ...]
    names: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, by group."""
        return [run for group in self.groups for run in group.runs]

    def href(self, path: Path) -> str:
        """Return the address of a file or folder, relative to the page."""
        relative = os.path.relpath(path.resolve(), self.to.resolve())
        slash = "/" if path.is_dir() else ""
        # Without a dot in front, a colon in the first name would end a scheme.
        return quote(
            f"{'' if relative.startswith('..') else './'}{Path(relative).as_posix()}{slash}"
        )

    def role(self) -> str | None:
        """Return the role that stands for a run: its product, at the fewest steps."""
        roles = list(dict.fromkeys(role for group in self.groups for role in group.roles))
        product = str(self.runs[0].config.get("product", "student"))
        named = [r for r in roles if r == product or r.startswith(f"{product}@")]
        return (named or roles[-1:] or [None])[0]


def make_report(
    groups: Sequence[Group],
    cells: Sequence[Cell],
    metrics: Sequence[str],
    *,
    quality: str | None,
    x: str,
    baseline: str | None,
    command: str,
    warnings: Sequence[str],
    to: Path,
) -> Report:
    """Collect what the page tells."""
    return Report(
        groups=tuple(groups),
        cells=tuple(cells),
        metrics=tuple(metrics),
        quality=quality,
        x=x,
        baseline=baseline,
        command=command,
        warnings=tuple(warnings),
        to=to,
        varied=tuple(varied_keys(groups)),
        names=tuple(short_names([group.label for group in groups])),
    )


def letter(index: int) -> str:
    """Return a setting's letter: A to Z, then AA, AB and so on."""
    name = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        name = chr(ord("A") + rest) + name
    return name


def key_of(index: int) -> Markup:
    """Write a setting's letter in its colour."""
    return element("b", letter(index), class_=f"letter {look(index)}")


def setting(report: Report, index: int) -> Markup:
    """Write a setting's letter and short name; its whole label is the tip."""
    name = element("span", report.names[index], title=report.groups[index].label)
    return join([key_of(index), name], " ")


def setting_head(report: Report, index: int, scope: str, class_: str | None = None) -> Markup:
    """Write a header cell that names a setting."""
    return element("th", setting(report, index), scope=scope, class_=class_)


def legend(report: Report, *, shared: bool = False) -> Markup:
    """Write which letter, colour, dash and marker is which setting."""
    items = [
        element(
            "li",
            swatch(i),
            " ",
            key_of(i),
            " ",
            element("span", group.label),
            data_g=str(i),
        )
        for i, group in enumerate(report.groups)
    ]
    if shared:
        items.append(element("li", swatch(None), " ", element("span", "the same in all settings")))
    return element("ul", *items, class_="legend")


def stage_of_numbers(run: Run) -> str:
    """Return the stage in whose W&B run a run's numbers were written."""
    urls = run.leavings.urls
    return "evaluate" if "evaluate" in urls else list(urls)[-1]


def proof(run: Run) -> Markup | None:
    """Link to the W&B run in which a run's numbers were written; None where none was online."""
    if not run.leavings.urls:
        return None
    stage = stage_of_numbers(run)
    title = f"the stage {stage} of this run at Weights & Biases"
    return link(run.leavings.urls[stage], "W&B", title=title)


def address(report: Report, run: Run) -> str:
    """Return the address of a run: its folder, or without one its place in W&B."""
    return report.href(run.folder) if run.folder else run.leavings.urls[stage_of_numbers(run)]


def to_run(report: Report, run: Run, words: object) -> Markup:
    """Link to a run's folder, and to W&B behind it."""
    place = link(address(report, run), words, title=f"seed {run.seed}: {run.name}")
    return join([place, proof(run) if run.folder else None], " ")
