"""A stand-in for the W&B server on loopback: it answers the client and keeps what was sent.

It knows the operations that the client of `wandb>=0.31` asks for while a run logs config, history,
summary, files and artifacts. An operation that it does not know is answered with an error and kept
in `unknown`, so that a newer client's wish is seen by its name.
"""

import gzip
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

ENTITY = "someone"
KEY = "a" * 40
Json = dict[str, Any]


def now() -> str:
    """Return the time as W&B writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass
class StubRun:
    """What the server knows of one run.

    Attributes:
        fields: group, job type, name and tags as they were sent first.
        begun: how often a client opened the run.
        asked: how often a client asked whether there is something to resume.
        config: key -> value, without W&B's own `_wandb`.
        client: W&B's own part of the config; the axes of metrics lie in it.
        history, events: rows by their line.
        exit_codes: one for every time that the run ended.
        files: name -> content.
        created: when.
    """

    id: str
    project: str
    fields: Json = field(default_factory=dict)
    begun: int = 0
    asked: int = 0
    config: Json = field(default_factory=dict)
    client: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    summary: Json = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    created: str = field(default_factory=now)


@dataclass
class StubArtifact:
    """One version of an artifact.

    Attributes:
        made_by: id of the run whose output it is; None where it was only declared.
        used_by: ids of the runs whose input it is.
        manifest: as uploaded.
        files: name -> content of what was uploaded with it.
    """

    id: str
    project: str
    name: str
    type: str
    digest: str
    metadata: Json
    made_by: str | None
    used_by: list[str] = field(default_factory=list)
    committed: bool = False
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class WandbStub:
    """The server's memory and its answers.

    Attributes:
        url: where it listens.
        runs: id -> run.
        artifacts: id -> version.
        status: HTTP status of its answers.
        unknown: operations that it had no answer for, and its own errors.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, StubRun] = {}
        self.artifacts: dict[str, StubArtifact] = {}
        self.status = 200
        self.unknown: list[str] = []
        self._lock = threading.Lock()

    def run_of(self, job_type: str) -> StubRun:
        """Return the one run of a job type."""
        (run,) = (r for r in self.runs.values() if r.fields["jobType"] == job_type)
        return run

    def graphql(self, query: str, variables: Json) -> Json:
        """Answer one operation."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        answer: Callable[..., Json] | None = getattr(self, f"_on_{snake}", None)
        if answer is None:
            self.unknown.append(name)
            return {"data": None, "errors": [{"message": f"the stub does not know {name}"}]}
        with self._lock:
            return {"data": answer(**variables)}

    def stream(self, run_id: str, body: Json) -> Json:
        """Take a piece of a run's streams; rows that are sent again lie where they lay."""
        with self._lock:
            run = self.runs[run_id]
            for name, chunk in body.get("files", {}).items():
                lines, start = [json.loads(c) for c in _json_lines(name, chunk)], chunk["offset"]
                if name == "wandb-summary.json":
                    run.summary = lines[-1]
                elif name in ("wandb-history.jsonl", "wandb-events.jsonl"):
                    rows = run.history if "history" in name else run.events
                    assert start <= len(rows), f"{name}: rows {len(rows)} to {start} are missing"
                    rows[start : start + len(lines)] = lines
            if body.get("complete"):
                run.exit_codes.append(body["exitcode"])
            return {"exitcode": None, "limits": {}}

    def take_file(self, owner: str, name: str, content: bytes) -> None:
        """Keep an uploaded file of a run or of an artifact."""
        with self._lock:
            if owner in self.runs:
                self.runs[owner].files[name] = content
            elif name == "wandb_manifest.json":
                self.artifacts[owner].manifest = json.loads(content)
            else:
                self.artifacts[owner].files[name] = content

    # Below: one method an operation, under its name in snake case.

    def _on_viewer(self) -> Json:
        viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": None}
        return {"viewer": {**viewer, "flags": "{}", "teams": {"edges": []}}}

    def _on_server_features_query(self) -> Json:
        return {"serverInfo": {"features": []}}

    def _on_organization_core_weave_organization_id(self, **_: Any) -> Json:
        return {"entity": None}

    def _on_run_resume_status(self, project: str, name: str, **_: Any) -> Json:
        run = self.runs.get(name)
        entity = {"id": ENTITY, "name": ENTITY}
        model = {"id": project, "name": project, "entity": entity, "bucket": None}
        if run is not None:
            run.asked += 1
            config = {k: {"value": v} for k, v in {**run.config, "_wandb": run.client}.items()}
            model["bucket"] = {
                "id": run.id,
                "name": run.id,
                "displayName": run.fields.get("displayName"),
                "config": json.dumps(config),
                "wandbConfig": json.dumps({"t": run.client.get("t", {})}),
                "summaryMetrics": json.dumps(run.summary),
                "historyLineCount": len(run.history),
                "eventsLineCount": len(run.events),
                "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(r) for r in run.history[-1:]]),
                "eventsTail": json.dumps([json.dumps(r) for r in run.events[-1:]]),
                "tags": run.fields.get("tags", []),
                "notes": None,
            }
        return {"model": model}

    def _on_upsert_bucket(
        self, name: str, project: str, config: str | None = None, **fields: Any
    ) -> Json:
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StubRun(name, project))
        run.begun += fields.get("displayName") is not None
        told = {k: v for k, v in fields.items() if v is not None}
        run.fields = {**run.fields, **told}
        if config is not None:
            sent = {k: v["value"] for k, v in json.loads(config).items()}
            run.client = sent.pop("_wandb", run.client)
            run.config = sent
        entity = {"id": ENTITY, "name": ENTITY}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.fields.get("displayName"),
            "description": None,
            "config": config,
            "sweepName": None,
            "project": {"id": project, "name": project, "entity": entity},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_create_run_files(self, run: str, files: list[str], **_: Any) -> Json:
        places = [{"name": name, "uploadUrl": self._place(run, name)} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": places}}

    def _on_artifact_type(self, name: str, **_: Any) -> Json:
        same = [a for a in self.artifacts.values() if a.name == name.partition(":")[0]]
        found = {"artifactType": {"name": same[-1].type}} if same else None
        return {"project": {"artifact": found}}

    def _on_create_artifact(self, input: Json) -> Json:
        name, digest = input["artifactCollectionName"], input["digest"]
        versions = [a for a in self.artifacts.values() if a.name == name]
        known = next((a for a in versions if a.digest == digest), None)
        if known is None:
            known = StubArtifact(
                f"artifact{len(self.artifacts)}",
                input["projectName"],
                name,
                input["artifactTypeName"],
                digest,
                json.loads(input.get("metadata") or "{}"),
                input.get("runName"),
            )
            self.artifacts[known.id] = known
        latest = {"id": versions[-1].id} if versions else None
        state = "COMMITTED" if known.committed else "PENDING"
        sequence = {"latestArtifact": latest}
        artifact = {"id": known.id, "state": state, "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _on_create_artifact_manifest(
        self, artifactID: str, name: str, includeUpload: bool, **_: Any
    ) -> Json:
        file: Json = {"id": f"{artifactID} manifest"}
        if includeUpload:
            file |= {"uploadUrl": self._place(artifactID, name), "uploadHeaders": []}
        manifest = {"id": artifactID, "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_create_artifact_files(self, input: Json) -> Json:
        nodes = [
            {
                "storagePath": spec["name"],
                "uploadUrl": self._place(spec["artifactID"], spec["name"]),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in input["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}

    def _on_commit_artifact(self, artifactID: str) -> Json:
        known = self.artifacts[artifactID]
        known.committed = True
        return {"commitArtifact": {"artifact": {"id": known.id, "digest": known.digest}}}

    def _on_use_artifact(self, input: Json) -> Json:
        self.artifacts[input["artifactID"]].used_by.append(input["runName"])
        return {"useArtifact": {"artifact": {"id": input["artifactID"]}}}

    def _on_artifact_by_id(self, id: str) -> Json:
        known = self.artifacts[id]
        artifact = {
            "__typename": "Artifact",
            "id": id,
            "artifactSequence": {
                "__typename": "ArtifactSequence",
                "name": known.name,
                "project": {
                    "id": "project",
                    "internalId": "project",
                    "name": known.project,
                    "entity": {"name": ENTITY},
                },
            },
            "versionIndex": 0,
            "artifactType": {"name": known.type},
            "description": None,
            "metadata": json.dumps(known.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 0,
            "digest": known.digest,
            "commitHash": None,
            "fileCount": len(known.manifest["contents"]),
            "createdAt": "2020-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }
        return {"artifact": artifact}

    def _place(self, owner: str, name: str) -> str:
        return f"{self.url}/put/{owner}/{name}"


Stub = TypeVar("Stub", bound=WandbStub)


def _json_lines(name: str, chunk: Json) -> list[str]:
    """Return the lines of a stream that holds JSON, and none of the console's."""
    return chunk["content"] if name.endswith((".json", ".jsonl")) else []


@contextmanager
def wandb_stub(kind: type[Stub] = WandbStub) -> Iterator[Stub]:
    """Serve on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                self._answer(stub.graphql(asked["query"], asked.get("variables") or {}))
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self._answer(stub.stream(found[1], json.loads(body)))
            else:  # the client's own telemetry
                self._answer({})

        def do_PUT(self) -> None:
            _, _, owner, name = self.path.split("/", 3)
            stub.take_file(owner, name, self._body())
            self._answer({})

        def _body(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            packed = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(content) if packed else content

        def _answer(self, content: Json) -> None:
            answer = json.dumps(content).encode()
            self.send_response(stub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Keep what went wrong, but for a client that was killed."""
            error = sys.exception()
            if not isinstance(error, ConnectionError):
                stub.unknown.append(repr(error))

    server = Server(("127.0.0.1", 0), Handler)
    stub = kind(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
