"""What a run says when it is over."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from stillhouse.tracking.report import collect_pictures, print_results


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


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_name_and_no_number_is_cut_on_a_narrow_terminal(width: int) -> None:
    roles = ["seed", "pruned", "random_run", "sft", "self_data", "merged"]
    names = ["accuracy_chain_sum", "accuracy_products", "parameters"]
    models = {r: dict.fromkeys(names, 51968000 + i) for i, r in enumerate(roles)}
    printed = io.StringIO()
    print_results("a recipe", models, Console(file=printed, width=width))
    tables = printed.getvalue().count("a recipe")
    assert tables == {40: 6, 80: 2, 200: 1}[width]
    for word in [*names, *roles, *(f"51,968,{i:03d}" for i in range(6))]:
        assert word in printed.getvalue()
    assert printed.getvalue().count("accuracy_products") == tables
    assert max(map(len, printed.getvalue().splitlines())) <= width
