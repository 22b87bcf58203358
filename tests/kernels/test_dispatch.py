"""Which backend runs, and the words in which one that was named is refused."""

import subprocess
import sys

import pytest
import torch

from stillhouse_kernels import dispatch
from stillhouse_kernels.dispatch import BackendError, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def compiled_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is installed and compiles, as on a machine with a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)


@pytest.mark.parametrize(
    ("device", "refused", "chosen"),
    [
        (CPU, None, "streaming"),
        (CUDA, None, "triton"),
        (CUDA, "head_dim 24 is no power of 2", "streaming"),
    ],
)
def test_auto_takes_the_kernel_on_a_gpu_where_it_can(
    device: torch.device, refused: str | None, chosen: str
) -> None:
    assert choose_backend("auto", device, triton_refuses=refused) == chosen


def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    assert choose_backend("auto", CUDA) == "streaming"


def test_auto_stays_on_the_streaming_path_under_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("auto", CPU) == "streaming"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_a_named_backend_of_torch_is_taken_anywhere(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_triton(monkeypatch)
    assert choose_backend(backend, device, triton_refuses="anything") == backend


def test_the_named_kernel_is_taken_on_a_gpu() -> None:
    assert choose_backend("triton", CUDA) == "triton"


def test_the_named_kernel_is_taken_on_a_cpu_by_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == "triton"


@pytest.mark.parametrize("value", ["0", "", "true"])
def test_only_1_turns_the_interpreter_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert not dispatch.interpreted()


def test_an_unknown_backend() -> None:
    with pytest.raises(BackendError) as e:
        choose_backend("cuda", CPU)
    assert str(e.value) == "backend='cuda': expected one of auto, reference, streaming, triton"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_named_kernel_without_triton(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_triton(monkeypatch)
    with pytest.raises(BackendError) as e:
        choose_backend("triton", device)
    assert str(e.value) == (
        "backend='triton': triton is not installed; pip install -e '.[kernels]', or leave "
        "backend='auto'"
    )


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_named_kernel_is_refused_with_the_limit(device: torch.device) -> None:
    with pytest.raises(BackendError) as e:
        choose_backend("triton", device, triton_refuses="head_dim 24 is no power of 2")
    assert str(e.value) == (
        "backend='triton': head_dim 24 is no power of 2; backend='streaming' takes it"
    )


def test_the_named_kernel_on_a_cpu() -> None:
    with pytest.raises(BackendError) as e:
        choose_backend("triton", CPU)
    assert str(e.value) == (
        "backend='triton': the tensors lie on cpu, the kernel runs on CUDA devices; "
        "backend='streaming' runs here (TRITON_INTERPRET=1, set before Python starts, runs the "
        "kernel in Triton's interpreter)"
    )


def test_a_backend_error_is_a_value_error() -> None:
    assert issubclass(BackendError, ValueError)


def test_looking_for_triton_imports_nothing_of_it() -> None:
    # The file alone: torch's compiler, which the package imports, imports triton.
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['triton_installed'](); "
    code += "print('triton' in sys.modules)"
    command = [sys.executable, "-c", code, str(dispatch.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
