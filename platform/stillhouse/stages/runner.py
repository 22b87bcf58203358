"""The job `run`: bring a recipe's stages up to date, one after the other.

A stage whose artifact stands and carries the right fingerprint is skipped; a shared one is made
once under a file lock, on demand; one that was killed goes on from what it left in its scratch
folder. `results.json` is written after every stage, also when one fails.
"""

import errno
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from stillhouse.config import overlay, preflight, signatures
from stillhouse.config.essence import explain_differences
from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import CONFIG, LOCK, MANIFEST, SERIES, remove
from stillhouse.stages import artifacts
from stillhouse.stages.artifacts import Manifest
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.stages.workspace import Workspace
from stillhouse.tracking.lineage import StageArtifact
from stillhouse.tracking.report import print_outcome
from stillhouse.tracking.runs import RunRecord, describe_run, is_sweep, read_results
from stillhouse.tracking.tracker import Tracking

# Files of an artifact that are not part of a product.
PRIVATE_FILES = (MANIFEST, SERIES)


@dataclass(frozen=True)
class Step:
    """One line of a plan: a stage and what is to be done about it."""

    stage: str
    state: str
    seconds: float | None = None

    @property
    def is_work(self) -> bool:
        """Whether the stage has to be made or brought to its end."""
        return self.state in ("run", "resume", "rebuild", "forced")


def run_recipe(config: DictConfig, folder: Path) -> None:
    """Run the recipe in `config`, with `folder` as its run directory.

    Raises:
        UserError: when a key, a value, a folder or an outside file keeps a stage from running.
    """
    console = Console(highlight=False, soft_wrap=True)
    quiet_libraries()
    overlay.apply(config)
    workspace = Workspace(run=folder, cache=Path(config.paths.cache).expanduser(), config=config)
    _check_names(workspace)
    preflight.check_devices(config)
    signatures.check(config, workspace.stages)
    _check_references(workspace)
    plan = make_plan(workspace)
    if config.plan:
        _print_plan(plan, workspace, console)
        return

    if is_sweep() and _is_done(config, folder) and not any(step.is_work for step in plan):
        console.print(f"{folder}: done before, skipped")
        return
    _check_trainers(plan, workspace)
    with _storage_errors(workspace), _alone_in(folder):
        _carry_out(plan, workspace, console)


def _carry_out(plan: list[Step], workspace: Workspace, console: Console) -> None:
    """Do what a plan says and keep the run's record."""
    config, folder = workspace.config, workspace.run
    tracking: Tracking = instantiate(config.tracking)
    told = [_as_told(step.stage, workspace) for step in plan if step.state != "not needed"]
    info = describe_run(config, folder, told, workspace.stages[-1])
    record = RunRecord.open(folder, info)
    record.write_config(config)
    try:
        for step in plan:
            if step.state == "not needed":
                continue
            with (
                record.stage(step.stage) as entry,
                _storage_errors(workspace),
                _keys_written_out(workspace, step.stage),
            ):
                manifest, made = _bring_up_to_date(step, workspace, tracking, record, console)
                entry.finish(
                    status="done" if made or not workspace.shared(step.stage) else "cached",
                    seconds=manifest.seconds,
                    metrics=manifest.metrics,
                )
                record.add_models(manifest.models)
                _keep_product(step.stage, workspace)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: python run.py resume={folder}")
        raise
    finally:
        places = (workspace.artifact, workspace.scratch)
        record.gather_series([place(step.stage) for step in plan for place in places])
    record.finish(stopped_early=plan[-1].stage != workspace.stages[-1])
    print_outcome(record, console)


def _is_done(config: DictConfig, folder: Path) -> bool:
    """Whether a job of a sweep that is run again ended well before.

    Raises:
        UserError: when the folder holds a run of another config.
    """
    results = read_results(folder)
    if results is None or not (folder / CONFIG).is_file():
        return False
    saved = OmegaConf.load(folder / CONFIG)
    assert isinstance(saved, DictConfig)
    differences = explain_differences(saved, config)
    if differences:
        raise UserError(
            f"{folder} holds a run whose config differs from this job's {differences}; give the "
            "same keys, or another hydra.sweep.dir"
        )
    return results["status"] == "done" and not config.force


def _forced(config: DictConfig) -> list[str]:
    return [config.force] if isinstance(config.force, str) else list(config.force or [])


def make_plan(workspace: Workspace) -> list[Step]:
    """Say for every stage whether it is done, cached, not needed or has to run."""
    config = workspace.config
    forced = _forced(config)
    stages = workspace.stages
    if config.stop_after is not None:
        stages = stages[: stages.index(config.stop_after) + 1]
    needed = {s for s in stages if not workspace.shared(s) or s == config.stop_after}
    for stage in reversed(stages):
        if stage in needed:
            needed |= workspace.needs(stage)

    plan: list[Step] = []
    for stage in stages:
        manifest = artifacts.read_manifest(workspace.home(stage))
        if stage not in needed:
            state = "not needed"
        elif stage in forced:
            state = "forced"
        elif manifest is not None and manifest.fingerprint == workspace.fingerprint(stage):
            damaged = artifacts.find_damage(workspace.home(stage))
            state = "rebuild" if damaged else "cached" if workspace.shared(stage) else "done"
        elif workspace.home(stage).exists():
            state = "rebuild"
        else:
            scratch = workspace.scratch(stage)
            begun = [*scratch.glob("checkpoints/*"), *scratch.glob("shards/*")]
            state = "resume" if begun else "run"
        plan.append(Step(stage, state, manifest.seconds if manifest else None))
    return plan


def _bring_up_to_date(
    step: Step, workspace: Workspace, tracking: Tracking, record: RunRecord, console: Console
) -> tuple[Manifest, bool]:
    """See that a stage's artifact stands; return its manifest, and whether it was made here."""
    stage = step.stage
    home = workspace.home(stage)
    if not workspace.shared(stage):
        return _make(step, workspace, tracking, record, console)
    _make_folder(workspace.cache)
    lock = FileLock(workspace.cache / f"{home.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"[dim]{stage}: waiting for another run that is making it …[/dim]")
        lock.acquire()
    try:
        manifest, made = _make(step, workspace, tracking, record, console)
    finally:
        lock.release()
    link = workspace.artifact(stage)
    remove(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home.resolve(), target_is_directory=True)
    return manifest, made


def _make(
    step: Step, workspace: Workspace, tracking: Tracking, record: RunRecord, console: Console
) -> tuple[Manifest, bool]:
    """Make a stage's artifact unless it stands whole, perhaps made by another run meanwhile.

    Returns:
        Its manifest, and whether it was made here.
    """
    stage, home, scratch = step.stage, workspace.home(step.stage), workspace.scratch(step.stage)
    fingerprint = workspace.fingerprint(stage)
    manifest = artifacts.read_manifest(home)
    if step.state != "forced" and home.exists():
        damage = artifacts.find_damage(home)
        if manifest is not None and manifest.fingerprint == fingerprint and damage is None:
            return manifest, False
        reason = damage or "it was made by another configuration or another version of the code"
        console.print(f"[yellow]warning:[/yellow] {stage} is made anew: in {home}, {reason}")
    begun_by = scratch / "fingerprint"
    if step.state == "forced" or not begun_by.is_file() or begun_by.read_text() != fingerprint:
        # What lies in the scratch folder was begun by another version of the stage.
        remove(scratch)
    output = scratch / "output"
    remove(output)
    _make_folder(output)
    begun_by.write_text(fingerprint)
    began = time.monotonic()
    node = workspace.node(stage)
    with tracking.stage(record.info, stage, workspace.kind(stage), scratch) as tracker:
        tracker.uses([_as_told(needed, workspace) for needed in sorted(workspace.needs(stage))])
        result: StageResult = instantiate(node, _recursive_=False, _convert_="all")(
            StageContext(stage, output, scratch, tracker, console)
        )
        tracker.summarise(result.metrics, result.models, record.models)
        if (scratch / SERIES).exists():
            shutil.copy2(scratch / SERIES, output / SERIES)
        manifest = artifacts.publish(
            output,
            home,
            fingerprint=fingerprint,
            seconds=time.monotonic() - began,
            metrics=result.metrics,
            models=result.models,
        )
        tracker.made(_as_told(stage, workspace))
    remove(scratch)
    return manifest, True


def _as_told(stage: str, workspace: Workspace) -> StageArtifact:
    return StageArtifact(
        stage, workspace.kind(stage), workspace.fingerprint(stage), workspace.home(stage)
    )


def _keep_product(stage: str, workspace: Workspace) -> None:
    """Copy the recipe's product to `student/` in the run directory, if this stage made it."""
    config = workspace.config
    if config.product is None:
        return
    source = workspace.path_of(f"models.{config.product}")
    target = workspace.run / "student"
    if source != workspace.artifact(stage):
        return
    partial = target.with_name(".student.partial")
    remove(partial)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*PRIVATE_FILES))
    remove(target)
    partial.rename(target)


def quiet_libraries() -> None:
    """Leave the terminal to our own bars: no library's bar, tip or banner among them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)


def _check_names(workspace: Workspace) -> None:
    """Refuse `stop_after` and `force` that name no stage, and a recipe without stages."""
    config = workspace.config
    if not workspace.stages:
        raise UserError("the recipe has no stages; choose one with experiment=<name>")
    forced = _forced(config)
    for key, name in [("stop_after", config.stop_after), *(("force", f) for f in forced)]:
        if name is not None and name not in workspace.stages:
            raise UserError(
                f"{key}={name}: this recipe has no stage of that name; its stages are "
                f"{', '.join(workspace.stages)}{did_you_mean(name, workspace.stages)}"
            )


def _check_references(workspace: Workspace) -> None:
    """Refuse an evaluation against a role that its stage does not have."""
    for stage in workspace.stages:
        node = workspace.config.stages[stage]
        reference = OmegaConf.select(node, "evaluator.reference")
        roles = [role for role, path in (node.get("models") or {}).items() if path is not None]
        if reference is not None and reference not in roles:
            message = (
                f"stages.<stage>.evaluator.reference={reference}: the recipe has no such model; "
                f"its models are {', '.join(roles)}{did_you_mean(reference, roles)}"
            )
            raise UserError(workspace.told(message, stage))


def _check_trainers(plan: list[Step], workspace: Workspace) -> None:
    """Refuse what Lightning or this machine does not have, before any stage has worked for it."""
    from stillhouse.stages.fit import make_trainer

    for step in plan:
        if step.is_work and "trainer" in workspace.config.stages[step.stage]:
            trainer = workspace.node(step.stage)["trainer"]
            make_trainer(step.stage, trainer, logger=False, enable_checkpointing=False)


def _print_plan(plan: list[Step], workspace: Workspace, console: Console) -> None:
    table = Table("stage", "what would happen", "took", "where", title="plan")
    say = {"cached": "taken from the cache", "done": "done, skipped", "run": "run"}
    say |= {"resume": "go on where it stopped", "rebuild": "made anew (it does not match)"}
    say |= {"forced": "run again (force)", "not needed": "left out: no stage needs it"}
    for step in plan:
        took = f"{step.seconds:.0f} s" if step.seconds is not None else ""
        where = str(workspace.home(step.stage)) if workspace.shared(step.stage) else "run directory"
        table.add_row(step.stage, say[step.state], took, where)
    console.print(table)
    full = OmegaConf.select(workspace.config, "product")
    console.print(f"product: {full}; nothing was run")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made: {error.strerror}: {error.filename}; "
            "move what is in its way, or choose another cache with paths.cache=<folder>"
        ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a run directory; two processes in one would tear each other's checkpoints."""
    _make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process is working in this run directory") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _keys_written_out(workspace: Workspace, stage: str) -> Iterator[None]:
    """Name the keys of a stage's message as they are set in this recipe."""
    try:
        yield
    except UserError as error:
        raise type(error)(workspace.told(str(error), stage)) from error


@contextmanager
def _storage_errors(workspace: Workspace) -> Iterator[None]:
    """Turn a full disk, met by whichever library, into one line."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left on device" in str(error):
            name = getattr(error, "filename", None)
            raise UserError(
                f"no space left on the disk{f' for {name}' if name else ''}; free some, or move "
                f"the cache ({workspace.cache}) with paths.cache=<folder>; then go on with "
                f"resume={workspace.run}"
            ) from error
        raise
