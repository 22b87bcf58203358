"""The sections of what differs between the configs, of every run, and of what was left out."""

from stillhouse.files import CONFIG, RESULTS, SERIES
from stillhouse.tracking.gather import Run
from stillhouse.tracking.page.html import Markup, element, join, link, table, unfolded
from stillhouse.tracking.page.records import Report, address, setting_head
from stillhouse.tracking.varied import ABSENT, Varied

MOST_KEYS = 400
LONGEST = 120


def differences(report: Report) -> Markup:
    """Write the keys whose values differ: those of the command lines, the others folded away."""
    told = [v for v in report.varied if v.told]
    rest = [v for v in report.varied if not v.told]
    unread = [run for run in report.runs if not run.config]
    notes = [f"Without a {CONFIG} that can be read: {len(unread)} of the runs."] if unread else []
    if len(report.groups) < 2:
        notes.append("One setting alone: there is nothing to differ from.")
    elif not report.varied:
        notes.append("No key differs.")
    if len(rest) > MOST_KEYS:
        notes.append(f"Of {len(rest)} further keys that differ, {MOST_KEYS} are shown.")
    return join(
        [
            element("p", " ".join(notes), class_="missing") if notes else None,
            _keys(report, told, "Keys of the command lines") if told else None,
            unfolded(
                f"{min(len(rest), MOST_KEYS)} further keys of the configs",
                _keys(report, rest[:MOST_KEYS], "Further keys of the configs"),
            )
            if rest
            else None,
        ]
    )


def _keys(report: Report, keys: list[Varied], caption: str) -> Markup:
    heads = [setting_head(report, i, "col") for i in range(len(report.groups))]
    rows = [[element("th", element("code", v.key), scope="row"), *_values(v)] for v in keys]
    return table(caption, ["key", *heads], rows, class_="keys")


def _values(varied: Varied) -> list[Markup]:
    """Write the values, those that are not the most frequent one marked."""
    common = max(dict.fromkeys(varied.values), key=varied.values.count)
    many = varied.values.count(common) > 1
    cells = []
    for value in varied.values:
        cut = f"{value[:LONGEST]}…" if len(value) > LONGEST else value
        shown = element("span", "absent", class_="none") if value == ABSENT else cut
        own = many and value != common
        cells.append(element("td", element("mark", shown) if own else shown))
    return cells


def every_run(report: Report) -> Markup:
    """Write a row a run: its folder, its files, its W&B runs, what it lacks."""
    rows = [
        [
            setting_head(report, i, "row"),
            str(run.seed),
            _folder(report, run),
            _files(report, run),
            _urls(run),
            "; ".join(run.leavings.missing),
        ]
        for i, group in enumerate(report.groups)
        for run in group.runs
    ]
    columns = ["setting", "seed", "folder", "files", "W&B", "missing"]
    left_out = element("ul", *(element("li", line) for line in report.warnings))
    return join(
        [
            table("Every run of the comparison", columns, rows, class_="runs sortable"),
            element("h3", "Left out and noted") if report.warnings else None,
            left_out if report.warnings else None,
        ]
    )


def _folder(report: Report, run: Run) -> Markup:
    return link(address(report, run), run.name)


def _files(report: Report, run: Run) -> Markup:
    if run.folder is None:
        return element("td", element("span", "at W&B", class_="none"))
    pictures = run.leavings.pictures
    paths = [run.folder / name for name in (RESULTS, CONFIG, SERIES)]
    paths += [run.folder / "pictures" / "loss.png", *pictures]
    return join([link(report.href(p), p.name) for p in paths if p.is_file()], " ")


def _urls(run: Run) -> Markup:
    urls = run.leavings.urls
    if not urls:
        return element("td", element("span", "offline or none", class_="none"))
    return join([link(url, stage) for stage, url in urls.items()], " ")
