"""How large and how fast a language model is on this machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


@torch.no_grad()
def size_and_speed(
    model: PreTrainedModel, *, context: int, new_tokens: int, repeats: int
) -> Mapping[str, float | int]:
    """Count parameters and time prefill and decoding, batch 1, greedy, with a key/value cache.

    Args:
        model: the model, in eval mode.
        context: tokens of the prompt.
        new_tokens: tokens decoded after it.
        repeats: runs, of which the fastest counts: others were disturbed.

    Returns:
        `parameters` (shared ones once), `prefill_tokens_per_s`, `decode_tokens_per_s`,
        `kv_cache_bytes_per_token` (as `cache_bytes`, after the prompt, over its tokens) and
        `peak_memory_mb`: parameters plus what prefill and decoding added to the peak, in 10^6
        bytes; left out where the system does not tell a process its peak.
    """
    prompt = some_tokens(model, context)

    def run() -> tuple[float, float, int]:
        cache = DynamicCache(config=model.config)
        prefill = seconds(lambda: model(prompt, past_key_values=cache, use_cache=True), model)
        held = cache_bytes(cache)

        def decode() -> None:
            token = prompt[:, -1:]
            for _ in range(new_tokens):
                logits = model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)

        return prefill, seconds(decode, model), held

    peak = _PeakMemory(model.device)
    runs = [run() for _ in range(repeats)]
    measured: dict[str, float | int] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_s": context / min(r[0] for r in runs),
        "decode_tokens_per_s": new_tokens / min(r[1] for r in runs),
        "kv_cache_bytes_per_token": runs[0][2] / context,
    }
    growth = peak.growth()
    if growth is not None:
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        measured["peak_memory_mb"] = (held + growth) / 1e6
    return measured


def some_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Return a text (1, count) that has every token in turn: what it says does not matter."""
    vocabulary = int(model.config.vocab_size)
    return torch.arange(count, device=model.device).remainder(vocabulary).unsqueeze(0)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values that a cache holds.

    A layer with a sliding window holds those of the last tokens only, one less than the window;
    the states of layers without attention are not counted.
    """
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def seconds(work: Callable[[], object], model: PreTrainedModel) -> float:
    """Return the wall time of `work`, the device's queue emptied before and after."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    began = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began


def medians_by_turns(works: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """Return the median of each work's times, taken by turns after one turn for nothing.

    A machine's speed drifts; all sides of a turn see the same of it.
    """
    turns = [[work() for work in works] for _ in range(1 + repeats)][1:]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


class _PeakMemory:
    """The growth of this process's peak memory, in bytes, since the object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = _reset_resident_peak()

    def growth(self) -> int | None:
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self.before)


def _reset_resident_peak() -> int | None:
    """Set Linux's record of the peak to the present, and return that; None elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
