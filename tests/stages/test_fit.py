"""What a fit and an evaluation say of their data: labelled texts that were cut."""

import json
from pathlib import Path
from typing import Any

import pytest
from encoder_fits import EncoderWorld

from stillhouse.data import encoders
from stillhouse.data.corpora.corpus import Corpus
from stillhouse.stages.evaluate import Evaluate

FEW = {"max_steps": 3, "val_check_interval": 3}
EVALUATOR = {
    "_target_": "stillhouse.evaluation.encoders.encoder_models",
    "_partial_": True,
    "reference": None,
    "score": None,
    "speed_tokens": 4,
    "speed_repeats": 1,
    "dtype": "float32",
    "attn_implementation": "sdpa",
}


@pytest.fixture
def world(tmp_path: Path) -> EncoderWorld:
    return EncoderWorld.make(tmp_path)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were tokenised, one entry a split that was read."""
    read: list[int] = []
    encode = encoders.encode_examples

    def counted(examples: Any, *given: Any) -> Any:
        read.append(len(examples))
        return encode(examples, *given)

    monkeypatch.setattr(encoders, "encode_examples", counted)
    return read


def longer(world: EncoderWorld, split: str) -> int:
    """Return how many texts of a split have more than five words."""
    lines = (world.folder / f"{split}.jsonl").read_text().splitlines()
    found = sum(len(json.loads(line)["text"].split()) > 5 for line in lines)
    assert 0 < found < len(lines) == 32
    return found


def said(context: Any) -> str:
    return " ".join(context.console.file.getvalue().split())


def test_texts_that_were_cut_are_reported_of_every_split_that_is_read(
    world, stage_context, tokenised
) -> None:
    data, ending = world.data(sequence_length=5), "data.sequence_length=5 and were cut"
    context = stage_context("fit")
    metrics = world.fit(data=data, trainer=FEW)(context).metrics
    counts = {split: longer(world, split) for split in ("train", "validation", "test")}
    assert len(set(counts.values())) == 3, "equal counts show nothing"
    kept = {name: value for name, value in metrics.items() if name.startswith("truncated")}
    assert kept == {
        "truncated_train_texts": counts["train"],
        "truncated_validation_texts": counts["validation"],
    }
    assert said(context).startswith(
        f"fit: {counts['train']} of 32 training texts are longer than {ending} "
        f"fit: {counts['validation']} of 32 validation texts are longer than {ending} "
    ), "before it trains"
    assert tokenised == [32, 32], "once each"

    tokenised.clear()
    models = {"student": str(context.output)}
    context = stage_context("evaluate")
    metrics = Evaluate(models=models, data=data, evaluator=EVALUATOR)(context).metrics
    assert metrics == {"truncated_test_texts": counts["test"]}
    told = f"evaluate: {counts['test']} of 32 test texts are longer than {ending}"
    assert said(context).endswith(told)
    assert tokenised == [32]


def test_where_no_text_was_cut_there_is_nothing_to_tell(world, stage_context) -> None:
    context = stage_context("fit")
    metrics = world.fit(trainer=FEW)(context).metrics
    assert metrics["truncated_train_texts"] == metrics["truncated_validation_texts"] == 0
    assert "cut" not in said(context)


def test_text_without_labels_has_nothing_to_report(world) -> None:
    data = world.made(corpus={}, sequence_length=5)
    text = ["w4 w5 w6 w7 w8 w9"]
    data.corpus = Corpus("ours", "CC0", {"train": text, "validation": text})
    data.prepare_data()
    assert (data.report(), data.remarks()) == ({}, [])
