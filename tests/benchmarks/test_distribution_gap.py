"""The benchmark `distribution_gap.py` where there is nothing to compare."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from scripts import imported

FILE = Path(__file__).parents[2] / "benchmarks" / "distribution_gap.py"


def test_a_stage_that_accepted_nothing_is_told_in_a_line(capsys, tmp_path, monkeypatch) -> None:
    with imported(FILE) as benchmark:
        rows = [{"accepted": False, "target": "4", "reference": "4"}] * 2
        Dataset.from_list(rows).save_to_disk(tmp_path / "stages" / "rewrite")
        run = SimpleNamespace(folder=tmp_path, models={"seed": "stages/teacher"})
        monkeypatch.setattr(benchmark, "read_run", lambda config: run)
        monkeypatch.setattr("sys.argv", [FILE.name, f"run={tmp_path}"])
        with pytest.raises(SystemExit) as ended:
            benchmark.main()
        assert ended.value.code == "the stage rewrite accepted none of 2 answers"
        assert capsys.readouterr().out == ""
