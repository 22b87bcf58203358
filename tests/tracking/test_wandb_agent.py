"""`wandb sweep` and `wandb agent` as a user starts them, against a server on loopback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from commands import ROOT, environment
from tracking.public_stub import PublicStub
from tracking.sweep_stub import SWEEP, SweepStub
from tracking.wandb_stub import ENTITY, KEY, wandb_stub

from stillhouse.tracking.wandb_source import read_sources


class Stub(SweepStub, PublicStub):
    """A server whose sweep is worked on, and whose runs are read."""


def door(stub: Stub, here: Path) -> dict[str, str]:
    """Return the variables that lead a client to the stub."""
    return {
        "WANDB_BASE_URL": stub.url,
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "online",
        "NETRC": str(here / "no netrc"),
    }


def client(stub: Stub, here: Path, *words: str) -> str:
    """Run W&B's command line in the checkout; return what it says."""
    told = environment(here / "cache") | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_DIR": str(here),
        **door(stub, here),
    }
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *words],
        cwd=ROOT,
        env=told,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", ["word_kd_grid", "word_kd_bayes"])
def test_an_agent_trains_what_the_engine_asks_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = yaml.safe_load((ROOT / f"conf/wandb_sweep/{name}.yaml").read_text())
    place = config["command"].index("${args_no_hyphens}")
    config["command"][place:place] = ["debug=tiny", f"paths.outputs={here}/outputs"]
    (here / "sweep.yaml").write_text(yaml.safe_dump(config))
    with wandb_stub(Stub) as stub:
        said = client(stub, here, "sweep", str(here / "sweep.yaml"))
        assert "schema violations" not in said
        path = f"{ENTITY}/stillhouse/{SWEEP}"
        assert re.sub(r"\x1b\[\d*m", "", said).rstrip().endswith(f"wandb agent {path}")
        client(stub, here, "agent", "--count", "2", path)
        assert stub.unknown == []
        assert stub.sweep is not None
        assert list(stub.sweep.given) == ["given0", "given1"]
        assert stub.sweep.given["given0"] != stub.sweep.given["given1"]

        for run_id, values in stub.sweep.given.items():
            run = stub.runs[run_id]
            assert run.fields["sweep"] == SWEEP
            assert run.fields["jobType"] == "distil"
            assert run.begun == 1
            assert run.exit_codes == [0]
            metric = config["metric"]["name"]
            assert run.summary[metric] == [r[metric] for r in run.history if metric in r][-1]
            for key, value in values.items():
                group, _, last = key.partition(".")
                assert run.config[key] == run.config[group][last] == value
        others = [run for run in stub.runs.values() if run.id not in stub.sweep.given]
        assert all(run.fields.get("sweep") is None for run in others)
        assert all(run.fields["groupName"] == SWEEP for run in stub.runs.values())
        # What the runs share is made once; the two runs' other stages have a run each.
        assert sorted(run.fields["jobType"] for run in others) == sorted(
            ["tokenizer", "teacher", *["alone", "evaluate"] * 2]
        )

        for key, value in door(stub, here).items():
            monkeypatch.setenv(key, value)
        wandb.teardown()
        runs, left_out = read_sources([f"wandb:{path}"])
        wandb.teardown()
        assert left_out == []
        addresses = [run.leavings.urls["distil"] for run in runs]
        assert [a.rpartition("/")[2] for a in addresses] == list(stub.sweep.given)
    results = list((here / "outputs").glob("word_kd/*/results.json"))
    assert len(results) == 2
