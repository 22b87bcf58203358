"""Data sets of pictures, as `datasets` saves them in a folder."""

from typing import Any

from PIL import Image

NAMES = ["cat", "dog", "bird"]


def pictures(count: int, first: int = 0, size: tuple[int, int] = (6, 4)) -> list[Image.Image]:
    """Return pictures of one level of grey each, picture i of 10 (first + i)."""
    return [Image.new("RGB", size, (10 * (first + i),) * 3) for i in range(count)]


def table(label: list[int | None] | None = None, names: list[str] = NAMES, **columns: Any) -> Any:
    """Return a data set of columns; `image` holds pictures, `label` classes."""
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    columns |= {} if label is None else {"label": label}
    made = datasets.Dataset.from_dict(columns)
    for name in set(kinds) & set(columns):
        made = made.cast_column(name, kinds[name])
    return made


def save() -> None:
    """Write `rows`, twelve pictures, and `saved`, the same and a split `held`, where we are."""
    import datasets

    datasets.disable_progress_bars()
    train = table(
        image=pictures(12),
        label=[i % 3 for i in range(12)],
        code=[30 - 10 * (i % 3) for i in range(12)],
        word=[NAMES[i % 3] for i in range(12)],
        text=[f" picture  {i}" for i in range(12)],
        texts=[[f"first {i}", "second"] for i in range(12)],
        share=[0.5] * 12,
    )
    held = table(image=pictures(3, 20), label=[2, 1, 0], text=["a", "b", "c"])
    datasets.DatasetDict({"train": train, "held": held}).save_to_disk("saved")
    train.save_to_disk("rows")
