"""A folder of pictures: sub-folders are classes, texts beside pictures are captions."""

from pathlib import Path

import torch

from stillhouse.data.pictures.pictures import Pictures, Samples, Split, held_out_places
from stillhouse.data.pictures.reading import Mode, PictureReader
from stillhouse.errors import UserError
from stillhouse.ranges import Count

KEY = "data.source.folder_path"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


def image_folder(
    *,
    folder_path: str,
    mode: Mode,
    image_size: Count | None = None,
    validation: Count = 100,
    test: Count = 100,
    captions: bool = True,
    max_pictures: Count | None = None,
    licence: str = "unknown",
) -> Pictures:
    """Read the .png, .jpg, .jpeg and .webp files of a folder, held in memory as float32.

    `reading.py` says what becomes of transparency, palettes and 16 bits.

    Args:
        folder_path: the folder. A picture's class is the sub-folder that it lies in, at any depth;
            without sub-folders there are none. What begins with a dot is left alone.
        mode: grey has one channel, rgb three.
        image_size: pixels a side: a square is cut out of the middle and resized, antialiased; null
            keeps the size, which then is one for all.
        validation, test: how many are held out for each, decided by their number alone.
        captions: read the caption of `cat.png` from `cat.txt` beside it, if any has one.
        max_pictures: read n pictures of each split only; null reads all.
        licence: of the pictures.

    Raises:
        UserError: for a folder that is not there or has no pictures, pictures both in sub-folders
            and beside them, sub-folders that are splits, a picture that cannot be read or is of
            another size, a picture without a caption where others have one, an empty one, and when
            none is left for training.
    """
    folder = Path(folder_path).expanduser()
    files = _files(folder_path, folder)
    classes = _classes(folder_path, folder, files)
    texts = _captions(folder_path, folder, files) if captions else None
    places = held_out_places(len(files), validation=validation, test=test, most=max_pictures)
    reader = PictureReader(f"{KEY}={folder_path}", mode, image_size)
    splits: dict[Split, Samples] = {}
    for split, chosen in places.items():
        picked = [files[place] for place in chosen.tolist()]
        labels = [classes.index(f.relative_to(folder).parts[0]) for f in picked if classes]
        splits[split] = Samples(
            torch.stack([reader.read(f, f.relative_to(folder).as_posix()) for f in picked]),
            torch.tensor(labels) if classes else None,
            None if texts is None else tuple(texts[file] for file in picked),
        )
    return Pictures(folder.resolve().name, licence, classes, splits)


def _files(folder_path: str, folder: Path) -> list[Path]:
    """Return the pictures in a fixed order."""
    if not folder.is_dir():
        raise UserError(
            f"{KEY}={folder_path}: there is no such folder; expected a folder of pictures"
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(
            f"{KEY}={folder_path}: no picture is in the folder; expected {', '.join(SUFFIXES)} "
            "files, in it or in sub-folders, which are their classes"
        )
    return files


def _classes(folder_path: str, folder: Path, files: list[Path]) -> tuple[str, ...]:
    """Return the names of the sub-folders that hold pictures."""
    classes = tuple(sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder}))
    beside = [file.name for file in files if file.parent == folder]
    if classes and beside:
        raise UserError(
            f"{KEY}={folder_path}: {beside[0]} lies beside the sub-folder {classes[0]}; expected "
            "all pictures in sub-folders, which are their classes, or none; move one or the other"
        )
    if classes and SPLIT_NAMES.issuperset(classes):
        raise UserError(
            f"{KEY}={folder_path}: its sub-folders are {', '.join(classes)}, which are splits and "
            "no classes; expected one folder of all pictures, of which data.source.validation and "
            f"data.source.test are held out; name {KEY}={Path(folder_path) / classes[0]}, or move "
            "the pictures"
        )
    return classes


def _captions(folder_path: str, folder: Path, files: list[Path]) -> dict[Path, str] | None:
    """Return the caption of every picture; None where no picture has one."""
    beside = [file for file in files if file.with_suffix(".txt").is_file()]
    if not beside:
        return None
    if len(beside) < len(files):
        known = set(beside)
        bare = next(file for file in files if file not in known)
        raise UserError(
            f"{KEY}={folder_path}: {bare.relative_to(folder).as_posix()} has no caption, and "
            f"{len(beside)} of {len(files)} pictures have one; write {bare.stem}.txt beside it, or "
            "read none with data.source.captions=false"
        )
    return {file: _caption(folder_path, folder, file.with_suffix(".txt")) for file in files}


def _caption(folder_path: str, folder: Path, file: Path) -> str:
    place = f"{KEY}={folder_path}, {file.relative_to(folder).as_posix()}"
    way_out = "or read no captions with data.source.captions=false"
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: the caption is not UTF-8, at byte {error.start}; convert it, {way_out}"
        ) from error
    if not text:
        raise UserError(f"{place}: the caption is empty; expected some text; write it, {way_out}")
    return text
