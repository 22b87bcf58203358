"""Which folders are runs, and what is read of them."""

from pathlib import Path

import pytest
from fake_runs import make_run

from stillhouse.errors import UserError
from stillhouse.tracking.gather import find_folders, read_runs


def test_sweeps_runs_and_globs_lead_to_runs_once_and_in_order(tmp_path: Path) -> None:
    for name in ("sweep/10", "sweep/2", "other/a[1]", "other/b"):
        make_run(tmp_path / name)
    (tmp_path / "sweep" / "multirun.yaml").write_text("{}")
    entries = ["sweep", "other/a[1]", "*", "sweep/2", "sweep/1*"]
    found = find_folders([str(tmp_path / e) for e in entries])
    names = [p.relative_to(tmp_path).as_posix() for p in found]
    assert names == ["sweep/2", "sweep/10", "other/a[1]", "other/b"]


def test_entries_are_relative_to_here_and_to_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "home" / "a")
    make_run(tmp_path / "here" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert find_folders(["b", "~/a"]) == [Path("b"), tmp_path / "home" / "a"]


def test_an_entry_that_matches_nothing_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "word_kd" / "0")
    with pytest.raises(UserError, match=r"word_k matches nothing in .*did you mean 'word_kd'\?"):
        find_folders([str(tmp_path / "word_kd"), str(tmp_path / "word_k")])
    with pytest.raises(UserError, match=r"x\* matches nothing"):
        find_folders([str(tmp_path / "x*")])
    (tmp_path / "empty").mkdir()
    for entry in ("empty", "emp*"):
        with pytest.raises(UserError, match=r"emp.* holds no run: there is no results.json"):
            find_folders([str(tmp_path / entry)])


def test_runs_that_cannot_be_compared_are_named_with_the_reason(tmp_path: Path) -> None:
    error = "OutOfMemoryError: " + "x" * 5000
    stages = {"tokenizer": {"status": "done"}, "distil": {"status": "failed", "error": error}}
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", status="failed", stages=stages),
        make_run(tmp_path / "c", status="running"),
        make_run(tmp_path / "d", models={}),
        make_run(tmp_path / "e"),
        make_run(tmp_path / "f"),
    ]
    (folders[4] / "results.json").write_text('{"recipe": "word_kd", "sta')
    (folders[5] / "results.json").write_text('["of another kind"]')
    runs, left_out = read_runs(folders)
    assert [run.folder.name for run in runs] == ["a"]
    assert [line.removeprefix(f"{tmp_path}/")[0] for line in left_out] == list("bcdef")
    assert "is left out: its status is failed; stage distil: OutOfMemoryError: x" in left_out[0]
    assert len(left_out[0]) < 500
    assert left_out[1].endswith("is left out: its status is running")
    assert left_out[2].endswith("it is done but has no numbers of models; did its evaluation run?")
    assert left_out[3].endswith("its results.json cannot be read")
    assert left_out[4].endswith("its results.json cannot be read")


def test_only_numbers_are_compared(tmp_path: Path) -> None:
    numbers = {"test_nll": 1.5, "parameters": 3, "name": "x", "nothing": None, "is_good": True}
    (run,), _ = read_runs([make_run(tmp_path / "a", models={"student": numbers})])
    assert run.models == {"student": {"test_nll": 1.5, "parameters": 3}}
