import random

import pytest

from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.documents import Conversation
from stillhouse.errors import UserError

USER = {"role": "user", "content": "hi"}
NAMING = "data.corpus.{split}_path=<file>"
TEXTS = [f"document {i}" for i in range(2000)]


def held_out(documents, given=None, share=0.05):
    return with_held_out(documents, given or {}, held_out=share, naming=NAMING)


def test_documents_are_held_out_by_their_content():
    parts = held_out(TEXTS)
    sizes = {split: len(documents) for split, documents in parts.items()}
    assert sizes == pytest.approx({"train": 1800, "validation": 100, "test": 100}, abs=40)
    assert sorted(d for part in parts.values() for d in part) == sorted(TEXTS)
    for documents in parts.values():
        assert documents == [t for t in TEXTS if t in set(documents)], "the order is kept"

    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    more = held_out(shuffled + [f"another {i}" for i in range(500)] + TEXTS[:700])
    for split, documents in parts.items():
        assert set(documents) == set(more[split]) & set(TEXTS), "stable, duplicates together"


def test_a_part_that_is_given_leaves_the_other_where_it_was():
    parts = held_out(TEXTS)
    beside = held_out(TEXTS, {"validation": ["own"]})
    assert beside["validation"] == ["own"]
    assert beside["test"] == parts["test"]
    assert set(beside["train"]) == {*parts["train"], *parts["validation"]}
    both = {"validation": ["own"], "test": ["other"]}
    assert held_out(TEXTS, both, share=0.0) == {"train": TEXTS, **both}


def test_a_conversation_is_held_out_by_its_words_and_not_by_its_place():
    def chats(place):
        return [Conversation([USER, {"role": "assistant", "content": t}], place) for t in TEXTS]

    def words(parts):
        return {split: [d.messages for d in part] for split, part in parts.items()}

    assert words(held_out(chats("a"))) == words(held_out(chats("b")))


@pytest.mark.parametrize(
    ("documents", "given", "share", "line"),
    [
        (
            ["a", "b"],
            {},
            0.05,
            "data.corpus.held_out=0.05: of 2 documents none falls to validation; set another share,"
            " give more documents, or name data.corpus.validation_path=<file> or "
            "data.corpus.test_path=<file>",
        ),
        (
            ["a", "b"],
            {"validation": ["own"]},
            0.05,
            "data.corpus.held_out=0.05: of 2 documents none falls to test; set another share, give "
            "more documents, or name data.corpus.test_path=<file>",
        ),
        (
            TEXTS,
            {},
            0.5,
            "data.corpus.held_out=0.5: expected more than 0 and less than 0.5, the share of the "
            "documents for validation and for test",
        ),
        (
            TEXTS,
            {"validation": ["own"]},
            0.0,
            "data.corpus.held_out=0.0: expected more than 0 and less than 0.5, the share of the "
            "documents for test",
        ),
    ],
)
def test_an_empty_part_is_refused(documents, given, share, line):
    with pytest.raises(UserError) as caught:
        held_out(documents, given, share)
    assert str(caught.value) == line
