"""The section of the table: means, deviations, paired differences, and every repeat behind them."""

import math

from stillhouse.tracking import folding
from stillhouse.tracking.directions import sign_of
from stillhouse.tracking.folding import Cell, Group
from stillhouse.tracking.intervals import Estimate
from stillhouse.tracking.page.html import Markup, element, join, table
from stillhouse.tracking.page.records import Report, setting_head, to_run
from stillhouse.tracking.report import format_number

ARROWS = {1: "more is better", -1: "less is better"}


def numbers(report: Report) -> Markup:
    """Write the table: a row a role of a setting, a column a metric."""
    found = {(c.group, c.role, c.metric): c for c in report.cells}
    metrics = list(dict.fromkeys([*report.metrics, *(c.metric for c in report.cells)]))
    rows_of = {(c.group, c.role) for c in report.cells}
    rows = [
        [
            setting_head(report, i, "row", None if place else "first"),
            element("th", role, scope="row"),
            *(_cell(report, group, found.get((group.label, role, m))) for m in metrics),
        ]
        for i, group in enumerate(report.groups)
        for place, role in enumerate(r for r in group.roles if (group.label, r) in rows_of)
    ]
    heads = [
        element(
            "th",
            element("span", metric, class_="metric"),
            element("small", ARROWS.get(sign_of(metric) or 0)),
            scope="col",
        )
        for metric in metrics
    ]
    return join(
        [
            _reading(report),
            table(
                "Every role of every setting",
                ["setting", "role", *heads],
                rows,
                headers=2,
                class_="numbers sortable",
            ),
        ]
    )


def _reading(report: Report) -> Markup:
    words = (
        "A number is the mean over seeds ± their sample standard deviation; open it for each "
        "seed's own, linked to its run. "
    )
    if any(c.difference for c in report.cells):
        words += (
            f"Below it stands the difference to {report.baseline}, paired by seed, with its 95 % t "
            "interval; “better” and “worse” are said where that interval leaves zero out. With one "
            "pair there is no interval."
        )
    return element("p", words)


def _cell(report: Report, group: Group, cell: Cell | None) -> Markup:
    if cell is None:
        return element("td", element("span", "–", class_="none", title="not measured"))
    value = cell.value
    return element(
        "td",
        _value(report, group, cell),
        _difference(cell),
        data_value=repr(value.mean) if math.isfinite(value.mean) else "",
    )


def _value(report: Report, group: Group, cell: Cell) -> Markup:
    """Write a mean that opens into its repeats; a single number links to its run at once."""
    shown = element("data", format_number(cell.value.mean), value=repr(cell.value.mean))
    if cell.metric == folding.GAP_CLOSED:
        own = dict.fromkeys(group.values(cell.role, folding.GAP_METRIC))
        spread = element("span", _interval(cell.value), class_="interval")
    else:
        own = group.values(cell.role, cell.metric)
        spread = element("span", f" ± {format_number(cell.value.sd)}", class_="sd")
    runs = [run for run in group.runs if run.seed in own]
    if len(runs) == 1:
        return element("div", to_run(report, runs[0], shown), class_="single")
    repeats = [element("li", to_run(report, run, _repeat(run.seed, own[run.seed]))) for run in runs]
    return element("details", element("summary", shown, spread), element("ul", *repeats))


def _repeat(seed: int, number: float | None) -> str:
    """Name a repeat; what is folded of several numbers has none of its own."""
    return f"seed {seed}" if number is None else f"seed {seed}: {format_number(number)}"


def _difference(cell: Cell) -> Markup | None:
    value = cell.difference
    if value is None:
        return None
    sign = "+" if value.mean > 0 else ""
    verdict = _verdict(value, sign_of(cell.metric))
    return element(
        "div",
        element("data", f"{sign}{format_number(value.mean)}", value=repr(value.mean)),
        element("span", _interval(value), class_="interval"),
        element("em", verdict) if verdict else None,
        class_=f"difference {verdict or ('' if value.mean else 'nothing')}".strip(),
        title=f"{value.n} pairs" if value.n != 1 else "one pair",
    )


def _interval(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return ""
    return f" [{format_number(value.low)}, {format_number(value.high)}]"


def _verdict(value: Estimate, sign: int | None) -> str | None:
    """Say which way a difference goes where its interval leaves zero out."""
    if sign is None or value.low is None or value.high is None:
        return None
    if not (value.low > 0 or value.high < 0):
        return None
    return "better" if value.mean * sign > 0 else "worse"
