"""The layout that keeps `platform/` and `kernels/` from shadowing other packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["platform", "kernels"])
def test_a_source_root_is_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_standard_platform_and_torch_import_from_the_root_of_the_checkout() -> None:
    code = "import platform, torch; print(platform.system(), platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


def test_no_module_is_named_triton() -> None:
    assert not list((ROOT / "kernels").rglob("triton.py"))


def test_kernels_know_nothing_of_the_platform() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "import stillhouse\n" not in path.read_text()
        assert "from stillhouse." not in path.read_text()


@pytest.mark.parametrize("method", sorted((ROOT / "platform/stillhouse/families").rglob("*.py")))
def test_files_of_families_are_short(method: Path) -> None:
    assert len(method.read_text().splitlines()) <= 400


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, stillhouse.cli; print([m for m in ('torch', 'lightning', 'wandb', 'hydra') "
    code += "if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT / 'platform'}"},
    )
    assert done.stdout.strip() == "[]"
