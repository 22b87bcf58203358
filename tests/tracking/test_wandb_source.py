"""Runs read from W&B alone: the records of run directories, through the real client."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, run_here
from tracking.laid_runs import GROUP, STAGES, Put
from tracking.public_stub import PublicStub
from tracking.wandb_stub import ENTITY
from wandb.sdk.lib.service.service_connection import ServiceConnection, WandbApiFailedError

from stillhouse.errors import UserError
from stillhouse.tracking.gather import Run, find_folders, read_runs
from stillhouse.tracking.wandb_source import parse_source, read_sources

COMPARE = ("--config-name", "compare")
ONLINE = (*(a for a in TINY if a != "tracking=csv"), "tracking=wandb")


def without_empty_nodes(node: Any) -> Any:
    """Copy a config as W&B's client sends it, without nodes that are empty."""
    if not isinstance(node, dict):
        return node
    return {k: without_empty_nodes(v) for k, v in node.items() if v != {}}


def only(runs: list[Run]) -> Run:
    (run,) = runs
    return run


def test_stages_are_joined_to_the_record_of_their_run(server: PublicStub, put: Put) -> None:
    for stage in STAGES:
        put(stage)
    runs, left_out = read_sources([GROUP])
    run = only(runs)
    assert left_out == []
    assert server.unknown == []
    assert (run.recipe, run.seed, run.config_hash) == ("word_kd", 0, "aaaa")
    assert run.overrides == ("seed=0",)
    assert run.config == {"recipe": "word_kd", "seed": 0, "method": {"temperature": 2.0}}
    # In the order of the table, which a summary of nested keys would not keep.
    assert list(run.models) == ["teacher", "student"]
    assert list(run.models["teacher"]) == ["test_nll", "parameters"]
    assert math.isnan(run.models["student"]["kl_to_teacher"])
    for stage in ("teacher", "distil"):
        own = [row[1:] for row in run.series if row[0] == stage]
        assert sorted(own[:2]) == [(0, "train_loss", 4.0), (0, "val_nll", 3.0)]
        assert own[2][:2] == (5, "val_nll")
        assert math.isnan(own[2][2])
        assert len(own) == 3
    assert run.folder is None
    assert run.name == f"{GROUP}: a"
    address = f"{server.url}/{ENTITY}/stillhouse/runs"
    assert run.leavings.urls == {stage: f"{address}/a-{stage}" for stage in STAGES}


def test_a_stage_from_the_cache_has_the_series_of_who_made_it(server: PublicStub, put: Put) -> None:
    put("teacher", of="elsewhere").fields["groupName"] = "another_sweep"
    for of, seed in (("a", 0), ("b", 1)):
        put("distil", of=of, seed=seed)
        put("evaluate", of=of, seed=seed)
    runs, left_out = read_sources([GROUP])
    assert left_out == []
    assert [run.seed for run in runs] == [0, 1]
    for run in runs:
        assert {row[0] for row in run.series} == {"teacher", "distil"}
        assert "teacher" not in run.leavings.urls
    # An unfinished attempt made nothing.
    server.runs["elsewhere-teacher"].exit_codes = [1]
    runs, _ = read_sources([GROUP])
    assert {row[0] for row in runs[0].series} == {"distil"}
    assert any(line.startswith("no curves of teacher") for line in runs[0].leavings.missing)


def test_what_cannot_be_compared_is_named_with_the_reason(server: PublicStub, put: Put) -> None:
    for stage in STAGES:
        put(stage, of="good")
    put("teacher", of="failed")
    put("distil", of="failed").exit_codes = [1]
    put("teacher", of="now")
    put("distil", of="now")
    put("evaluate", of="now").exit_codes = []
    put("evaluate", of="bare").summary["models"] = "{}"
    del put("teacher", of="stranger").config["artifacts"]
    runs, left_out = read_sources([GROUP])
    assert only(runs).name.endswith(": good")
    assert left_out == [
        f"{GROUP}: failed is left out: its stage distil is failed at W&B, and the run is done with "
        "a finished evaluate",
        f"{GROUP}: now is left out: its stage evaluate is running at W&B, and the run is done with "
        "a finished evaluate",
        f"{GROUP}: bare is left out: it is done but has no numbers of models; did its evaluation "
        "run?",
        f"{GROUP}: 1 W&B runs of the group are left out: their config does not say which run they "
        "are a stage of (written by other code, or by an older version)",
    ]


def test_more_runs_than_a_page_has_are_all_read(server: PublicStub, put: Put) -> None:
    for seed in range(60):
        put("evaluate", of=f"run{seed}", seed=seed)
    runs, _ = read_sources([GROUP])
    assert [run.seed for run in runs] == list(range(60))


@pytest.mark.parametrize(
    "entry", ["wandb:", "wandb:me", "wandb:me/stillhouse", "wandb:me//scm", "wandb:me/stillhouse/"]
)
def test_a_malformed_entry_says_what_is_expected(entry: str) -> None:
    with pytest.raises(UserError, match=r"runs: wandb:.*: expected wandb:<entity>/<project>/<grou"):
        parse_source(entry)


def test_a_group_may_have_slashes() -> None:
    assert parse_source("wandb:me/stillhouse/a/b").group == "a/b"


def test_an_unknown_group_or_project_is_told(server: PublicStub, put: Put) -> None:
    put("evaluate")
    with pytest.raises(UserError, match=r"no run of the group word_k; .* are of word_kd; did you"):
        read_sources([GROUP[:-1]])
    with pytest.raises(
        UserError, match="has no project someone/other that this API key may read; "
    ):
        read_sources([f"wandb:{ENTITY}/other/word_kd"])


def test_what_the_server_refuses_is_told(
    server: PublicStub, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("evaluate")
    with monkeypatch.context() as broken:
        broken.setattr(PublicStub, "_on_runs", None)
        with pytest.raises(UserError, match=r"answers: .*the stub does not know Runs"):
            read_sources([GROUP])
    server.status = 401
    with pytest.raises(UserError, match=f"runs: {GROUP}: {server.url} does not accept the API key"):
        read_sources([GROUP])


def test_a_server_that_does_not_answer_is_told(
    server: PublicStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(*_: Any, **__: Any) -> None:
        raise WandbApiFailedError("the service process is busy and did not respond in time")

    # As the client ends its wait; a real wait may leave its process hanging at the teardown.
    monkeypatch.setattr(ServiceConnection, "api_request", no_answer)
    with pytest.raises(UserError, match=f"W&B server {server.url} does not answer; look at the ne"):
        read_sources([GROUP])


def test_the_command_tells_mistakes_in_one_line(
    capfd, here: Path, server: PublicStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    done = run_here(capfd, *COMPARE, "runs=wandb:me/stillhouse")
    assert done.code == 2
    assert done.err.startswith(
        "error: runs: wandb:me/stillhouse: expected wandb:<entity>/<project>"
    )
    assert run_here(capfd, *COMPARE, "runs=3").err.startswith("error: runs: 3: expected run dir")
    with monkeypatch.context() as alone:
        alone.setenv("WANDB_MODE", "offline")
        done = run_here(capfd, *COMPARE, f"runs={GROUP}")
    assert done.code == 2
    assert done.err == (
        f"error: runs: {GROUP}: W&B is offline here (WANDB_MODE, or `wandb offline`), and this "
        "asks its server; set the variable for this command: WANDB_MODE=online python run.py …\n"
    )
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    done = run_here(capfd, *COMPARE, f"runs=[{GROUP}]")
    assert done.code == 2
    assert done.err == (
        f"error: runs: {GROUP}: there is no W&B API key; log in with `wandb login`, or set "
        "WANDB_API_KEY\n"
    )
    assert not (here / "compare").exists()


def test_the_page_leads_to_w_and_b_alone(capfd, here: Path, put: Put) -> None:
    for stage in STAGES:
        put(stage)
    done = run_here(capfd, *COMPARE, f"runs={GROUP}", "baseline=teacher")
    assert done.code == 0, done.err
    page = (here / "compare" / "report.html").read_text()
    assert 'href="http://127.0.0.1' in page
    assert "/runs/a-evaluate" in page
    assert "no curves" not in page


@pytest.mark.slow(minutes=1)
def test_w_and_b_gives_what_the_run_directories_give(capfd, here: Path, server: PublicStub) -> None:
    words = (*ONLINE, "experiment=word_kd")
    # The second run's teacher and tokenizer come from the cache.
    for seed in (0, 1):
        done = run_here(capfd, *words, f"seed={seed}")
        assert done.code == 0, done.err
    told, left_out = read_sources([GROUP])
    assert left_out == []
    there, _ = read_runs(find_folders(["outputs/word_kd"]))
    assert len(told) == len(there) == 2
    for ours, theirs in zip(told, there, strict=True):
        assert ours.models == theirs.models
        assert [list(m) for m in ours.models.values()] == [list(m) for m in theirs.models.values()]
        assert list(ours.models) == list(theirs.models)
        assert sorted(ours.series) == sorted(theirs.series)
        assert {row[0] for row in ours.series} == {"teacher", "distil", "alone"}
        assert ours.config == without_empty_nodes(theirs.config)
        for name in ("recipe", "config_hash", "seed", "overrides"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.leavings.urls == theirs.leavings.urls

    for runs, to in ((GROUP, "w_and_b"), ("outputs/word_kd", "folders")):
        done = run_here(capfd, *COMPARE, f"runs=[{runs}]", "baseline=teacher", f"to={to}")
        assert done.code == 0, done.err
    for name in ("compare.csv", "loss.png", "quality_against_parameters.png"):
        assert Path("w_and_b", name).read_bytes() == Path("folders", name).read_bytes(), name
    assert server.unknown == []


@pytest.mark.slow(minutes=1)
def test_a_run_that_was_offline_is_read_when_it_was_sent(
    capfd, here: Path, server: PublicStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    with monkeypatch.context() as alone:
        alone.setenv("WANDB_MODE", "offline")
        assert run_here(capfd, *ONLINE).code == 0
    wandb.teardown()  # it stays offline in this process
    assert not server.runs
    offline = Path("outputs/word_kd").glob("*/wandb/offline-run-*")
    subprocess.run([sys.executable, "-m", "wandb", "sync", *offline], check=True)
    told, _ = read_sources([GROUP])
    there, _ = read_runs(find_folders(["outputs/word_kd"]))
    assert only(told).models == only(there).models
    assert sorted(only(told).series) == sorted(only(there).series)
    assert server.unknown == []
