"""What a page of a comparison is made of: fronts, names, curves, ticks, addresses."""

import json
from pathlib import Path

import pytest
from fake_runs import make_run

from stillhouse.files import WANDB_URLS
from stillhouse.tracking import directions, folding, varied, wandb
from stillhouse.tracking.gather import find_folders, read_runs
from stillhouse.tracking.page.curves import thin
from stillhouse.tracking.page.names import short_names
from stillhouse.tracking.page.svg import Scale


def test_the_front_is_what_none_betters() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (2.0, 6.0), (1.0, 7.0)]
    assert directions.front(points, -1, -1) == [0, 1, 3]
    kept = directions.front(points, 1, 1)
    for i, (x, y) in enumerate(points):
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert (i in kept) == (not beaten)


@pytest.mark.parametrize(
    ("metric", "sign"),
    [
        *((m, -1) for m in ("test_nll", "latency_ms_1", "kl_to_teacher", "flops_per_token")),
        *((m, -1) for m in ("parameters", "peak_memory_mb", "val_sliced_wasserstein")),
        *((m, 1) for m in ("accuracy_addition", "decode_tokens_per_s", "decode_speedup_n8")),
        *((m, 1) for m in ("score_kept_percent", "f1", "class_consistency", "gap_closed")),
        *((m, None) for m in ("shared_fraction", "unheard_of", "")),
    ],
)
def test_names_say_which_way_is_better(metric: str, sign: int | None) -> None:
    assert directions.sign_of(metric) == sign


def test_varied_keys_leave_out_seeds_repetitions_and_conduct(tmp_path: Path) -> None:
    for i, rate in enumerate((1e-3, 3e-4)):
        for seed in (0, 1):
            make_run(
                tmp_path / "runs" / f"{i}{seed}",
                seed=seed,
                config_hash=str(i),
                overrides=[f"optimizer.learning_rate={rate}", f"seed={seed}"],
                config={
                    "seed": seed,
                    "paths": {"outputs": f"{i}"},
                    "optimizer": {"learning_rate": rate},
                    "stages": {
                        "distil": {"optimizer": {"learning_rate": rate}, "seed": seed},
                        "alone": {"steps": i},
                    },
                },
            )
    runs, _ = read_runs(find_folders([str(tmp_path / "runs")]))
    groups, _ = folding.group_runs(runs)
    found = [(v.key, v.values, v.told, v.numbers) for v in varied.varied_keys(groups)]
    assert found == [
        ("optimizer.learning_rate", ("0.001", "0.0003"), True, (1e-3, 3e-4)),
        ("stages.alone.steps", ("0", "1"), False, (0.0, 1.0)),
    ]


def test_names_of_settings_are_short_and_stay_apart() -> None:
    labels = ["scm optimizer.learning_rate=1e-3", "scm method.loss._target_=stillhouse.a.even"]
    assert short_names(labels) == ["scm learning_rate=1e-3", "scm loss=even"]
    assert short_names(["r a.x=1", "r b.x=1"]) == ["r a.x=1", "r b.x=1"]
    assert short_names(["r a=p.x", "r a=q.x"]) == ["r a=p.x", "r a=q.x"]


def test_a_long_curve_keeps_its_mean_and_its_range() -> None:
    steps = tuple(range(1000))
    values = tuple(float(s % 10) for s in steps)
    band = thin(folding.Band(steps, values, values, values), most=100)
    assert len(band.steps) == 100
    assert band.mean == (4.5,) * 100
    assert (min(band.low), max(band.high)) == (0.0, 9.0)
    short = folding.Band((1, 2), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    assert thin(short) is short


@pytest.mark.parametrize(
    "ends", [(0.0, 1.0), (3.0, 3.0), (0.113, 0.1138), (-5e6, 2e7), (1e-9, 2e-9)]
)
def test_ticks_are_few_and_within(ends: tuple[float, float]) -> None:
    for log in (False, True) if ends[0] > 0 else (False,):
        ticks = Scale(*ends, 0, 100, log).ticks()
        assert 1 <= len(ticks) <= 8
        assert all(ends[0] - 1e-9 <= t <= ends[1] + 1e-9 for t in ticks)


def test_the_address_of_an_online_run_is_kept(tmp_path: Path) -> None:
    path = tmp_path / WANDB_URLS
    wandb._keep_url(path, "teacher", None)
    assert not path.exists()
    wandb._keep_url(path, "teacher", "https://wandb.example/1")
    wandb._keep_url(path, "distil", "https://wandb.example/2")
    assert json.loads(path.read_text()) == {
        "teacher": "https://wandb.example/1",
        "distil": "https://wandb.example/2",
    }


# Sorts by the test NLL, twice; filters; holds a setting; says what it found in the title.
