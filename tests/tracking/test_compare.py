"""The job `compare`: what it prints and writes, and its errors."""

import csv
import io
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, run_process
from fake_runs import make_fractions, make_other, make_run, make_word_kd
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from stillhouse.errors import UserError
from stillhouse.schema import Comparison
from stillhouse.tracking import compare, pictures
from stillhouse.tracking.compare import CSV_COLUMNS, Sheet, compare_runs, print_sheet
from stillhouse.tracking.tradeoff import Point, TradeOff

DEFAULT_PICTURE = "quality_against_parameters.png"


def job(**values: Any) -> DictConfig:
    """Return the job's config."""
    return OmegaConf.structured(Comparison(_target_="compare", **values))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_left_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", status="failed")
    wanted = r"none of the runs of .*a can be compared; looked for a results.json"
    with pytest.raises(UserError, match=wanted):
        compare_runs(job(runs=[str(tmp_path / "a")], to=str(tmp_path / "to")), tmp_path)
    assert "warning:" in capsys.readouterr().out
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("values", [{}, {"runs": []}])
def test_runs_must_be_named(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="runs: name the runs to compare"):
        compare_runs(job(**values), tmp_path)


def test_the_job_writes_its_table_its_page_and_its_pictures(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep, to = make_word_kd(tmp_path / "a sweep"), tmp_path / "to"
    make_run(tmp_path / "bad", status="failed")
    entries = [str(sweep), str(tmp_path / "bad")]
    compare_runs(job(runs=entries, baseline="student_alone", to=str(to)), tmp_path)

    names = ["compare.csv", "compare.md", "loss.png", DEFAULT_PICTURE, "report.html"]
    assert sorted(p.name for p in to.iterdir()) == names
    assert all((to / n).read_bytes().startswith(b"\x89PNG") for n in names[2:4])

    rows = rows_of(to / "compare.csv")
    assert tuple(rows[0]) == CSV_COLUMNS
    by_cell = {(r["role"], r["metric"]): r for r in rows}
    assert len(by_cell) == len(rows) == 8  # 3 roles with 2, 2 and 3 metrics, and the gap closed
    student = by_cell["student", "test_nll"]
    assert student["group"] == "word_kd"
    assert float(student["mean"]) == pytest.approx(2.2)
    assert (student["n"], student["pairs"]) == ("3", "3")
    assert float(student["difference"]) == pytest.approx(-0.1)
    half = 4.302652729911275 * 0.05 / math.sqrt(3)  # t at 0.975 with 2 degrees of freedom
    assert float(student["low"]) == pytest.approx(-0.1 - half)
    assert float(student["high"]) == pytest.approx(-0.1 + half)
    alone = by_cell["student_alone", "test_nll"]
    assert [alone[c] for c in ("difference", "low", "high", "pairs")] == [""] * 4
    gap = by_cell["student", "gap_closed"]
    assert float(gap["mean"]) == pytest.approx(0.575 / 3)
    assert float(gap["low"]) < float(gap["mean"]) < float(gap["high"])
    assert gap["difference"] == ""

    page = (to / "compare.md").read_text().splitlines()
    command = page[0].removeprefix("3 runs; made by `").removesuffix("`")
    assert shlex.split(command) == [
        *("python", "run.py", "--config-name", "compare"),
        f'runs=["{entries[0]}",{entries[1]}]',
        "baseline=student_alone",
        f"to={to}",
    ]
    assert "| word_kd | student_alone | 2.3 ± 0.3 (3) | 500 ± 0 (3) |  |" in page
    assert any(
        "| word_kd | student | -0.1 [-0.2242, 0.02421] (3) | 0 [0, 0] (3) |" in p for p in page
    )
    assert any(line.startswith("- ") and "its status is failed" in line for line in page)
    assert "![loss](loss.png)" in page

    printed = capsys.readouterr().out
    assert "warning: " in printed
    assert "2.3 ± 0.3 (3)" in printed
    assert "-0.1 [-0.2242, 0.02421] (3)" in printed
    assert printed.splitlines()[-2:] == [
        f"{to}: {', '.join(names)}",
        f"open {to / 'report.html'} in a browser: all of it on one page",
    ]


def test_without_series_and_sizes_there_are_no_pictures(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "0")
    compare_runs(job(runs=[str(tmp_path / "a")], to=str(tmp_path / "to")), tmp_path)
    names = ["compare.csv", "compare.md", "report.html"]
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == names
    page = (tmp_path / "to" / "compare.md").read_text()
    assert page.startswith("1 run; made by `python run.py ")
    assert "Left out" not in page


def charts_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, runs: Path, **values: Any
) -> tuple[dict[str, TradeOff], str]:
    """Run the job without drawing; return file name -> what it would show, and the page."""
    drawn: dict[str, TradeOff] = {}
    monkeypatch.setattr(
        pictures, "draw_trade_off", lambda chart, path: drawn.update({path.name: chart})
    )
    to = folder / f"to{len(list(folder.iterdir()))}"
    compare_runs(job(runs=[str(runs)], to=str(to), **values), folder)
    return drawn, (to / "compare.md").read_text()


def test_the_size_need_not_be_a_column_and_the_quality_may_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_word_kd(tmp_path / "sweep")
    drawn, page = charts_of(monkeypatch, tmp_path, sweep, metrics=["top1_agreement"])
    ((name, chart),) = drawn.items()
    assert (name, chart.x, chart.y) == (DEFAULT_PICTURE, "parameters", "top1_agreement")
    assert chart.points == {"student": Point(500, 0.5)}
    assert "| group | role | top1_agreement |" in page
    drawn, page = charts_of(monkeypatch, tmp_path, sweep, metrics=["parameters", "test_nll"])
    ((name, chart),) = drawn.items()
    assert (name, chart.x, chart.y) == (DEFAULT_PICTURE, "parameters", "test_nll")
    alone = chart.points["student_alone"]
    assert (alone.x, alone.y, alone.y_sd) == (500, pytest.approx(2.3), pytest.approx(0.3))


def test_metrics_asked_for_on_an_axis_are_columns_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_fractions(tmp_path / "sweep")
    metrics = ["decode_tokens_per_s", "test_nll"]
    drawn, page = charts_of(monkeypatch, tmp_path, sweep, metrics=metrics, x="shared_fraction")
    ((name, chart),) = drawn.items()
    assert name == "quality_against_shared_fraction.png"
    assert (chart.x, chart.y) == ("shared_fraction", "test_nll")
    assert "| group | role | decode_tokens_per_s | test_nll | shared_fraction |" in page
    axes = {"x": "test_nll", "y": "decode_tokens_per_s"}
    drawn, page = charts_of(monkeypatch, tmp_path, sweep, metrics=["parameters"], **axes)
    ((name, chart),) = drawn.items()
    assert name == "decode_tokens_per_s_against_test_nll.png"
    assert (chart.x, chart.y) == ("test_nll", "decode_tokens_per_s")
    assert "| group | role | parameters | test_nll | decode_tokens_per_s |" in page


@pytest.mark.parametrize("key", ["x", "y"])
def test_an_axis_that_no_model_has_is_refused(tmp_path: Path, key: str) -> None:
    sweep = make_fractions(tmp_path / "sweep")
    with pytest.raises(UserError) as caught:
        compare_runs(job(**{"runs": [str(sweep)], key: "share_fraction"}), tmp_path)
    assert str(caught.value) == (
        f"{key}: no model has 'share_fraction'; the runs have test_nll, parameters, "
        "shared_fraction, decode_tokens_per_s; did you mean 'shared_fraction'?"
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"x": "shared_fraction", "y": "teacher_only"},
            "teacher_only_against_shared_fraction.png is left out: no model has shared_fraction "
            "and teacher_only",
        ),
        (
            {"x": "shared_fraction", "metrics": ["shared_fraction"]},
            "quality_against_shared_fraction.png is left out: name a metric with y=<metric>",
        ),
    ],
)
def test_a_picture_that_was_asked_for_and_is_empty_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], line: str
) -> None:
    models = {"teacher": {"teacher_only": 1.0}, "student": {"shared_fraction": 0.5}}
    run = make_run(tmp_path / "run", models=models)
    drawn, page = charts_of(monkeypatch, tmp_path, run, **values)
    assert drawn == {}
    assert page.splitlines()[-1] == f"- {line}"


def test_a_gap_needs_the_test_nll_among_the_columns(tmp_path: Path) -> None:
    sweep, to = make_word_kd(tmp_path / "a"), tmp_path / "to"
    metrics = ["parameters"]
    config = job(runs=[str(sweep)], baseline="student_alone", metrics=metrics, to=str(to))
    compare_runs(config, tmp_path)
    assert {row["metric"] for row in rows_of(to / "compare.csv")} == {"parameters"}


def test_a_baseline_without_pairs_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_word_kd(tmp_path / "a")
    make_other(tmp_path / "b", {7: 1.0})
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    baseline = "method.divergence=reverse_kl"
    compare_runs(job(runs=runs, baseline=baseline, to=str(tmp_path / "to")), tmp_path)
    printed = capsys.readouterr().out
    assert f"warning: baseline={baseline}: no other row has a pair in it (same seed)" in printed
    assert "difference to" not in printed


def test_nothing_half_written_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, to = make_word_kd(tmp_path / "a"), tmp_path / "to"
    to.mkdir()
    (to / "compare.csv").write_text("of before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "draw_trade_off", fail)
    with pytest.raises(UserError, match=r"to=.*: cannot be written: No space left on device"):
        compare_runs(job(runs=[str(sweep)], to=str(to)), tmp_path)
    assert [p.name for p in to.iterdir()] == ["compare.csv"]
    assert (to / "compare.csv").read_text() == "of before"


def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "to").write_text("")
    with pytest.raises(UserError, match=r"to=.*/to: cannot be written: File exists; choose"):
        compare_runs(job(runs=[str(tmp_path / "a")], to=str(tmp_path / "to")), tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        *("outputs/word_kd/*", "a b", "it's", 'say "x"', "~/x", "back\\slash", "ends\\", 'x\\"y'),
        *("a,b", "key=value", "null", "1e3", "2026-01-01_10-00", "out[1]", "(a)", "a{b}", "ä", "."),
    ],
)
def test_the_command_line_is_read_back_as_the_same_values(value: str) -> None:
    config = job(runs=[value, "x"], baseline=value, metrics=[value], x=value, y=value, to=value)
    words = shlex.split(compare.command_line(config))
    assert words[:4] == ["python", "run.py", "--config-name", "compare"]
    overrides = OverridesParser.create().parse_overrides(words[4:])
    read = {o.key_or_group: o.value() for o in overrides}
    read = OmegaConf.merge(OmegaConf.structured(Comparison), read)
    assert read.runs == [value, "x"]
    assert read.baseline == value
    assert read.metrics == [value]
    assert (read.x, read.y) == (value, value)
    assert read.to == value


def test_a_page_keeps_bars_within_their_cell() -> None:
    page = compare.markdown("x", [Sheet("t", ("group", "role", "m"), (("a|b", "r", "1"),))], [], [])
    assert "| a\\|b | r | 1 |" in page


def test_a_terminal_gets_further_tables_and_a_file_gets_a_wide_one() -> None:
    columns = ("group", "role", *(f"metric_{i}" for i in range(8)))
    sheet = Sheet("t", columns, (("sft betas=[0.9,0.95]", "student", *("1.234 (3)",) * 8),))
    for terminal, tables in ((True, 3), (False, 1)):
        file = io.StringIO()
        console = Console(
            file=file, width=80, force_terminal=terminal, color_system=None, soft_wrap=True
        )
        print_sheet(sheet, console)
        lines = file.getvalue().splitlines()
        assert sum("sft betas=[0.9,0.95]" in line for line in lines) == tables
        assert sum(line.count("1.234 (3)") for line in lines) == 8
        assert (max(map(len, lines)) <= 80) == terminal


def compare_in(folder: Path, *overrides: str) -> Finished:
    return run_process(
        "--config-name", "compare", *overrides, folder=folder, cache=folder / "cache"
    )


def test_the_command_compares(tmp_path: Path) -> None:
    make_word_kd(tmp_path / "outputs")
    done = compare_in(tmp_path, "runs=[outputs/*]", "baseline=student_alone", "to=there")
    assert (done.code, done.err) == (0, "")
    assert "-0.1 [-0.2242, 0.02421] (3)" in done.out
    first = (tmp_path / "there" / "compare.md").read_text().splitlines()[0]
    command = "python run.py --config-name compare 'runs=[outputs/*]' baseline=student_alone"
    assert first == f"3 runs; made by `{command} to=there`"


def test_the_command_draws_a_sweep_against_the_metric_asked_for(tmp_path: Path) -> None:
    make_fractions(tmp_path / "outputs")
    done = compare_in(tmp_path, "runs=[outputs]", "x=shared_fraction", "y=test_nll", "to=there")
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "there" / "compare.md").read_text().splitlines()
    command = "python run.py --config-name compare 'runs=[outputs]' x=shared_fraction y=test_nll"
    assert page[0] == f"8 runs; made by `{command} to=there`"
    picture = "test_nll_against_shared_fraction"
    assert page[-1] == f"![{picture}]({picture}.png)"
    assert (tmp_path / "there" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_an_unknown_metric_in_one_line(tmp_path: Path) -> None:
    make_word_kd(tmp_path / "outputs")
    done = compare_in(tmp_path, "runs=[outputs]", "metrics=[test_nl]")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: metrics: no model has 'test_nl'")
    assert "did you mean 'test_nll'?" in done.err
    assert not (tmp_path / "compare").exists()
