"""Artifacts stand whole or not at all."""

from pathlib import Path

import pytest

from stillhouse.stages.artifacts import find_damage, publish, read_manifest


def sealed(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "a.txt").write_text("one")
    (work / "deep" / "b.bin").write_bytes(b"two")
    publish(work, tmp_path / "home", fingerprint="f", seconds=1.0, metrics={"n": 1}, models={})
    return tmp_path / "home"


def test_a_published_folder_is_whole_and_the_working_one_gone(tmp_path: Path) -> None:
    home = sealed(tmp_path)
    assert find_damage(home) is None
    assert not (tmp_path / "work").exists()
    manifest = read_manifest(home)
    assert manifest is not None
    assert set(manifest.files) == {"a.txt", "deep/b.bin"}
    assert manifest.metrics == {"n": 1}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "oNe", "the checksum of a.txt differs from the manifest's"),
        ("deep/b.bin", "", "the checksum of deep/b.bin differs from the manifest's"),
        ("deep/b.bin", None, "deep/b.bin is missing"),
        ("manifest.json", "{", "manifest.json is missing or cannot be read"),
        ("manifest.json", None, "manifest.json is missing or cannot be read"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, content, said: str) -> None:
    home = sealed(tmp_path)
    if content is None:
        (home / name).unlink()
    else:
        (home / name).write_text(content)
    assert find_damage(home) == said


def test_publishing_replaces_what_stood_there(tmp_path: Path) -> None:
    home = sealed(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    (work / "c.txt").write_text("new")
    publish(work, home, fingerprint="g", seconds=1.0, metrics={}, models={})
    assert [p.name for p in home.iterdir()] == ["c.txt", "manifest.json"] or {
        p.name for p in home.iterdir()
    } == {"c.txt", "manifest.json"}
