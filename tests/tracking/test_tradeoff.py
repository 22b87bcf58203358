"""Quality against another metric: what is joined, what stands alone, and how it is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import make_fractions, make_run, make_word_kd
from matplotlib.figure import Figure

from stillhouse.tracking import pictures
from stillhouse.tracking.folding import Group, group_runs
from stillhouse.tracking.gather import find_folders, read_runs
from stillhouse.tracking.tradeoff import Point, TradeOff, choose_quality, trade_off

FRACTIONS = (0.0, 0.2, 0.4, 0.8)


def groups_of(*entries: Path) -> list[Group]:
    """Read and group the runs, none of them left out."""
    runs, left_out = read_runs(find_folders([str(e) for e in entries]))
    groups, older = group_runs(runs)
    assert left_out == older == []
    return groups


def make_student(folder: Path, x: float, *overrides: str, y: float = 2.0, **values: Any) -> None:
    """Write a run with nothing but a student that has `size` x and a test NLL."""
    make_run(
        folder,
        config_hash=folder.name,
        overrides=list(overrides),
        models={"student": {"size": x, "test_nll": y}},
        **values,
    )


def xs_of(chart: TradeOff) -> dict[str, list[float]]:
    return {label: [p.x for p in curve] for label, curve in chart.curves.items()}


def test_a_sweep_is_a_curve_a_role_with_the_deviation_of_its_seeds(tmp_path: Path) -> None:
    chart = trade_off(groups_of(make_fractions(tmp_path)), "shared_fraction", "test_nll")
    assert xs_of(chart) == {"student": [*FRACTIONS], "continual": [*FRACTIONS]}
    # Seeds 0 and 1 are 0.1 apart: mean + 0.05, deviation 0.1 / sqrt(2).
    for role, slope in (("student", 0), ("continual", 1)):
        wanted = [2.05 + f**2 + slope * f for f in FRACTIONS]
        assert [p.y for p in chart.curves[role]] == pytest.approx(wanted)
        assert [p.y_sd for p in chart.curves[role]] == pytest.approx([0.1 / 2**0.5] * 4)
        assert [p.x_sd for p in chart.curves[role]] == [0.0] * 4
    assert (chart.points, chart.levels) == ({}, {"teacher": 1.9})


def test_a_role_with_one_place_is_a_point_and_one_run_has_no_deviation(tmp_path: Path) -> None:
    chart = trade_off(groups_of(make_fractions(tmp_path)), "parameters", "test_nll")
    assert list(chart.curves) == ["student", "continual"]
    assert (chart.points, chart.levels) == ({"teacher": Point(1000, 1.9)}, {})
    groups = groups_of(make_word_kd(tmp_path / "kd", seeds=(1,)))
    assert trade_off(groups, "parameters", "test_nll").points["student"] == Point(500, 2.45)


def test_without_a_curve_there_is_nothing_to_draw_a_level_for(tmp_path: Path) -> None:
    models = {"teacher": {"test_nll": 1.0}, "student": {"test_nll": 2.0, "size": 5}}
    make_run(tmp_path / "a", models=models)
    chart = trade_off(groups_of(tmp_path), "size", "test_nll")
    assert (chart.curves, chart.points, chart.levels) == ({}, {"student": Point(5, 2)}, {})


def test_a_role_with_a_place_in_one_group_is_no_level_in_another(tmp_path: Path) -> None:
    make_fractions(tmp_path / "a")
    make_word_kd(tmp_path / "b", seeds=(0,))
    chart = trade_off(groups_of(tmp_path / "a", tmp_path / "b"), "shared_fraction", "test_nll")
    assert list(chart.curves) == ["student", "continual"]
    assert chart.levels == {"echoatt: teacher": 1.9, "word_kd: teacher": 1.5, "student_alone": 2.0}


def test_a_second_setting_is_a_second_curve(tmp_path: Path) -> None:
    make_fractions(tmp_path / "a")
    make_fractions(tmp_path / "b", "method.temperature=2", shift=1.0)
    groups = groups_of(tmp_path / "a", tmp_path / "b")
    chart = trade_off(groups, "shared_fraction", "test_nll")
    other = "echoatt method.temperature=2"
    labels = ["echoatt: student", f"{other}: student", "echoatt: continual", f"{other}: continual"]
    assert xs_of(chart) == {label: [*FRACTIONS] for label in labels}
    assert chart.curves[labels[1]][0].y - chart.curves[labels[0]][0].y == pytest.approx(1.0)
    assert chart.levels == {"teacher": 1.9}


def test_two_values_of_the_swept_key_that_come_to_the_same_keep_the_curve(tmp_path: Path) -> None:
    for key, x in ((1, 5.0), (2, 5.0), (3, 7.0)):
        make_student(tmp_path / str(key), x, f"student.blocks={key}")
    chart = trade_off(groups_of(tmp_path), "size", "test_nll")
    assert xs_of(chart) == {"student": [5.0, 5.0, 7.0]}


def test_keys_that_change_together_make_one_curve(tmp_path: Path) -> None:
    for n in (1, 3, 2):
        make_student(tmp_path / str(n), n, f"student.blocks={n}", f"optimizer.lr={n}")
    assert xs_of(trade_off(groups_of(tmp_path), "size", "test_nll")) == {"student": [1, 2, 3]}


def test_recipes_are_not_joined_and_a_point_beside_a_curve_tells_its_group(tmp_path: Path) -> None:
    for n in (1, 2):
        make_student(tmp_path / str(n), n, f"student.blocks={n}", f"optimizer.lr={n}")
    make_student(tmp_path / "3", 1, "student.blocks=3", recipe="sft")
    chart = trade_off(groups_of(tmp_path), "size", "test_nll")
    assert xs_of(chart) == {"word_kd: student": [1, 2]}
    assert chart.points == {"sft student.blocks=3: student": Point(1, 2.0)}


def test_groups_of_one_place_that_no_override_tells_apart_are_not_joined(tmp_path: Path) -> None:
    for n, x in enumerate((1, 2, 1)):
        make_student(tmp_path / str(n), x, y=2.0 + n)
    chart = trade_off(groups_of(tmp_path), "size", "test_nll")
    assert chart.curves == {}
    points = {"word_kd #0": Point(1, 2), "word_kd #1": Point(2, 3), "word_kd #2": Point(1, 4)}
    assert chart.points == {f"{label}: student": point for label, point in points.items()}


def test_what_a_recipe_shares_is_shown_once(tmp_path: Path) -> None:
    make_fractions(tmp_path / "a")
    make_word_kd(tmp_path / "b", seeds=(0,))
    chart = trade_off(groups_of(tmp_path / "a", tmp_path / "b"), "parameters", "test_nll")
    assert chart.points == {
        "echoatt: teacher": Point(1000, 1.9),
        "word_kd: teacher": Point(2000, 1.5),
        "student_alone": Point(500, 2.0),
        "word_kd: student": Point(500, 1.9),
    }
    assert list(chart.curves) == ["echoatt: student", "continual"]


@pytest.mark.parametrize(("x", "y"), [(float("inf"), 1.0), (1.0, float("nan"))])
def test_a_number_without_a_place_is_left_out(tmp_path: Path, x: float, y: float) -> None:
    make_student(tmp_path / "a", x, y=y)
    chart = trade_off(groups_of(tmp_path), "size", "test_nll")
    assert (chart.curves, chart.points, chart.levels) == ({}, {}, {})


@pytest.mark.parametrize(
    ("metrics", "x", "y", "wanted"),
    [
        (["accuracy", "test_nll"], "parameters", None, "test_nll"),
        (["accuracy", "test_nll"], "parameters", "accuracy", "accuracy"),
        (["accuracy", "test_nll"], "test_nll", None, "accuracy"),
        (["parameters", "accuracy"], "parameters", None, "accuracy"),
        (["parameters"], "parameters", None, None),
    ],
)
def test_the_quality_is_the_test_nll_unless_another_is_asked_for(
    metrics: list[str], x: str, y: str | None, wanted: str | None
) -> None:
    assert choose_quality(metrics, x, y) == wanted


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are drawn, as they are closed."""
    drawn: list[Figure] = []
    close = pictures.plt.close

    def keep(figure: Figure) -> None:
        drawn.append(figure)
        close(figure)

    monkeypatch.setattr(pictures.plt, "close", keep)
    return drawn


def test_curves_have_one_entry_and_bars_each_and_levels_are_dashed(
    tmp_path: Path, figures: list[Figure]
) -> None:
    curves = {"a": (Point(0, 1, 0, 0.25), Point(1, 2)), "b": (Point(0, 3), Point(1, 4))}
    chart = TradeOff("x", "y", curves, {"p$": Point(0.5, 5)}, {"teacher": 0.5})
    pictures.draw_trade_off(chart, tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    (a, _, bars), (b, _, no_bars), (p, _, none) = map(tuple, axis.containers)
    assert a.get_xydata().tolist() == [[0, 1], [1, 2]]
    assert b.get_xydata().tolist() == [[0, 3], [1, 4]]
    assert [line.get_linestyle() for line in (a, b, p)] == ["-", "-", "None"]
    assert len({line.get_color() for line in (a, b, p)}) == 3
    assert bars[0].get_segments()[0].tolist() == [[0, 0.75], [0, 1.25]]
    assert no_bars == none == ()
    (level,) = (line for line in axis.lines if line.get_linestyle() == "--")
    assert np.asarray(level.get_ydata()).tolist() == [0.5, 0.5]
    assert level.get_label() == "teacher"
    legend = axis.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"a", "b", "teacher"}
    assert [text.get_text() for text in axis.texts] == [r"p\$"]
    assert axis.get_title() == "y against x"


def test_points_alone_need_no_legend(tmp_path: Path, figures: list[Figure]) -> None:
    pictures.draw_trade_off(TradeOff("x", "y", {}, {"p": Point(1, 2)}, {}), tmp_path / "x.png")
    assert figures[0].axes[0].get_legend() is None


@pytest.mark.parametrize(
    ("metric", "values", "scale"),
    [
        ("parameters", (90, 100), "log"),
        ("parameters", (0, 100), "linear"),
        ("latency_ms", (2, 9), "log"),
        ("latency_ms", (2, 8), "linear"),
        ("latency_ms", (-1, 9), "linear"),
        ("shared_fraction", (0.0, 0.77), "linear"),
        ("shared_fraction", (0.05, 0.77), "linear"),
    ],
)
def test_the_axis_is_logarithmic_for_sizes_and_what_spans_many(
    tmp_path: Path, figures: list[Figure], metric: str, values: tuple[float, float], scale: str
) -> None:
    curve = tuple(Point(x, 1) for x in values)
    pictures.draw_trade_off(TradeOff(metric, "y", {"a": curve}, {}, {}), tmp_path / "x.png")
    assert figures[0].axes[0].get_xscale() == scale


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((500, 3000), ["500", "1k", "2k"]),
        ((880, 1000), ["900", "950", "1k"]),
        ((1e4, 1e9), ["10k", "100k", "1M", "10M", "100M", "1G"]),
    ],
)
def test_a_logarithmic_axis_has_numbers_to_read(
    tmp_path: Path, figures: list[Figure], values: tuple[float, float], ticks: list[str]
) -> None:
    curve = tuple(Point(x, 1) for x in values)
    pictures.draw_trade_off(TradeOff("parameters", "y", {"a": curve}, {}, {}), tmp_path / "x.png")
    axis = figures[0].axes[0]
    low, high = axis.get_xlim()
    shown = [t.get_text() for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ticks


def test_a_deviation_beyond_zero_fits_a_logarithmic_axis(
    tmp_path: Path, figures: list[Figure]
) -> None:
    curve = (Point(2, 1, 3.0, 0.1), Point(20, 2))
    pictures.draw_trade_off(TradeOff("latency_ms", "y", {"a": curve}, {}, {}), tmp_path / "x.png")
    low, high = figures[0].axes[0].get_xlim()
    assert 0.5 < low < 2
    assert 20 < high < 40
