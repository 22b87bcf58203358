"""The whole page: its head, its sections, its style sheet and its script."""

from collections.abc import Callable
from pathlib import Path

from stillhouse.tracking.page.curves import curves
from stillhouse.tracking.page.fronts import fronts
from stillhouse.tracking.page.html import Markup, element, join, link
from stillhouse.tracking.page.numbers import numbers
from stillhouse.tracking.page.parallel import parallel
from stillhouse.tracking.page.records import Report
from stillhouse.tracking.page.runs import differences, every_run
from stillhouse.tracking.page.samples import samples

REPORT = "report.html"
Writer = Callable[[Report], Markup]
SECTIONS: tuple[tuple[str, str, Writer], ...] = (
    ("numbers", "Numbers", numbers),
    ("differs", "What differs", differences),
    ("coordinates", "Parallel coordinates", parallel),
    ("curves", "Learning curves", curves),
    ("costs", "Quality and cost", fronts),
    ("samples", "Samples", samples),
    ("runs", "Runs", every_run),
)


def page(report: Report) -> str:
    """Return the page of a comparison."""
    recipes = list(dict.fromkeys(group.recipe for group in report.groups))
    title = f"Comparison of {', '.join(recipes)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _asset("page.css")),
    )
    menu = element(
        "nav",
        element("ul", *(element("li", link(f"#{name}", words)) for name, words, _ in SECTIONS)),
        aria_label="Sections",
    )
    body = element(
        "body",
        link("#numbers", "Skip to the numbers", class_="skip"),
        element("header", element("h1", title), _summary(report)),
        menu,
        element("main", *(_section(report, *section) for section in SECTIONS)),
        element("div", id="tip", role="status", hidden=True),
        element("script", _asset("page.js")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(report: Report, name: str, words: str, write: Writer) -> Markup:
    return element("section", element("h2", words), write(report), id=name)


def _summary(report: Report) -> Markup:
    runs, settings = len(report.runs), len(report.groups)
    words = (
        f"{runs} run{'s' if runs != 1 else ''} of {settings} setting{'s' if settings != 1 else ''}"
    )
    if report.baseline:
        words += f", compared with {report.baseline}"
    return join(
        [
            element("p", words + "."),
            element("p", "Made by ", element("code", report.command), class_="command"),
        ]
    )


def _asset(name: str) -> Markup:
    """Return a file that lies beside this module."""
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))
