"""Rows as they are kept: those of a tokenizer that reads everything at once, in a few bytes."""

import pickle
import tracemalloc
from typing import Any

import pytest
from transformers import BertTokenizer

from stillhouse.data import encoder_rows
from stillhouse.data.encoder_rows import EncodedRow, PackedRows, encode_examples, encode_pieces
from stillhouse.data.encoder_tokenizers import SPECIAL_TOKENS
from stillhouse.data.labelled.task import Example

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """BERT's, of more words than a byte counts."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(400))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def texts(count: int, words: int) -> list[str]:
    """Return texts of `words` words and fewer."""
    return [
        " ".join(f"w{300 + (7 * i + j) % 90}" for j in range(words - i % 5)) for i in range(count)
    ]


def at_once(tokenizer: Any, *given: Any, **limits: Any) -> list[tuple[Any, Any]]:
    """Return tokens and types as one call of the tokenizer gives them."""
    encoded = tokenizer(*given, verbose=False, max_length=LENGTH, **limits)
    return list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three short texts together; a longer one alone."""
    monkeypatch.setattr(encoder_rows, "CHARACTERS", 140)


@pytest.mark.usefixtures("small_blocks")
def test_pieces_are_those_of_all_documents_tokenised_at_once(tokenizer) -> None:
    documents = [*texts(10, words=9), *texts(5, words=70), *texts(4, words=8)]
    blocks = list(encoder_rows._blocks([Example(d) for d in documents]))
    assert {len(block) for block in blocks} >= {1, 3}
    assert [e.text for block in blocks for e in block] == documents
    rows = encode_pieces([Example(d) for d in documents], tokenizer, LENGTH)
    limits = {"truncation": True, "return_overflowing_tokens": True}
    expected = [EncodedRow(*row) for row in at_once(tokenizer, documents, **limits)]
    assert len(expected) > len(documents)
    assert list(rows) == expected
    assert rows[2:5] == expected[2:5]
    assert (rows[-1], len(rows), rows.cut) == (expected[-1], len(expected), [])
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pairs", [False, True])
def test_examples_are_those_of_all_texts_tokenised_at_once(tokenizer, pairs: bool) -> None:
    of_texts = texts(20, words=18)
    given = [of_texts, texts(20, words=5)] if pairs else [of_texts]
    examples = [
        Example(text, given[1][i] if pairs else None, float(i)) for i, text in enumerate(of_texts)
    ]
    expected = at_once(tokenizer, *given, truncation="longest_first")
    whole = [len(ids) for ids in tokenizer(*given, verbose=False)["input_ids"]]
    rows = encode_examples(examples, tokenizer, LENGTH)
    cut = [n > LENGTH for n in whole]
    assert 0 < sum(cut) <= len(cut)
    assert list(rows) == [EncodedRow(*row, float(i), cut[i]) for i, row in enumerate(expected)]
    assert rows.cut == [i for i, is_cut in enumerate(cut) if is_cut]


def test_rows_of_a_tokenizer_without_types_and_rows_that_travel_to_a_worker() -> None:
    rows = [EncodedRow([70_000, 2], None, (0, 2)), EncodedRow([], None), EncodedRow([5], None, 1)]
    packed = PackedRows(iter(rows))
    assert list(packed) == rows
    assert list(pickle.loads(pickle.dumps(packed))) == rows


def test_few_bytes_are_kept_of_a_token_and_never_many_at_once(tokenizer, monkeypatch) -> None:
    """By Python's own account, which does not see the tokenizer's."""
    documents = [Example(text) for text in texts(200, words=150)]
    monkeypatch.setattr(encoder_rows, "CHARACTERS", sum(len(d.text) for d in documents) // 20)
    encode_pieces(documents[:2], tokenizer, LENGTH)
    tracemalloc.start()
    rows = encode_pieces(documents, tokenizer, LENGTH)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(row.tokens) for row in rows)
    assert tokens > 25_000
    # 5 of a token, 17 of a row of 16, and room to grow.
    assert kept / tokens < 8
    assert most / tokens < 16
