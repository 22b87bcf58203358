"""Write `king_james.txt.xz` from Debian's packages `bible-kjv` and `bible-kjv-text` (4.38).

    bible -p /usr/lib -f gen1:1-rev22:21 > verses.txt
    python -m stillhouse.data.corpora.build_king_james verses.txt

The text is that of 1611 in the spelling of 1769, in the public domain. A chapter is a document.
Chapters that tell the same in the same words (Psalms 14 and 53, 2 Kings 19 and Isaiah 37, …) are
kept in one split: two chapters belong together when they share a tenth of the word 8-grams of the
shorter one. The groups so found are drawn, largest share of bytes first to training, by a fixed
seed: 5 % of the bytes each for validation and test.
"""

import lzma
import random
import sys
from collections import defaultdict
from pathlib import Path

BOOKS = """
Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel,
1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs,
Ecclesiastes, Song of Solomon, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel,
Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, Malachi,
Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians,
Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus,
Philemon, Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation
"""
GRAM = 8
SHARED = 0.1
SHARE_OF_BYTES = {"test": 0.05, "validation": 0.05}


def read_chapters(verses: Path) -> dict[tuple[str, int], list[str]]:
    """Read lines `Ge1:1 In the beginning …` into (book, chapter) -> verses."""
    chapters: dict[tuple[str, int], list[str]] = defaultdict(list)
    books: list[str] = []
    names = [name.strip() for name in BOOKS.split(",")]
    for line in verses.read_text(encoding="ascii").splitlines():
        reference, text = line.split(" ", 1)
        place, _ = reference.split(":")
        book = place.rstrip("0123456789")
        if not books or books[-1] != book:
            books.append(book)
        chapters[names[len(books) - 1], int(place[len(book) :])].append(text)
    assert len(books) == len(names), books
    return dict(chapters)


def grams(verses: list[str]) -> set[tuple[str, ...]]:
    """Return the word 8-grams of a chapter."""
    words = " ".join(verses).split()
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def group_chapters(chapters: dict[tuple[str, int], list[str]]) -> list[list[tuple[str, int]]]:
    """Return the chapters in groups whose members share their wording."""
    of = {name: grams(verses) for name, verses in chapters.items()}
    holders: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, found in of.items():
        for gram in found:
            holders[gram].append(name)
    shared: dict[tuple[tuple[str, int], tuple[str, int]], int] = defaultdict(int)
    for names in holders.values():
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                shared[a, b] += 1
    leader = {name: name for name in chapters}

    def find(name: tuple[str, int]) -> tuple[str, int]:
        while leader[name] != name:
            name = leader[name]
        return name

    for (a, b), count in shared.items():
        if count >= SHARED * min(len(of[a]), len(of[b])):
            leader[find(a)] = find(b)
    groups: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for name in chapters:
        groups[find(name)].append(name)
    return list(groups.values())


def draw_splits(chapters: dict[tuple[str, int], list[str]]) -> dict[tuple[str, int], str]:
    """Return the split of every chapter."""
    groups = group_chapters(chapters)
    random.Random(1611).shuffle(groups)
    size = {name: sum(map(len, verses)) for name, verses in chapters.items()}
    total = sum(size.values())
    split: dict[tuple[str, int], str] = {}
    for name, share in SHARE_OF_BYTES.items():
        taken = 0
        for group in list(groups):
            if taken >= share * total:
                break
            groups.remove(group)
            taken += sum(size[chapter] for chapter in group)
            split.update(dict.fromkeys(group, name))
    return {chapter: split.get(chapter, "train") for chapter in chapters}


def main(verses: str) -> None:
    """Build the corpus file beside this script."""
    chapters = read_chapters(Path(verses))
    splits = draw_splits(chapters)
    blocks = [
        f"{splits[book, number]}\t{book} {number}\n" + "\n".join(text)
        for (book, number), text in chapters.items()
    ]
    target = Path(__file__).with_name("king_james.txt.xz")
    content = ("\n\n".join(blocks) + "\n").encode()
    target.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    sizes = {
        s: sum(len("\n".join(t)) for c, t in chapters.items() if splits[c] == s)
        for s in ("train", "validation", "test")
    }
    print(f"{target}: {target.stat().st_size} bytes, {len(chapters)} chapters, characters {sizes}")


if __name__ == "__main__":
    main(sys.argv[1])
