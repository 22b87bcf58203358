"""A fingerprint changes exactly with what decides a stage's result."""

from pathlib import Path

import pytest

from stillhouse.stages import fingerprint as fp

NODE = {
    "_target_": "stillhouse.stages.fit.Fit",
    "seed": 0,
    "method": {"_target_": "stillhouse.families.sequence.word_kd.word_kd", "temperature": 1.0},
    "trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": 3, "devices": 1},
    "data": {"num_workers": 0, "batch_size": 4},
}


def changed(**changes: object) -> str:
    node = {k: dict(v) if isinstance(v, dict) else v for k, v in NODE.items()}
    for key, value in changes.items():
        place, _, leaf = key.rpartition("__")
        (node[place] if place else node)[leaf] = value
    return fp.fingerprint(node)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"method__temperature": 2.0}, {"data__batch_size": 8}, {"trainer__devices": 2}],
)
def test_what_decides_the_result_changes_it(change) -> None:
    assert changed(**change) != fp.fingerprint(NODE)


@pytest.mark.parametrize(
    "change",
    [{"trainer__devices": [3]}, {"data__num_workers": 2}, {"trainer__log_every_n_steps": 3}],
)
def test_how_and_where_a_stage_runs_does_not(change) -> None:
    assert changed(**change) == fp.fingerprint(NODE)


def test_a_path_outside_counts_as_its_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "weights").write_text("same")
    node = {"_target_": "stillhouse.stages.fit.Fit", "path": str(a)}
    first = fp.fingerprint(node)
    assert fp.fingerprint({**node, "path": str(b)}) == first
    (b / "weights").write_text("other")
    assert fp.fingerprint({**node, "path": str(b)}) != first


def test_a_pattern_counts_as_the_files_that_it_fits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    node = {"_target_": "stillhouse.stages.fit.Fit", "train_path": f"{tmp_path}/*.txt"}
    first = fp.fingerprint(node)
    assert fp.fingerprint(node) == first
    (tmp_path / "a.txt").write_text("other")
    edited = fp.fingerprint(node)
    (tmp_path / "b.txt").write_text("two")
    assert len({first, edited, fp.fingerprint(node)}) == 3


def test_sources_are_followed_through_imports() -> None:
    closure = fp._closure("stillhouse.families.sequence.word_kd")
    assert "stillhouse.objectives.divergences" in closure
    assert "stillhouse.records.language" in closure
    assert "stillhouse.families" in closure, "the packages on the way are imported too"
    assert "stillhouse.families.sequence.module" not in closure


def test_a_teacher_does_not_depend_on_the_loss_that_it_will_serve() -> None:
    closure = fp._closure("stillhouse.families.sequence.module")
    closure |= fp._closure("stillhouse.stages.fit") | fp._closure(
        "stillhouse.families.sequence.sft"
    )
    assert "stillhouse.families.sequence.word_kd" not in closure


def test_an_edited_source_changes_the_hash(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "stillhouse_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from stillhouse_kernels.part import number\n")
    (package / "part.py").write_text("from . import deep\nnumber = 1\n")
    (package / "deep.py").write_text("value = 1\n")
    (package / "apart.py").write_text("value = 1\n")
    monkeypatch.setattr(fp, "_root", lambda name: tmp_path)

    def value() -> str:
        fp.source_hash.cache_clear()
        fp._imports.cache_clear()
        return fp.source_hash("stillhouse_kernels.part.number")

    first = value()
    (package / "apart.py").write_text("value = 2\n")
    assert value() == first
    (package / "deep.py").write_text("value = 2\n")
    assert value() != first
    fp.source_hash.cache_clear()
    fp._imports.cache_clear()
