"""A comparison as a W&B Report: its tables as text, its charts over the W&B runs themselves.

The numbers are those of `compare.md`. The charts are W&B's own, drawn there from what the runs
logged, a set of runs a setting; they have none of the page's intervals.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import unquote, urlsplit

from stillhouse.errors import UserError
from stillhouse.tracking.gather import Run
from stillhouse.tracking.page.fronts import COSTS
from stillhouse.tracking.page.records import Report, letter, stage_of_numbers
from stillhouse.tracking.wandb_api import open_api, runs_of, told

ASKED = "publish=true"
LONGEST_TITLE = 128  # as the client takes it
WIDTH = 12


@dataclass(frozen=True, order=True)
class Place:
    """Where a W&B run lies."""

    entity: str
    project: str
    run_id: str


PlacesOf = Callable[[Run], Mapping[str, Place]]


def check_report() -> None:
    """Check that a report can be built and sent, before anything is read.

    Raises:
        UserError: without the package, without an API key, or when the server does not take it.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            f"{ASKED}: a report at W&B needs the package wandb-workspaces; install it with: "
            "pip install -e '.[report]'"
        )
    open_api(ASKED)


def make_wandb_report(report: Report, text: str) -> Any:
    """Return the `wandb_workspaces.reports.v2.Report` of a comparison, not yet saved.

    Args:
        report: the comparison.
        text: its tables, as Markdown.

    Raises:
        UserError: when no run of the comparison is online, or the server lacks a project of theirs.
    """
    import wandb_workspaces.reports.v2 as wr

    places = [place for run in report.runs for place in _places(run).values()]
    if not places:
        raise UserError(
            f"{ASKED}: no run of the comparison has an address at W&B, whose charts show W&B runs; "
            "send offline runs with `wandb sync <run directory>/wandb/offline-run-*` and compare "
            "them as runs=wandb:<entity>/<project>/<group>"
        )
    _check_projects(places)
    recipes = dict.fromkeys(group.recipe for group in report.groups)
    blocks: list[Any] = [wr.MarkdownBlock(text + _only_in_tables(report))]
    for words, runsets, panels in (
        ("Learning curves", _sets(report, _places, ["JobType"]), _curves(report)),
        ("What differs, and quality and cost", _sets(report, _place_of_numbers), _charts(report)),
    ):
        if panels:
            blocks += [wr.H2(words), wr.PanelGrid(runsets=runsets, panels=_laid_out(panels))]
    return wr.Report(
        entity=places[0].entity,
        project=places[0].project,
        title=f"Comparison of {', '.join(recipes)}"[:LONGEST_TITLE],
        description=report.command,
        blocks=blocks,
        width="fluid",
    )


def save_wandb_report(made: Any) -> str:
    """Send a report to W&B; return its address."""
    with told(ASKED):
        return made.save().url


def _check_projects(places: Sequence[Place]) -> None:
    """Check that projects are there: W&B's client would make the report's where it is not."""
    api = open_api(ASKED)
    with told(ASKED):
        for project in dict.fromkeys(f"{place.entity}/{place.project}" for place in places):
            runs_of(api, ASKED, project, per_page=1)


def _only_in_tables(report: Report) -> str:
    """Return Markdown that names the runs that no chart has."""
    names = [run.name for run in report.runs if not _places(run)]
    lines = "\n".join(f"- {name}" for name in names)
    return f"\n## Without an address at W&B, and in no chart below\n\n{lines}\n" if names else ""


def _places(run: Run) -> Mapping[str, Place]:
    """Return stage -> place of a run's W&B runs, by their addresses."""
    found = {}
    for stage, url in run.leavings.urls.items():
        parts = re.search(r"([^/]+)/([^/]+)/runs/([\w-]+)/?$", urlsplit(url).path)
        if parts:
            found[stage] = Place(*map(unquote, parts.groups()))
    return found


def _place_of_numbers(run: Run) -> Mapping[str, Place]:
    """Return the place of the W&B run alone that has the numbers of the models."""
    return {s: place for s, place in _places(run).items() if s == stage_of_numbers(run)}


def _sets(report: Report, places_of: PlacesOf, grouped: Sequence[str] = ()) -> list[Any]:
    """Return a set of W&B runs a setting, and a further one for each further project."""
    import wandb_workspaces.reports.v2 as wr

    sets = []
    for i, group in enumerate(report.groups):
        places = sorted(place for run in group.runs for place in places_of(run).values())
        for (entity, project), own in groupby(places, key=lambda p: (p.entity, p.project)):
            ids = ", ".join(f"'{place.run_id}'" for place in own)
            sets.append(
                wr.Runset(
                    entity=entity,
                    project=project,
                    name=f"{letter(i)} {report.names[i]}",
                    filters=f"Metric('ID') in [{ids}]",
                    groupby=list(grouped),
                )
            )
    return sets


def _curves(report: Report) -> list[Any]:
    """Return a chart for every series of validation, and for the loss."""
    import wandb_workspaces.reports.v2 as wr

    metrics = dict.fromkeys(metric for run in report.runs for _, _, metric, _ in run.series)
    shown = [m for m in metrics if m.startswith("val_")] + [m for m in metrics if m == "train_loss"]
    return [
        wr.LinePlot(title=m, x="step", y=[m], groupby_aggfunc="mean", groupby_rangefunc="minmax")
        for m in shown
    ]


def _charts(report: Report) -> list[Any]:
    """Return parallel coordinates over what differs, and a chart a cost, of the run's product."""
    import wandb_workspaces.reports.v2 as wr

    role, quality = report.role(), report.quality
    if role is None or quality is None:
        return []
    measured = {m for group in report.groups for m in report.metrics if group.values(role, m)}
    if quality not in measured:
        return []
    number = wr.SummaryMetric(f"{role}/{quality}")
    charts: list[Any] = []
    # An override of a group, `latent@method.latent_loss`, is no key of the config.
    keys = [v.key for v in report.varied if v.told and re.fullmatch(r"[\w.]+", v.key)]
    if keys:
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), key) for key in keys]
        columns.append(wr.ParallelCoordinatesPlotColumn(number, f"{role} {quality}"))
        charts.append(wr.ParallelCoordinatesPlot(columns=columns, title="What differs"))
    for cost in dict.fromkeys([*COSTS, report.x]):
        if cost in measured and cost != quality:
            x = wr.SummaryMetric(f"{role}/{cost}")
            title = f"{role}: {quality} against {cost}"
            charts.append(wr.ScatterPlot(title=title, x=x, y=number))
    return charts


def _laid_out(panels: Sequence[Any]) -> list[Any]:
    """Lay charts two beside each other; a grid is 24 columns wide."""
    import wandb_workspaces.reports.v2 as wr

    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=i % 2 * WIDTH, y=i // 2 * 8, w=WIDTH, h=8)
    return list(panels)
