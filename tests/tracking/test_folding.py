"""Groups of repeats, their differences and the gaps they close: numbers by hand and by scipy."""

import os
from pathlib import Path

import pytest
from fake_runs import ALONE, STUDENT, make_other, make_run, make_word_kd
from scipy import stats

from stillhouse.errors import UserError
from stillhouse.tracking.baselines import choose_baseline
from stillhouse.tracking.folding import (
    Cell,
    Group,
    choose_metrics,
    close_gaps,
    fold,
    fold_curves,
    group_runs,
    short_labels,
)
from stillhouse.tracking.gather import find_folders, read_runs


def groups_of(*entries: Path) -> list[Group]:
    """Read and group the runs, none of them left out."""
    runs, left_out = read_runs(find_folders([str(e) for e in entries]))
    groups, older = group_runs(runs)
    assert left_out == older == []
    return groups


def cell_of(cells: list[Cell], role: str, metric: str = "test_nll", group: str = "") -> Cell:
    """Return the one cell of a role and a metric."""
    (found,) = (c for c in cells if (c.role, c.metric) == (role, metric) and group in c.group)
    return found


def test_labels_tell_only_what_sets_groups_apart(tmp_path: Path) -> None:
    common = ["experiment=word_kd", "+debug=tiny"]
    mute = ["seed=1", "tracking.mode=offline", "tracking=csv", "paths.cache=x", "hydra.run.dir=y"]
    mute += ["hydra/launcher=joblib", "resume=z", "trainer.accelerator=cpu"]
    make_run(tmp_path / "a", overrides=[*common, *mute, "++method.temperature=1"], config_hash="a")
    make_run(tmp_path / "b", overrides=[*common, "method.temperature=2"], config_hash="b")
    make_run(tmp_path / "c", recipe="sft", overrides=common, config_hash="c")
    labels = [g.label for g in groups_of(tmp_path)]
    assert labels == ["word_kd method.temperature=1", "word_kd method.temperature=2", "sft"]
    assert [g.label for g in groups_of(tmp_path / "b")] == ["word_kd"]


def test_an_override_that_only_some_repeats_spell_out_does_not_label_them(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0, overrides=["method.temperature=1"])
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", overrides=["method.temperature=2"], config_hash="b")
    assert [g.label for g in groups_of(tmp_path)] == ["word_kd", "word_kd method.temperature=2"]


def test_groups_that_no_override_tells_apart_carry_their_hash(tmp_path: Path) -> None:
    make_run(tmp_path / "a", config_hash="123456789")
    make_run(tmp_path / "b", config_hash="abcdefghi")
    assert [g.label for g in groups_of(tmp_path)] == ["word_kd #123456", "word_kd #abcdef"]


def test_of_two_runs_of_a_seed_the_newer_counts(tmp_path: Path) -> None:
    for name, number, age in (("a", 1.0, 20), ("b", 2.0, 0), ("c", 3.0, 10)):
        folder = make_run(tmp_path / name, models={"student": {"test_nll": number}})
        written = 1_700_000_000 - age
        os.utime(folder / "results.json", (written, written))
    runs, _ = read_runs(find_folders([str(tmp_path)]))
    (group,), left_out = group_runs(runs)
    assert group.values("student", "test_nll") == {0: 2.0}
    a, b, c = (tmp_path / name for name in "abc")
    newer = "is left out: {} is a newer run of its seed"
    assert left_out == [f"{a} {newer.format(b)}", f"{c} {newer.format(b)}"]


def test_metrics_are_in_the_order_of_their_first_appearance(tmp_path: Path) -> None:
    groups = groups_of(make_word_kd(tmp_path / "sweep"))
    assert choose_metrics(groups, None) == ["test_nll", "parameters", "top1_agreement"]
    wanted = ["parameters", "test_nll", "parameters"]
    assert choose_metrics(groups, wanted) == ["parameters", "test_nll"]
    with pytest.raises(UserError, match=r"no model has 'test_nl'; .*did you mean 'test_nll'\?"):
        choose_metrics(groups, ["test_nl"])


# Folding


def test_seeds_are_folded_into_mean_and_sample_deviation(tmp_path: Path) -> None:
    cells = fold(groups_of(make_word_kd(tmp_path / "sweep")), ["test_nll", "top1_agreement"], None)
    assert [(c.role, c.metric) for c in cells] == [
        ("teacher", "test_nll"),
        ("student_alone", "test_nll"),
        ("student", "test_nll"),
        ("student", "top1_agreement"),
    ]
    alone = cell_of(cells, "student_alone").value
    # 2.0, 2.6, 2.3: deviations -0.3, 0.3, 0; squares sum to 0.18; over n - 1 = 2.
    assert (alone.mean, alone.sd, alone.n) == (pytest.approx(2.3), pytest.approx(0.3), 3)
    assert all(c.difference is None for c in cells)


def test_a_role_is_compared_with_the_baseline_of_its_own_run(tmp_path: Path) -> None:
    groups = groups_of(make_word_kd(tmp_path / "sweep"))
    cells = fold(groups, ["test_nll"], choose_baseline(groups, "student_alone"))
    assert cell_of(cells, "student_alone").difference is None
    found = cell_of(cells, "student").difference
    assert found is not None
    # -0.1, -0.15, -0.05: deviations 0, -0.05, 0.05; squares sum to 0.005; over 2.
    assert (found.mean, found.sd, found.n) == (pytest.approx(-0.1), pytest.approx(0.05), 3)
    paired = stats.ttest_rel([STUDENT[s] for s in range(3)], [ALONE[s] for s in range(3)])
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))


def test_one_pair_has_no_interval(tmp_path: Path) -> None:
    groups = groups_of(make_word_kd(tmp_path / "sweep", seeds=(1,)))
    cells = fold(groups, ["test_nll"], choose_baseline(groups, "student_alone"))
    found = cell_of(cells, "student").difference
    assert found is not None
    assert (found.mean, found.n, found.low, found.high) == (pytest.approx(-0.15), 1, None, None)


def test_a_group_is_compared_with_the_picked_one_by_equal_seeds(tmp_path: Path) -> None:
    other = {3: 9.0, 2: 2.0, 1: 2.5}
    groups = groups_of(make_word_kd(tmp_path / "a"), make_other(tmp_path / "b", other))
    baseline = choose_baseline(groups, "method.divergence=reverse_kl")
    cells = fold(groups, ["test_nll"], baseline)
    with_difference = [(c.group, c.role) for c in cells if c.difference]
    assert with_difference == [("word_kd", "student")]  # it has no teacher, no student_alone
    found = next(c.difference for c in cells if c.difference)
    # seed 1: 2.45 - 2.5 = -0.05; seed 2: 2.25 - 2.0 = 0.25; seeds 0 and 3 have no partner.
    assert (found.mean, found.n) == (pytest.approx(0.1), 2)
    paired = stats.ttest_rel([2.45, 2.25], [2.5, 2.0])
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))


@pytest.mark.parametrize(
    "text",
    ["method.temperature=2", "method.divergence=reverse_kl", "+x=1e-3", "recipe=sft", "method=kd"],
)
def test_a_value_picks_by_override_by_config_and_by_recipe(tmp_path: Path, text: str) -> None:
    config = {"method": {"temperature": 2.0, "divergence": "reverse_kl"}}
    overrides = ["+x=0.001", "method=kd"]
    make_run(tmp_path / "a", config={"method": {"temperature": 1.0, "divergence": "forward_kl"}})
    make_run(tmp_path / "b", recipe="sft", config=config, config_hash="b", overrides=overrides)
    groups = groups_of(tmp_path)
    baseline = choose_baseline(groups, text.removeprefix("+"))
    assert baseline is not None
    assert baseline.group is groups[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student_alon", "no run has a model of that role; .* did you mean 'student_alone'"),
        ("method.divergense=x", "no run has the key .* did you mean 'method.divergence'"),
        (
            "method.divergence=reverse",
            "no run has that value; the runs have method.divergence=reverse_kl; did you mean "
            "'reverse_kl'",
        ),
        ("recipe=word_kd", "it picks 2 groups, expected one: word_kd; word_kd method.divergence="),
    ],
)
def test_a_baseline_that_is_not_there_is_told_with_near_names(
    tmp_path: Path,
    text: str,
    message: str,
) -> None:
    groups = groups_of(make_word_kd(tmp_path / "a"), make_other(tmp_path / "b", {0: 1.0}))
    with pytest.raises(UserError, match=f"baseline={text}: {message}"):
        choose_baseline(groups, text)


def test_gap_closed_is_a_ratio_a_seed(tmp_path: Path) -> None:
    groups = groups_of(make_word_kd(tmp_path / "a"), make_other(tmp_path / "b", {0: 1.0}))
    (cell,), left_out = close_gaps(groups, "student_alone")
    assert left_out == []
    assert (cell.group, cell.role, cell.metric) == ("word_kd", "student", "gap_closed")
    # 0.1 / 0.5, 0.15 / 0.6, 0.05 / 0.4; the ratio of the means would be 0.2.
    ratios = [0.2, 0.25, 0.125]
    assert cell.value.mean == pytest.approx(sum(ratios) / 3)
    wanted = stats.t.interval(0.95, 2, loc=sum(ratios) / 3, scale=stats.sem(ratios))
    assert (cell.value.low, cell.value.high) == pytest.approx(wanted)


def test_there_is_no_gap_to_close_behind_a_poor_teacher(tmp_path: Path) -> None:
    models = {"teacher": {"test_nll": 3.0}, "alone": {"test_nll": 2.0}, "s": {"test_nll": 1.0}}
    make_run(tmp_path / "a", models=models)
    cells, (line,) = close_gaps(groups_of(tmp_path), "alone")
    assert cells == []
    assert "its teacher is not better than alone" in line


def test_curves_are_folded_over_the_steps_that_all_repeats_have(tmp_path: Path) -> None:
    series = {0: [(0, 3.0), (5, 2.0)], 1: [(0, 5.0), (5, 3.0), (9, 1.0)]}
    for seed, curve in series.items():
        rows = [("distil", step, "val_nll", value) for step, value in curve]
        make_run(tmp_path / str(seed), seed=seed, series=[*rows, ("distil", 7, "train_loss", 0.0)])
    bands = fold_curves(groups_of(tmp_path), "val_nll")
    (band,) = bands.values()
    assert list(bands) == [("word_kd", "distil")]
    assert (band.steps, band.mean) == ((0, 5), (4.0, 2.5))
    assert (band.low, band.high) == ((3.0, 2.0), (5.0, 3.0))
    assert fold_curves(groups_of(tmp_path), "val_loss") == {}


def test_what_all_groups_share_is_shown_once() -> None:
    values = {("a", "teacher"): 1, ("b", "teacher"): 1, ("a", "student"): 1, ("b", "student"): 2}
    assert short_labels(values) == {"teacher": 1, "a: student": 1, "b: student": 2}
