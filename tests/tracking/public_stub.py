"""The stand-in for the W&B server with what its public API is asked: runs, their rows, reports.

It knows the operations that `wandb>=0.31` asks for while it lists runs and reads their history, and
those with which `wandb-workspaces>=0.4` saves a report.
"""

import json
from typing import Any

from tracking.wandb_stub import ENTITY, Json, StubRun, WandbStub, now


class PublicStub(WandbStub):
    """The server, with runs to be read.

    Attributes:
        reports: what was saved of every report.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reports: list[Json] = []

    def _projects(self) -> list[str]:
        return sorted({run.project for run in self.runs.values()})

    def _on_get_default_entity(self) -> Json:
        return self._on_viewer()

    def _on_runs(
        self, project: str, filters: str, order: str, perPage: int, cursor: str | None, **_: Any
    ) -> Json:
        if project not in self._projects():
            return {"project": None}
        wanted = json.loads(filters)
        found = [
            run
            for run in self.runs.values()
            if run.project == project and all(_has(run, k, v) for k, v in wanted.items())
        ]
        if order.startswith("-"):
            found.reverse()
        start = int(cursor or 0)
        page = found[start : start + perPage]
        edges = [{"node": _told(r), "cursor": str(start + i + 1)} for i, r in enumerate(page)]
        more = {"endCursor": str(start + len(page)), "hasNextPage": start + perPage < len(found)}
        return {"project": {"runCount": len(found), "runs": {"edges": edges, "pageInfo": more}}}

    def _on_run_history_keys(self, name: str, **_: Any) -> Json:
        last = max((row["_step"] for row in self.runs[name].history), default=-1)
        return {"project": {"run": {"historyKeys": {"lastStep": last}}}}

    def _on_run_parquet_history(self, runName: str, **_: Any) -> Json:
        # No exports: all rows are live.
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _on_history_page(self, run: str, minStep: int, maxStep: int, **_: Any) -> Json:
        rows = [r for r in self.runs[run].history if minStep <= r["_step"] < maxStep]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def _on_project_internal_id(self, projectName: str, **_: Any) -> Json:
        known = projectName in self._projects()
        return {"project": {"id": projectName, "internalId": projectName} if known else None}

    def _on_get_projects(self, **_: Any) -> Json:
        nodes = [
            {"__typename": "Project", **_project(name), "isBenchmark": False}
            for name in self._projects()
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": n, "cursor": ""} for n in nodes]}}

    def _on_upsert_view(self, **view: Any) -> Json:
        self.reports.append({**view, "spec": json.loads(view["spec"])})
        kept = {k: view[k] for k in ("type", "name", "displayName", "description", "spec")}
        told = {"id": f"view{len(self.reports)}", "project": _project(view["projectName"]), **kept}
        return {"upsertView": {"view": {**told, "updatedAt": now()}, "inserted": True}}


def _has(run: StubRun, key: str, wanted: Any) -> bool:
    """Whether a filter of the public API, by group or by a key of the config, takes a run."""
    config = {f"config.{name}": value for name, value in run.config.items()}
    own = {"group": run.fields.get("groupName"), **config}.get(key)
    return own in wanted["$in"] if isinstance(wanted, dict) else own == wanted


def _state(run: StubRun) -> str:
    """Return a run's state as W&B calls it."""
    if len(run.exit_codes) < run.begun:
        return "running"
    return "finished" if run.exit_codes[-1] == 0 else "failed"


def _told(run: StubRun) -> Json:
    """Return a run as the public API's fragment has it."""
    config = {k: {"value": v} for k, v in {**run.config, "_wandb": run.client}.items()}
    return {
        "id": run.id,
        "name": run.id,
        "displayName": run.fields.get("displayName"),
        "state": _state(run),
        "group": run.fields.get("groupName"),
        "jobType": run.fields.get("jobType"),
        "tags": run.fields.get("tags", []),
        "config": json.dumps(config),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "createdAt": run.created,
        "heartbeatAt": run.created,
    }


def _project(name: str) -> Json:
    return {"id": name, "name": name, "entityName": ENTITY, "createdAt": now(), "user": None}
