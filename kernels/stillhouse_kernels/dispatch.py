"""Which implementation of an operation runs: by device, or as the caller forces it."""

import importlib.util
import os
from typing import Literal, get_args

import torch

# Looked up once: torch.compile would warn of a lookup that it traces.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

Backend = Literal["auto", "reference", "streaming", "triton"]


class BackendError(ValueError):
    """The backend that was named does not exist, or cannot take these inputs here."""


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_installed() -> bool:
    """Whether `import triton` finds a package; nothing is imported."""
    return _TRITON_INSTALLED


def choose_backend(backend: str, device: torch.device, *, triton_refuses: str | None = None) -> str:
    """Return `reference`, `streaming` or `triton`.

    `auto` takes the Triton kernel on a CUDA device where it can, and otherwise the streaming path.
    A backend that was named is taken or refused, never replaced.

    Args:
        backend: a `Backend`.
        device: of the operation's tensors.
        triton_refuses: why the Triton kernel cannot take these inputs, with the limit; None where
            it can.

    Raises:
        BackendError: for another name, or for `triton` where it cannot run.
    """
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise BackendError(f"backend={backend!r}: expected one of {names}")
    if backend == "auto":
        usable = device.type == "cuda" and triton_installed() and triton_refuses is None
        return "triton" if usable else "streaming"
    if backend != "triton":
        return backend
    if not triton_installed():
        raise BackendError(
            "backend='triton': triton is not installed; pip install -e '.[kernels]', or "
            "leave backend='auto'"
        )
    if triton_refuses is not None:
        raise BackendError(f"backend='triton': {triton_refuses}; backend='streaming' takes it")
    if device.type != "cuda" and not interpreted():
        raise BackendError(
            f"backend='triton': the tensors lie on {device}, the kernel runs on CUDA devices; "
            "backend='streaming' runs here (TRITON_INTERPRET=1, set before Python starts, runs the "
            "kernel in Triton's interpreter)"
        )
    return backend
