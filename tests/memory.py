"""How much memory a call allocates at once, by torch's own account."""

import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes two lines a call


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most CPU memory that `function()` held at once beyond what it was given, bytes.

    The running sum of the allocator's events: exact and free of noise, but blind to what a library
    allocates past torch, as BLAS does for its packed blocks.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = function()
    profiler: Any = record.profiler
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak
