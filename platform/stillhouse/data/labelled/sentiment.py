"""Snippets of movie reviews, each with the mean score of twenty human raters or more.

The 10,605 snippets are rated from -4, extremely negative, to 4, extremely positive. They come with
the source archive of the package `vaderSentiment` 0.5 (MIT): C. J. Hutto, E. Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM 2014).
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from stillhouse.data.labelled.made_up import made_up
from stillhouse.data.labelled.task import Example, LabelledText, Task, held_out_by_content
from stillhouse.errors import UserError

KEY = "data.corpus.package_path"
NAME, LICENCE = "movie snippets", "MIT"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
POLARITY = Task("classification", ("negative", "positive"))
SCORE = Task("regression", ("score",))


def polarity(*, package_path: str, neutral: float = 0.5, synthetic: bool = False) -> LabelledText:
    """Tell positive snippets from negative ones.

    Args:
        package_path: folder of the unpacked package.
        neutral: snippets whose score is nearer to 0 than this are left out.
        synthetic: read no file; make random texts of the same kind.

    Raises:
        UserError: for a folder without the snippets, and a band that leaves none of them.
    """
    if not 0 <= neutral < 4:
        raise UserError(
            f"data.corpus.neutral={neutral}: expected 0 or more, and less than 4, the best score"
        )
    if synthetic:
        return made_up(NAME, POLARITY)
    scored = [e for e in _snippets(package_path) if abs(_score(e)) >= neutral and _score(e) != 0]
    examples = [Example(e.text, None, int(_score(e) > 0)) for e in scored]
    return _labelled(package_path, POLARITY, examples)


def scores(*, package_path: str, synthetic: bool = False) -> LabelledText:
    """Predict the mean score, of neutral snippets too.

    Args:
        package_path: folder of the unpacked package.
        synthetic: read no file; make random texts of the same kind.

    Raises:
        UserError: for a folder without the snippets.
    """
    if synthetic:
        return made_up(NAME, SCORE)
    return _labelled(package_path, SCORE, list(_snippets(package_path)))


def _labelled(package_path: str, task: Task, examples: list[Example]) -> LabelledText:
    splits = held_out_by_content(examples, {}, source=f"{KEY}={package_path}")
    return LabelledText(NAME, LICENCE, task, splits)


def _score(example: Example) -> float:
    assert isinstance(example.label, float)
    return example.label


def _snippets(package_path: str) -> Iterator[Example]:
    """Yield the snippets out of the archive in the package, which is not unpacked."""
    place = f"{KEY}={package_path}"
    archives = sorted(Path(package_path).expanduser().rglob(ARCHIVE))
    if not archives:
        raise UserError(
            f"{place}: no {ARCHIVE} is in the folder; expected the source archive of "
            "vaderSentiment 0.5, unpacked; the stage in conf/stage/fetch_sentiment.yaml fetches it"
        )
    try:
        with tarfile.open(archives[0]) as archive:
            file = archive.extractfile(SNIPPETS)
            content = b"" if file is None else file.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise UserError(
            f"{place}: {SNIPPETS} cannot be read out of {ARCHIVE}: {error}; fetch it anew"
        ) from error
    for number, line in enumerate(content.decode().splitlines(), 1):
        where = f"{place}, {SNIPPETS}, line {number}"
        yield _snippet(line, where)


def _snippet(line: str, place: str) -> Example:
    fields = line.split("\t")
    try:
        _, score, text = fields
        return Example(text, None, float(score))
    except ValueError as error:
        raise UserError(
            f"{place}: expected a number, a score and a text between tabs; fetch the package anew"
        ) from error
