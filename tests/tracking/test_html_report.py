"""The page of a comparison: what it shows, that its links hold, and that no input breaks it."""

import json
import math
from pathlib import Path
from urllib.parse import unquote

import pytest
from fake_runs import make_fractions, make_other, make_run, make_word_kd
from PIL import Image
from report_pages import compare, draw_samples, links, parse, section, write_texts

from stillhouse.files import WANDB_URLS
from stillhouse.tracking import folding
from stillhouse.tracking.gather import find_folders, read_runs
from stillhouse.tracking.report import format_number

EVIL = '<script>alert("x")</script>&"\'\x00\x14'


def test_every_number_of_the_table_is_the_folded_one(tmp_path: Path) -> None:
    sweep = make_word_kd(tmp_path / "a sweep")
    page = parse(compare(tmp_path, sweep, baseline="student_alone"))
    runs, _ = read_runs(find_folders([str(sweep)]))
    groups, _ = folding.group_runs(runs)
    metrics = folding.choose_metrics(groups, None)
    baseline = folding.Baseline("student_alone", role="student_alone")
    cells = {(c.role, c.metric): c for c in folding.fold(groups, metrics, baseline)}
    gaps, _ = folding.close_gaps(groups, "student_alone")
    cells |= {(c.role, c.metric): c for c in gaps}

    (table,) = section(page, "numbers").all("table")
    heads = [th.all("span")[0].text for th in table.all("thead")[0].all("th")[2:]]
    assert heads == [*metrics, "gap_closed"]
    seen = set()
    for row in table.all("tbody")[0].all("tr"):
        role = row.all("th")[1].text
        for metric, cell in zip(heads, row.all("td"), strict=True):
            if cell.text == "–":
                continue
            expected = cells[role, metric]
            seen.add((role, metric))
            numbers = [float(d.attributes["value"] or "") for d in cell.all("data")]
            wanted = [expected.value.mean]
            wanted += [expected.difference.mean] if expected.difference else []
            assert numbers == wanted
            assert float(cell.attributes["data-value"] or "") == expected.value.mean
            own = groups[0].values(role, metric)
            if metric != "gap_closed":
                repeats = [li.text for li in cell.all("li")]
                assert repeats == [f"seed {s}: {format_number(v)}" for s, v in own.items()]
    assert seen == set(cells)
    student = next(r for r in table.all("tr") if r.all("th")[1].text == "student")
    assert "2.2 ± 0.2784" in student.text
    assert "-0.1 [-0.2242, 0.02421]" in student.text


def test_a_difference_is_called_better_or_worse_where_its_interval_leaves_zero_out(
    tmp_path: Path,
) -> None:
    for seed in range(3):
        models = {
            "student_alone": {"test_nll": 2.0 + seed, "accuracy": 0.5, "unheard_of": 1.0},
            "student": {"test_nll": 1.5 + seed + seed / 100, "accuracy": 0.4, "unheard_of": 2.0},
        }
        make_run(tmp_path / "runs" / str(seed), seed=seed, models=models)
    page = parse(compare(tmp_path, tmp_path / "runs", baseline="student_alone"))
    (_, row) = section(page, "numbers").all("tbody")[0].all("tr")
    assert [[em.text for em in td.all("em")] for td in row.all("td")] == [["better"], ["worse"], []]


def test_links_lead_to_what_is_there_and_no_other_address_is_in_the_page(tmp_path: Path) -> None:
    sweep = make_word_kd(tmp_path / "a: sweep #1?")
    draw_samples(sweep / "0", "evaluate_samples.png")
    draw_samples(sweep / "0", "sharing.png")
    url = "https://wandb.example/me/stillhouse/runs/1"
    (sweep / "0" / WANDB_URLS).write_text(
        json.dumps({"distil": url, "evaluate": f"{url}2", "bad": "javascript:alert(1)", "n": 3})
    )
    path = compare(tmp_path, sweep, baseline="student_alone")
    page = parse(path)
    found = links(page)
    web = [href for href in found if href.startswith("http")]
    assert set(web) == {url, f"{url}2"}
    for href in set(found) - set(web):
        assert (path.parent / unquote(href)).exists(), href
    folders = {(path.parent / unquote(href)).resolve() for href in found if href.endswith("/")}
    assert folders == {run.resolve() for run in sweep.iterdir()}
    content = path.read_text(encoding="utf-8").replace(url, "")
    assert "http://" not in content
    assert "https://" not in content
    assert "javascript:" not in content
    assert not page.all("link")
    assert not any("src" in script.attributes for script in page.all("script"))
    for cell in section(page, "numbers").all("td"):
        assert cell.all("a") or cell.text == "–", "a number without a link"
    numbers = section(page, "numbers")
    assert sum(a.attributes["href"] == f"{url}2" for a in numbers.all("a")) == 8


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<b>&'\" 100% ünï"
    for i, extra in enumerate(("", EVIL)):
        run = make_run(
            folder / str(i),
            recipe=f"recipe{EVIL}",
            config_hash=str(i),
            overrides=[f"method.{EVIL}={EVIL}{i}", f"data.x={i}"],
            models={f"student{EVIL}": {f"metric{EVIL}": 1.0 + i, "parameters": 10 + i}},
            config={"method": {f"a.b{EVIL}": [EVIL, {"c": extra}], 3: None}, "product": "student"},
            series=[(f"stage{EVIL}", s, f"val_{EVIL[:20]}", 1.0 / (1 + s)) for s in range(3)],
        )
        write_texts(run, [[f"student{EVIL}", EVIL, f"{EVIL}\ud800\n{i}"]])
        draw_samples(run, "evaluate<i>_samples.png", shade=i)
    path = compare(tmp_path, folder)
    page = parse(path)
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0].text
    assert not page.all("b", "x")
    content = path.read_text(encoding="utf-8")
    assert "<script>alert" not in content
    assert not [c for c in content if ord(c) < 32 and c != "\n"]
    shown = EVIL.replace("\x00", "␀").replace("\x14", "␔")
    assert f"{shown}\ufffd" in section(page, "samples").text
    assert shown in section(page, "differs").text
    ids = [
        e.attributes["id"]
        for tag in ("section", "div")
        for e in page.all(tag)
        if "id" in e.attributes
    ]
    assert len(ids) == len(set(ids))


def test_a_page_of_one_bare_run_says_what_is_missing(tmp_path: Path) -> None:
    page = parse(compare(tmp_path, make_run(tmp_path / "run")))
    said = {name: section(page, name).text for name in ("differs", "coordinates", "curves")}
    assert "One setting alone" in said["differs"]
    assert "One setting alone" in said["coordinates"]
    assert "Without a config.yaml that can be read: 1 of the runs" in said["differs"]
    assert "No run has a metrics.csv" in said["curves"]
    assert (
        "No run has measured parameters. No run has measured latency."
        in section(page, "costs").text
    )
    assert "No run has pictures" in section(page, "samples").text
    assert "no metrics.csv" in section(page, "runs").text
    (value,) = section(page, "numbers").all("data")
    assert value.text == "1"


def test_broken_files_and_unfinished_runs_are_told(tmp_path: Path) -> None:
    sweep = make_word_kd(tmp_path / "sweep")
    make_run(sweep / "9", seed=9, status="running")
    write_texts(sweep / "0", {"no": "rows"})
    write_texts(sweep / "2", [["student", "only two"]])
    (sweep / "0" / WANDB_URLS).write_text("{")
    (sweep / "1" / "config.yaml").write_text("a: [")
    (sweep / "1" / "pictures").mkdir()
    (sweep / "1" / "pictures" / "evaluate_samples.png").write_bytes(b"no picture")
    page = parse(compare(tmp_path, sweep))
    text = section(page, "runs").text
    assert "9 is left out: its status is running" in text
    assert text.count("samples.json holds no rows of model, prompt and text") == 2
    assert f"{WANDB_URLS} cannot be read" in text


def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path) -> None:
    for seed, number in enumerate((math.nan, 1.0, math.inf)):
        for setting in "ab":
            make_run(
                tmp_path / "runs" / f"{setting}{seed}",
                seed=seed,
                config_hash=setting,
                overrides=[f"method.temperature={setting}"],
                models={
                    "student": {"test_nll": number, "parameters": 10, "latency_ms": -number},
                    "teacher": {"test_nll": 1.0, "parameters": 0, "latency_ms": 0.0},
                },
                series=[("distil", s, "val_nll", number) for s in range(4)]
                + [("distil", s, "train_loss", -1.0 if s else math.nan) for s in range(4)],
            )
    page = parse(compare(tmp_path, tmp_path / "runs", baseline="teacher"))
    cells = [td for td in section(page, "numbers").all("td") if "nan" in td.text]
    assert cells
    assert all(td.attributes["data-value"] == "" for td in cells if td.all("data")[0].text == "nan")
    assert "are no finite numbers and not drawn" in section(page, "curves").text
    content = (tmp_path / "to" / "report.html").read_text()
    for svg in page.all("svg"):
        for mark in svg.all("polyline") + svg.all("polygon"):
            assert "nan" not in (mark.attributes["points"] or "")
            assert "inf" not in (mark.attributes["points"] or "")
    assert 'd="Mnan' not in content


def test_settings_are_told_apart_without_colour(tmp_path: Path) -> None:
    sweep = make_fractions(tmp_path / "sweep")
    for run in sweep.iterdir():
        results = json.loads((run / "results.json").read_text())
        fraction = results["models"]["student"]["shared_fraction"]
        (run / "config.yaml").write_text(
            f"sharing: {{fraction: {fraction}}}\nseed: {results['seed']}\n"
        )
    page = parse(compare(tmp_path, sweep))
    (chart,) = section(page, "coordinates").all("svg", "chart")
    lines = [g for g in chart.all("g") if "data-g" in g.attributes]
    looks = [
        (g.all("polyline")[1].attributes.get("stroke-dasharray"), g.all("path")[0].attributes["d"])
        for g in lines
    ]
    assert len(lines) == 4
    assert len({dash for dash, _ in looks}) == 4
    (first, *_) = section(page, "differs").all("table")
    keys = [row.all("th")[0].text for row in first.all("tbody")[0].all("tr")]
    assert keys == ["sharing.fraction"]
    assert [td.text for td in first.all("td")] == ["0.4", "0.0", "0.8", "0.2"]
    for chart in page.all("svg", "chart"):
        assert chart.attributes["role"] == "img"
        assert chart.attributes["aria-label"]
    for figure in page.all("figure"):
        if figure.all("svg", "chart"):
            assert figure.all("table"), "a chart without its table"


def test_samples_stand_side_by_side_and_what_is_shared_is_there_once(tmp_path: Path) -> None:
    one, other = make_word_kd(tmp_path / "one"), make_other(tmp_path / "other", {0: 1.0})
    # The first run of a setting is that of its lowest seed.
    runs = [one / "1", other / "seed0"]
    for i, run in enumerate(runs):
        draw_samples(run, "evaluate_samples.png", shade=100 * i)
        draw_samples(run, "teacher_samples.png", shade=7)
        write_texts(run, [["teacher", "Once", "upon"], ["student", "Once", f"more {i}"]])
    draw_samples(runs[0], "distil_samples.png", size=(3000, 1000))
    page = parse(compare(tmp_path, one, other))
    samples = section(page, "samples")
    alts = [image.attributes["alt"] for image in samples.all("img")]
    assert [a for a in alts if a and a.startswith("teacher")] == ["teacher_samples of all settings"]
    assert len([a for a in alts if a and a.startswith("evaluate")]) == 2
    assert len(alts) == 4
    (table,) = samples.all("table")
    rows = [[cell.text for cell in row.all("td")] for row in table.all("tbody")[0].all("tr")]
    assert rows == [["upon", "upon"], ["more 0", "more 1"]]
    assert "Without it: B" in samples.text


def test_ten_runs_with_many_large_pictures_stay_below_two_megabytes(tmp_path: Path) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    for i in range(10):
        run = make_run(
            tmp_path / "runs" / str(i),
            config_hash=str(i),
            overrides=[f"optimizer.learning_rate={i}"],
            models={f"student@{k}": {f"m{j}": random.random() for j in range(8)} for k in range(9)},
            config={"optimizer": {"learning_rate": i}, "many": {f"k{j}": i for j in range(200)}},
            series=[
                (f"stage{k}", s, name, random.random())
                for k in range(4)
                for name in ("train_loss", "val_loss")
                for s in range(300)
            ],
        )
        (run / "pictures").mkdir()
        noise = Image.fromarray(random.integers(0, 255, (500, 1000, 3), dtype=np.uint8))
        noise.save(run / "pictures" / "evaluate_samples.png")
    path = compare(tmp_path, tmp_path / "runs")
    assert path.stat().st_size < 2_000_000
    assert "Not shown for the sake of the page's size" in section(parse(path), "samples").text
