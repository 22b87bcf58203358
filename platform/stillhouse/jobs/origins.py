"""Where a model of a run comes from: its stages, their data, what came from outside."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.utils import instantiate

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.pictures.pictures import Pictures
from stillhouse.files import files_of, sha256_of
from stillhouse.jobs.finished_run import FinishedRun, is_hub_id, texts_of

# Stages whose own `path` is a model that teaches by what it writes.
GENERATE = "stillhouse.stages.generate.Generate"
REWRITE = "stillhouse.stages.rewrite.Rewrite"
LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


@dataclass(frozen=True)
class Source:
    """A model, or a part of one, that another one was made with.

    Attributes:
        what: its part in that.
        name: the stage that made it, its id on the hub, its folder, or the package that held it.
        kind: which of these.
    """

    what: Literal["teacher", "initial weights", "tokenizer", "package"]
    name: str
    kind: Literal["stage", "hub", "folder", "package"]


@dataclass(frozen=True)
class Origins:
    """What a model was made from.

    Attributes:
        stage: the stage that made it.
        stages: that one and every stage that it needed, in their order.
        weights: those of them that its weights went through, in their order.
        synthetic: those of them that made random content in place of what they name.
        sources: models of these stages and from outside, each once.
        corpora: the data of all these stages.
        licences: file in an export -> a licence text that came with what was fetched.
    """

    stage: str
    stages: Sequence[str]
    weights: Sequence[str]
    synthetic: Sequence[str]
    sources: Sequence[Source]
    corpora: Sequence[Corpus | Pictures]
    licences: Mapping[str, Path]

    @property
    def teachers(self) -> list[Source]:
        """The sources that taught."""
        return [source for source in self.sources if source.what == "teacher"]

    @property
    def outside(self) -> list[Source]:
        """The sources that no stage of the run made."""
        return [source for source in self.sources if source.kind != "stage"]


def origins_of(run: FinishedRun, stage: str) -> Origins:
    """Follow a stage's node through the stages that it names, to what no stage made.

    Raises:
        UserError: when a corpus cannot be read any more, to say what it is.
    """
    behind = run.stages_behind(stage)
    nodes = [run.stages[name] for name in behind]
    sources: dict[str, Source] = {}
    for source in _sources(run, nodes):
        sources.setdefault(source.name, source)
    return Origins(
        stage=stage,
        stages=behind,
        weights=_stages_of_the_weights(run, stage),
        synthetic=[name for name in behind if run.stages[name].get("synthetic")],
        sources=list(sources.values()),
        corpora=_corpora(run, nodes),
        licences=_licence_texts(run, behind),
    )


def _sources(run: FinishedRun, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Source]:
    """Yield what the stages learn from or start from, tokenizers last.

    By house rule a key named `path` is a model; a merge has a second one, `other_path`. A teacher's
    often is its tokenizer's too, or that of the student's first weights, and then it counts as the
    teacher's.
    """
    for node in nodes:
        writes = node["_target_"] in (GENERATE, REWRITE)
        teaches = [node.get("teacher"), node.get("path") if writes else None]
        yield from _models(run, "teacher", teaches, "path")
    for node in nodes:
        yield from _models(run, "initial weights", _starts_of(node), "path")
    for node in nodes:
        package = node.get("package")
        if package is not None and not node.get("synthetic"):
            yield Source("package", f"{package['name']} {package['version']}", "package")
    for node in nodes:
        found = (s for s in _models(run, "tokenizer", [node], "tokenizer_path"))
        yield from (source for source in found if source.kind != "stage")


def _starts_of(node: Mapping[str, Any]) -> list[Any]:
    """Return what a stage's model begins with: nodes of students, and paths of models."""
    return [node.get("student"), node.get("path"), node.get("other_path")]


def _stages_of_the_weights(run: FinishedRun, stage: str) -> list[str]:
    """Return the stages that the weights went through, first to last; a merge has two before it."""
    found, waiting = {stage}, [stage]
    while waiting:
        starts = _starts_of(run.stages[waiting.pop()])
        models = _models(run, "initial weights", starts, "path")
        before = {source.name for source in models if source.kind == "stage"} - found
        waiting += before
        found |= before
    return [name for name in run.stages if name in found]


def _models(run: FinishedRun, what: Any, nodes: Sequence[Any], wanted: str) -> Iterator[Source]:
    for node in nodes:
        for key, path in texts_of(node, wanted):
            if key == wanted:
                made_by = run.stage_of(path)
                outside = Source(what, path, "hub" if is_hub_id(path) else "folder")
                yield outside if made_by is None else Source(what, made_by, "stage")


def _corpora(run: FinishedRun, nodes: Sequence[Mapping[str, Any]]) -> list[Corpus | Pictures]:
    """Read the corpora of the stages, each once."""
    found: list[Mapping[str, Any]] = []
    for node in nodes:
        for holder in (node, node.get("data") or {}):
            corpus = holder.get("corpus") or holder.get("source")
            if corpus is not None and corpus not in found:
                found.append(corpus)
    return [instantiate(run.located(corpus)) for corpus in found]


def _licence_texts(run: FinishedRun, stages: Sequence[str]) -> dict[str, Path]:
    """Find the licence texts in the artifacts of the stages, as far as these are still there."""
    found: dict[str, tuple[str, Path]] = {}
    for stage in stages:
        artifact = run.folder / "stages" / stage
        for path in files_of(artifact) if artifact.is_dir() else ():
            if path.name.upper().startswith(LICENCE_FILES):
                found.setdefault(sha256_of(path), (f"licences/{stage}/{path.name}", path))
    return dict(found.values())
