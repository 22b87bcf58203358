import itertools
import string

import pytest

from stillhouse.data.corpora.build_king_james import grams
from stillhouse.data.corpora.king_james import FILE, king_james

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpus():
    return king_james()


@pytest.fixture(scope="module")
def grams_of(corpus):
    return {
        split: [grams(chapter.split("\n")) for chapter in corpus.documents(split)]
        for split in SPLITS
    }


def test_all_chapters_are_there_and_none_is_in_two_splits(corpus):
    chapters = [chapter for split in SPLITS for chapter in corpus.documents(split)]
    assert len(chapters) == len(set(chapters)) == 1189
    verses = sum(len(chapter.split("\n")) for chapter in chapters)
    assert verses == 31102


def test_splits_are_nine_tenths_and_twice_a_twentieth_of_the_text(corpus):
    sizes = {split: sum(map(len, corpus.documents(split))) for split in SPLITS}
    shares = {split: size / sum(sizes.values()) for split, size in sizes.items()}
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.005)


@pytest.mark.parametrize(
    ("held_out", "seen"), [("validation", "train"), ("test", "train"), ("test", "validation")]
)
def test_held_out_chapter_shares_little_of_its_wording(grams_of, held_out, seen):
    known = set(itertools.chain.from_iterable(grams_of[seen]))
    shares = [len(chapter & known) / len(chapter) for chapter in grams_of[held_out]]
    assert max(shares) <= 0.12
    # Were it nothing at all, the grams would not be those of the text.
    assert max(shares) > 0


def test_chapters_told_twice_lie_in_one_split(corpus):
    for opening in ("The fool hath said in his heart", "heard it, that he rent his clothes"):
        holders = [split for split in SPLITS for text in corpus.documents(split) if opening in text]
        assert len(holders) == 2
        assert len(set(holders)) == 1


def test_text_is_clean_ascii_from_the_first_verse_on(corpus):
    assert corpus.documents("train")[0].startswith("In the beginning God created")
    text = "".join(chapter for split in SPLITS for chapter in corpus.documents(split))
    assert set(text) <= set(string.ascii_letters + " \n.,:;?!'()-")
    assert all(
        chapter == chapter.strip() for split in SPLITS for chapter in corpus.documents(split)
    )


def test_file_is_small_enough_to_ship():
    assert FILE.stat().st_size < 1_500_000
