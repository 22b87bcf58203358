"""What a run says when it is over."""

from pathlib import Path

from stillhouse.tracking.report import collect_pictures


def test_pictures_of_stages_are_collected(tmp_path: Path) -> None:
    shared = tmp_path / "cache" / "analyse-1234"
    for folder in (shared, tmp_path / "stages" / "sharing", tmp_path / "stages" / "distil"):
        folder.mkdir(parents=True)
    (tmp_path / "stages" / "analyse").symlink_to(shared)
    (shared / "scores.png").write_bytes(b"scores")
    (tmp_path / "stages" / "sharing" / "sharing.png").write_bytes(b"sharing")
    drawn = {"analyse_scores.png": "analyse", "sharing.png": "sharing"}
    assert collect_pictures(tmp_path) == drawn
    assert collect_pictures(tmp_path) == drawn, "a resumed run finds them there"
    assert (tmp_path / "pictures" / "analyse_scores.png").read_bytes() == b"scores"
    assert (tmp_path / "pictures" / "sharing.png").read_bytes() == b"sharing"


def test_a_run_without_pictures(tmp_path: Path) -> None:
    assert collect_pictures(tmp_path) == {}
    assert not (tmp_path / "pictures").exists()
