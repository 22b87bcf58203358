"""Snippets out of an archive as the package has it, made here."""

import tarfile

import pytest
from archives import make_tar

from stillhouse.data.labelled.sentiment import polarity, scores
from stillhouse.errors import UserError

NAME = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SCORES = (-3.0, -0.5, -0.4, 0.0, 0.4, 0.5, 3.0)


def package(tmp_path, lines, name=NAME):
    folder = tmp_path / "toy-0.5" / "additional_resources"
    folder.mkdir(parents=True)
    content = "".join(f"{line}\r\n" for line in lines).encode()
    make_tar(folder / "hutto_ICWSM_2014.tar.gz", (name, content, tarfile.REGTYPE))
    return str(tmp_path)


@pytest.fixture
def snippets(tmp_path):
    lines = (f"{i}\t{SCORES[i % 7]}\tcafé ''film'' {i}" for i in range(280))
    return package(tmp_path, lines)


def together(labelled):
    return [e for part in labelled.splits.values() for e in part]


def test_scores_are_read_as_they_are(snippets):
    made = scores(package_path=snippets)
    found = {e.text: e.label for e in together(made)}
    assert found == {f"café ''film'' {i}": SCORES[i % 7] for i in range(280)}
    assert (made.task.kind, made.task.num_labels, made.licence) == ("regression", 1, "MIT")


@pytest.mark.parametrize(("neutral", "kept"), [(0.5, 4), (0.45, 4), (0.0, 6), (2.9, 2)])
def test_polarity_is_the_sign_and_the_neutral_band_is_left_out(snippets, neutral, kept):
    made = polarity(package_path=snippets, neutral=neutral)
    found = {int(e.text.split()[-1]): e.label for e in together(made)}
    assert len(found) == 40 * kept
    assert all(label == (SCORES[i % 7] > 0) for i, label in found.items())
    assert made.task.names == ("negative", "positive")


def test_a_text_keeps_its_split_whatever_the_task(snippets):
    both = polarity(package_path=snippets), scores(package_path=snippets)
    by_text = [{e.text: s for s, part in made.splits.items() for e in part} for made in both]
    assert by_text[0].items() <= by_text[1].items()


@pytest.mark.parametrize("function", [polarity, scores])
def test_synthetic_reads_nothing(function):
    made = function(package_path="/no/such/folder", synthetic=True)
    assert all(made.splits.values())
    assert {e.label for e in together(made)} == set(range(2 if function is polarity else 5))


def test_a_folder_without_the_archive(tmp_path):
    with pytest.raises(UserError) as refused:
        scores(package_path=str(tmp_path))
    assert str(refused.value) == (
        f"data.corpus.package_path={tmp_path}: no hutto_ICWSM_2014.tar.gz is in the folder; "
        "expected the source archive of vaderSentiment 0.5, unpacked; the stage in "
        "conf/stage/fetch_sentiment.yaml fetches it"
    )


def test_an_archive_without_the_snippets(tmp_path):
    folder = package(tmp_path, [], name="other.txt")
    with pytest.raises(UserError) as refused:
        scores(package_path=folder)
    assert str(refused.value) == (
        f"data.corpus.package_path={folder}: {NAME} cannot be read out of "
        f"hutto_ICWSM_2014.tar.gz: \"filename '{NAME}' not found\"; fetch it anew"
    )


def test_a_line_that_is_no_snippet(tmp_path):
    folder = package(tmp_path, ["1\t0.5\tfine", "2\tbad"])
    with pytest.raises(UserError) as refused:
        scores(package_path=folder)
    assert str(refused.value) == (
        f"data.corpus.package_path={folder}, {NAME}, line 2: expected a number, a score and a text "
        "between tabs; fetch the package anew"
    )


@pytest.mark.parametrize("neutral", [-0.1, 4.0])
def test_a_band_that_leaves_nothing(neutral):
    with pytest.raises(UserError) as refused:
        polarity(package_path="", neutral=neutral)
    assert str(refused.value) == (
        f"data.corpus.neutral={neutral}: expected 0 or more, and less than 4, the best score"
    )
