"""The stage that trains an encoder's tokenizer: its ids, what it reads, and how it loads."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoTokenizer, BertConfig

from stillhouse.data.encoder_tokenizers import SPECIAL_TOKENS, TrainEncoderTokenizer
from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError

FILES = "stillhouse.data.labelled.files.labelled_files"
SENTIMENT = "stillhouse.data.labelled.sentiment.polarity"
TEXTS = ["the cat sat on the mat", "The Cäts, they sat: the bats", "a cat that sat"]
APART = str.maketrans({",": " ,", ":": " :", "ä": "a"})


def labelled(folder: Path, *examples: dict[str, Any]) -> dict[str, Any]:
    """Return a node of labelled files, all splits the same."""
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps({"label": 0} | example) + "\n" for example in examples))
    paths = dict.fromkeys(("train_path", "validation_path", "test_path"), str(path))
    task = {"kind": "classification", "names": ["no", "yes"], "name": None, "licence": "CC0"}
    return {"_target_": FILES, **paths, **task}


@pytest.fixture
def train(stage_context):
    """A function that runs the stage; returns its folder and metrics."""

    def train(corpus: dict[str, Any], **settings: Any) -> tuple[Path, Any]:
        context = stage_context("tokenizer")
        settings = {"vocab_size": 60} | settings
        result = TrainEncoderTokenizer(corpus=corpus, **settings)(context)
        return context.output, result.metrics

    return train


def merged(words: Counter[str], alphabet: list[str], size: int) -> list[str]:
    """Return the tokens by the rule itself: the pair seen most often, the lower ids of equals."""
    tokens = [*SPECIAL_TOKENS, *alphabet]
    split = {w: [w[0], *(f"##{c}" for c in w[1:])] for w in words}
    while len(tokens) < size:
        seen: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(split[word]):
                seen[pair] += count
        if not seen:
            break
        best = min(seen, key=lambda pair: (-seen[pair], *map(tokens.index, pair)))
        whole = best[0] + best[1].removeprefix("##")
        if whole not in tokens:
            tokens.append(whole)
        for parts in split.values():
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == best:
                    parts[place : place + 2] = [whole]
                place += 1
    return tokens


def test_ids_follow_from_the_texts_alone(train, tmp_path: Path) -> None:
    folder, metrics = train(labelled(tmp_path, *({"text": text} for text in TEXTS)), vocab_size=45)
    found = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = Counter(" ".join(TEXTS).translate(APART).lower().split())
    alone = sorted({c for word in words for c in word})
    within = sorted({f"##{c}" for word in words for c in word[1:]})
    expected = merged(words, [*alone, *within], 45)
    assert sorted(found, key=found.get) == expected
    assert {"##at", "the", "sat"} <= set(expected)
    assert metrics["vocab_size"] == len(expected)


def test_it_loads_as_berts_beside_a_model(train, tmp_path: Path) -> None:
    folder, metrics = train(
        labelled(tmp_path, {"text": TEXTS[0], "pair": TEXTS[1]}, {"text": TEXTS[2], "pair": "b"}),
        vocab_size=200,
        model_max_length=24,
    )
    BertConfig().save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    read = tokenizer("The cat", "THE CÄTS")
    assert tokenizer.convert_ids_to_tokens(read["input_ids"]) == [
        *("[CLS]", "the", "cat", "[SEP]"),
        *("the", "cats", "[SEP]"),
    ]
    assert read["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.all_special_tokens == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 24)
    assert tokenizer.convert_ids_to_tokens(tokenizer("z")["input_ids"])[1] == "[UNK]"
    # Every word is one token, the pairs' too: 6 + 8 + 4 + 1 of them.
    size = sum(len(text.encode()) for text in [*TEXTS, "b"])
    assert metrics["bytes_per_token"] == pytest.approx(size / 19)


def test_capitals_and_accents_stay_where_they_are_asked_for(train, tmp_path: Path) -> None:
    corpus = labelled(tmp_path, *({"text": text} for text in TEXTS))
    cased = AutoTokenizer.from_pretrained(train(corpus, vocab_size=200, lowercase=False)[0])
    assert cased.tokenize("The Cäts the cat") == ["The", "Cäts", "the", "cat"]
    small = AutoTokenizer.from_pretrained(train(corpus, vocab_size=200)[0])
    assert small.tokenize("The Cäts the cat") == ["the", "cats", "the", "cat"]


@pytest.mark.parametrize("name", ["markov_chains", "markov_text", "king_james_pieces", "sentiment"])
def test_the_data_of_recipes_are_read_without_an_unknown_token(train, name: str) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/data/{name}.yaml"))
    changes = {"synthetic": True, "package_path": "none", "train_examples": 400}
    sizes = {"validation_examples": 20, "test_examples": 20}
    corpus = node["corpus"]
    corpus |= {key: value for key, value in (changes | sizes).items() if key in corpus}
    folder, metrics = train(corpus, vocab_size=300)
    assert metrics["vocab_size"] <= 300
    data: EncoderData = instantiate(
        node | {"tokenizer_path": str(folder), "max_train_documents": 20}, _recursive_=False
    )(0)
    rows = data.rows("train")
    unknown = data.tokenizer.unk_token_id
    assert all(row.tokens[0] == 2 and unknown not in row.tokens for row in rows)
    if name.startswith("markov"):
        assert {len(row.tokens) for row in rows} == {34}, "32 words, each one token"


def test_bad_input(train, tmp_path: Path) -> None:
    def refusal(*texts: str, **settings: Any) -> str:
        with pytest.raises(UserError) as refused:
            train(labelled(tmp_path, *({"text": text} for text in texts)), **settings)
        return str(refused.value)

    assert refusal(*TEXTS, vocab_size=20) == (
        "stages.tokenizer.vocab_size=20: expected at least 25, 5 special tokens, and 20 for the "
        "characters of the texts, at the beginning of a word and within one"
    )
    assert refusal("\u200b", "\u200b") == (
        "stages.tokenizer.corpus: the training part of labelled.jsonl holds no plain text; a "
        "tokenizer is learnt from texts, so take a corpus of them"
    )
