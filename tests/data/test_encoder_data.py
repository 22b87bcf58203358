"""Batches for encoders, by a tokenizer in which every word of these texts is a token."""

import inspect
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.documents import Conversation
from stillhouse.data.encoder_rows import encode_pieces
from stillhouse.data.encoders import EncoderData
from stillhouse.data.labelled.task import Example, LabelledText, Task
from stillhouse.errors import UserError

UNK, CLS, SEP, PAD = range(4)
CLASSES = Task("classification", ("even", "odd"))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    """Words w0 … w99 are the ids 4 … 103; two sequences are [CLS] a [SEP] b [SEP]."""
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make_tokenizer(folder, **changes):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])}
    vocab |= {f"w{i}": 4 + i for i in range(100)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    settings: dict[str, Any] = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings |= {"pad_token": "[PAD]", "model_max_length": 32}
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, **(settings | changes)).save_pretrained(folder)
    return folder


def text(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers):
    return [4 + n for n in numbers]


def in_turn(count, first=0):
    """Return examples of 1 to 7 words; the label says whether the first word's number is odd."""
    made = []
    for i in range(first, first + count):
        made.append(Example(text(i % 100, *range(i % 7), i // 7), None, i % 2))
    return made


@pytest.fixture
def data(tokenizer_path):
    """A function that makes data of a source; a list of examples is every part of labelled text."""

    def make(source, *, task=CLASSES, **changes):
        if isinstance(source, list):
            splits = dict.fromkeys(("train", "validation", "test"), source)
            source = LabelledText("ours", "CC0", task, splits)
        settings = {
            "corpus": {},
            "tokenizer_path": tokenizer_path,
            "sequence_length": 16,
            "batch_size": 4,
            "evaluation_batch_size": 3,
        }
        made = EncoderData(0, **(settings | changes))
        made.corpus = source
        return made

    return make


def fit(data, max_steps=6, rank=0, world_size=1):
    data.trainer = types.SimpleNamespace(
        max_steps=max_steps, accumulate_grad_batches=1, global_rank=rank, world_size=world_size
    )
    return data.train_dataloader()


def numbers(batches):
    """Return the number of every text's first word, which tells those of `in_turn` apart."""
    return [n - 4 for batch in batches for n in batch.input_ids[:, 1].tolist()]


def first_words(examples):
    return [int(example.text.split()[0][1:]) for example in examples]


def equal(one, other):
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def test_texts_are_padded_to_the_longest_of_their_batch(data):
    made = data([Example(text(1, 2), None, 0), Example(text(3), None, 1), *in_turn(2)])
    batch = next(made.evaluation_batches("test"))
    assert batch.input_ids[:2].tolist() == [[CLS, *ids(1, 2), SEP], [CLS, *ids(3), SEP, PAD]]
    assert batch.attention_mask[:2].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert batch.attention_mask.dtype == torch.bool
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.unique().tolist() == [0]
    assert batch.labels is not None
    assert (batch.labels.tolist(), batch.labels.dtype) == ([0, 1, 0], torch.long)
    assert (made.task, made.truncated("test")) == (CLASSES, 0)


def test_the_second_text_of_a_pair_has_its_own_type(data):
    made = data([Example(text(1, 2), text(3), 0), Example(text(4), text(5), 1)])
    batch = next(made.evaluation_batches("test"))
    assert batch.input_ids.tolist() == [
        [CLS, *ids(1, 2), SEP, *ids(3), SEP],
        [CLS, *ids(4), SEP, *ids(5), SEP, PAD],
    ]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_a_tokenizer_without_types_makes_none_and_pads_on_its_own_side(data, tmp_path):
    names = ["input_ids", "attention_mask"]
    path = make_tokenizer(tmp_path, model_input_names=names, padding_side="left")
    made = data([Example(text(1), None, 0), Example(text(2, 3), None, 1)], tokenizer_path=str(path))
    batch = next(made.evaluation_batches("test"))
    assert batch.token_type_ids is None
    assert batch.input_ids[0].tolist() == [PAD, CLS, *ids(1), SEP]
    assert batch.attention_mask[0].tolist() == [False, True, True, True]


def test_numbers_and_several_labels(data):
    numbers = data(
        [Example("w1", None, 1.5), Example("w2", None, -2.0)], task=Task("regression", ("s",))
    )
    batch = next(numbers.evaluation_batches("test"))
    assert batch.labels is not None
    assert (batch.labels.tolist(), batch.labels.dtype) == ([1.5, -2.0], torch.float32)
    several = Task("multi_label", ("a", "b", "c"))
    marked = data([Example("w1", None, (0, 2)), Example("w2", None, ())], task=several)
    batch = next(marked.evaluation_batches("test"))
    assert batch.labels is not None
    assert batch.labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_long_texts_are_cut_and_counted_or_refused(data):
    long, longer = Example(text(*range(20)), None, 0), Example(text(*range(30)), text(1, 2), 1)
    made = data([long, Example(text(1), None, 1)], sequence_length=8)
    first = next(made.evaluation_batches("test"))
    assert first.input_ids[0].tolist() == [CLS, *ids(*range(6)), SEP]
    assert (made.truncated("test"), made.truncated("train")) == (1, 1)
    turned = Example(longer.pair or "", longer.text, 1)
    pairs = next(data([longer, turned], sequence_length=8).evaluation_batches("test"))
    assert pairs.input_ids.tolist() == [
        [CLS, *ids(0, 1, 2), SEP, *ids(1, 2), SEP],
        [CLS, *ids(1, 2), SEP, *ids(0, 1, 2), SEP],
    ]
    refusing = data([Example(text(1), None, 1), long], sequence_length=8, truncate=False)
    with pytest.raises(UserError) as refused:
        refusing.rows("test")
    assert str(refused.value) == (
        f"data.sequence_length=8: 1 of 2 texts of test are longer, the first begins "
        f"{long.text[:40]!r}; set a greater length, or data.truncate=true to cut them"
    )


def test_a_text_of_just_the_length_is_whole(data):
    made = data([Example(text(*range(6)), None, 0)] * 2, sequence_length=8, truncate=False)
    assert made.truncated("test") == 0


def general(*documents):
    return Corpus("general", "CC0", dict.fromkeys(("train", "validation", "test"), documents))


def test_documents_are_cut_into_pieces_and_nothing_is_lost(data):
    documents = [text(*range(25)), text(7)]
    made = data(general(*documents), sequence_length=8, truncate=False)
    batches = list(made.evaluation_batches("train"))
    rows = [
        [t for t, real in zip(row, mask, strict=True) if real]
        for batch in batches
        for row, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    ]
    pieces = [range(6), range(6, 12), range(12, 18), range(18, 24), [24], [7]]
    assert rows == [[CLS, *ids(*piece), SEP] for piece in pieces]
    assert all(batch.labels is None for batch in batches)
    assert (made.task, made.truncated("train")) == (None, 0)
    assert made.examples("train") == [Example(d) for d in documents]


def test_a_tokenizer_that_cannot_cut():
    slow = types.SimpleNamespace(is_fast=False, name_or_path="some/model")
    with pytest.raises(UserError) as refused:
        encode_pieces([Example("w1")], slow, 8)
    assert str(refused.value) == (
        "data.tokenizer_path=some/model: the tokenizer cannot cut documents into pieces; name one "
        "with a tokenizer.json"
    )


def test_a_training_batch_is_a_function_of_seed_and_position(data):
    source = in_turn(10)
    whole = list(fit(data(source)))
    again = fit(data(source))
    again.load_state_dict({"position": 2})
    assert all(equal(a, b) for a, b in zip(whole[2:], again, strict=True))
    epoch = numbers(whole)[:10]
    assert sorted(epoch) == list(range(10))
    assert epoch != list(range(10))
    halves = [list(fit(data(source, batch_size=2), rank=r, world_size=2)) for r in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert numbers([batch]) == numbers(parts)


def test_rows_are_the_same_examples_at_few_labels_and_at_all(data):
    source = in_turn(60)
    few, everything = data(source, train_labels=20), data(source)
    assert len(few.examples("train")) == len(few.rows("train")) == 20
    assert few.examples("train") == everything.examples("train")[:20]
    assert sum(e.label == 1 for e in few.examples("train")) == 10
    assert len(few.examples("test")) == 60
    assert list(few.rows("train")) == everything.rows("train")[:20]
    for batch in fit(few):
        assert set(numbers([batch])) <= set(first_words(few.examples("train")))
        assert batch.labels.tolist() == [n % 2 for n in numbers([batch])]
    other = data(source, train_labels=20, subset_seed=1)
    assert other.examples("train") != few.examples("train")


def test_few_rows_are_spread_evenly_and_training_rows_are_all_there(data):
    made = data(in_turn(10), max_evaluation_rows=4)
    assert numbers(made.evaluation_batches("validation")) == [0, 2, 5, 7]
    assert numbers(made.evaluation_batches("train")) == first_words(made.examples("train"))
    assert len(made.examples("train")) == 10
    assert numbers(made.val_dataloader()) == [0, 2, 5, 7]


def test_fewer_documents_and_fewer_batches(data):
    assert len(data(in_turn(10), max_train_documents=6, train_labels=8).rows("train")) == 6
    assert len(data(general("w1", "w2", "w3"), max_train_documents=2).rows("train")) == 2
    one_batch = data(in_turn(10), distinct_train_batches=1)
    assert set(numbers(fit(one_batch))) == set(first_words(one_batch.examples("train")[:4]))


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            general("w1"),
            {"train_labels": 50},
            "data.train_labels=50: general has no labels; set it to null, or name labelled text as "
            "data.corpus",
        ),
        (
            in_turn(10),
            {"train_labels": 11},
            "data.train_labels=11: expected 2 to 10, an example of every class at least and the "
            "training part at most, or null for all of it",
        ),
        (
            general(Conversation([], "here")),
            {},
            "data.corpus: general holds conversations or tokens; encoders read plain text; name a "
            "corpus of it",
        ),
        (
            [Example("w1", "w2", 0), Example("w1", None, 1)],
            {},
            "data.corpus: 1 of 2 examples are pairs of texts; expected all or none",
        ),
        (
            in_turn(4),
            {"sequence_length": 3},
            "data.sequence_length=3: expected 4 or more, a token of text beside the special ones "
            "of a pair",
        ),
    ],
    ids=["labels of none", "too many labels", "conversations", "some pairs", "too short"],
)
def test_data_that_cannot_be(data, source, changes, message):
    with pytest.raises(UserError) as refused:
        data(source, **changes).rows("train")
    assert str(refused.value) == message


def test_a_length_beyond_the_position_table(data, tokenizer_path):
    with pytest.raises(UserError) as refused:
        _ = data(in_turn(4), sequence_length=33).tokenizer
    assert str(refused.value) == (
        "data.sequence_length=33: expected 32 or less, as many positions as the model of "
        f"data.tokenizer_path={tokenizer_path} has"
    )


def test_a_tokenizer_without_a_pad_token(data, tmp_path):
    path = make_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(UserError) as refused:
        _ = data(in_turn(4), tokenizer_path=str(path)).tokenizer
    assert str(refused.value) == (
        f"data.tokenizer_path={path}: the tokenizer has no pad token; expected an encoder's, such "
        "as BERT's"
    )


def test_own_files_are_batches(tmp_path, tokenizer_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"w{i}", "label": ("even", "odd")[i % 2]} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = OmegaConf.load(ROOT / "conf/data/labelled_files.yaml")
    node.corpus.update({"train_path": str(path), "names": ["even", "odd"]})
    node.tokenizer_path = tokenizer_path
    node.sequence_length = 8
    made = instantiate(OmegaConf.to_container(node), _recursive_=False)(seed=0)
    (batch, *_) = made.evaluation_batches("test")
    assert batch.labels.tolist() == [(n - 4) % 2 for n in batch.input_ids[:, 1].tolist()]
    assert made.task == CLASSES


NODES = [p for p in sorted((ROOT / "conf/data").glob("*.yaml")) if "EncoderData" in p.read_text()]


@pytest.mark.parametrize("path", NODES, ids=[path.stem for path in NODES])
def test_a_yaml_lists_every_parameter_of_its_targets(path: Path):
    node = OmegaConf.load(path)
    for part in (node, node.corpus):
        parameters = inspect.signature(get_object(part._target_)).parameters.values()
        keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert set(part) - {"_target_", "_partial_"} == keywords
