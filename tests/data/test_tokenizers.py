"""The tokenizer that a recipe trains: what it learns from."""

import json
from pathlib import Path

import pytest

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.tokenizers import TrainTokenizer


def two_documents() -> Corpus:
    parts = {"train": ["ab" * 20, "cd" * 20], "validation": ["ab"], "test": ["ab"]}
    return Corpus(name="two", licence="none", splits=parts)


@pytest.mark.parametrize(("documents", "learnt"), [(None, {"ab", "cd"}), (1, {"ab"})])
def test_merges_are_those_of_the_first_documents(stage_context, documents, learnt) -> None:
    context = stage_context("tokenizer")
    corpus = {"_target_": f"{__name__}.two_documents"}
    train = TrainTokenizer(corpus=corpus, vocab_size=300, max_train_documents=documents)
    metrics = train(context).metrics
    vocabulary = json.loads(Path(context.output, "tokenizer.json").read_text())["model"]["vocab"]
    assert {"ab", "cd"} & set(vocabulary) == learnt
    assert metrics["bytes_per_token"] == pytest.approx(40)
