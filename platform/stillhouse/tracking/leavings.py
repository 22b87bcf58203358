"""What a run left beside its numbers: pictures, continuations, addresses at W&B."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.files import SERIES, WANDB_URLS


@dataclass(frozen=True)
class Leavings:
    """What a run left to be looked at.

    Attributes:
        samples: pictures of samples, those of the evaluation first.
        pictures: the other pictures, without the loss curves.
        texts: rows (model, prompt, continuation).
        urls: stage -> address of its W&B run; empty where none was online.
        missing: lines on what is not there, or cannot be read.
    """

    samples: tuple[Path, ...]
    pictures: tuple[Path, ...]
    texts: tuple[tuple[str, str, str], ...]
    urls: Mapping[str, str]
    missing: tuple[str, ...]


def read_leavings(folder: Path) -> Leavings:
    """Read what a run directory holds; nothing that is absent or broken is an error."""
    missing: list[str] = []
    pictures = sorted(p for p in (folder / "pictures").glob("*.png") if p.name != "loss.png")
    samples = [p for p in pictures if p.stem.endswith("samples")]
    texts = _read_texts(folder, missing)
    if not (folder / SERIES).is_file():
        missing.append(f"no {SERIES}, so no learning curves")
    if not samples and not texts:
        missing.append("no pictures of samples and no continuations")
    return Leavings(
        samples=tuple(sorted(samples, key=lambda p: (not p.name.startswith("evaluate"), p.name))),
        pictures=tuple(p for p in pictures if p not in samples),
        texts=texts,
        urls=_read_urls(folder / WANDB_URLS, missing),
        missing=tuple(missing),
    )


def _read_texts(folder: Path, missing: list[str]) -> tuple[tuple[str, str, str], ...]:
    rows: list[tuple[str, str, str]] = []
    for path in sorted((folder / "stages").glob("*/samples.json")):
        content = _read_json(path, missing)
        if content is None:
            continue
        try:
            rows += [(str(model), str(prompt), str(text)) for model, prompt, text in content]
        except (TypeError, ValueError):
            missing.append(f"{path.relative_to(folder)} holds no rows of model, prompt and text")
    return tuple(rows)


def _read_urls(path: Path, missing: list[str]) -> dict[str, str]:
    """Read the addresses; what is no web address would be a link to run something."""
    content = _read_json(path, missing) if path.is_file() else {}
    if not isinstance(content, dict):
        return {}
    return {
        str(stage): url
        for stage, url in content.items()
        if isinstance(url, str) and url.startswith(("https://", "http://"))
    }


def _read_json(path: Path, missing: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        missing.append(f"{path.name} cannot be read")
        return None
