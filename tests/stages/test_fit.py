"""What a fit says of its data: labelled texts that were cut are counted, and told."""

import json
from pathlib import Path

from encoder_fits import EncoderWorld

from stillhouse.data.corpora.corpus import Corpus

FEW = {"max_steps": 3, "val_check_interval": 3}


def test_texts_that_were_cut_are_reported(tmp_path: Path, stage_context) -> None:
    world = EncoderWorld.make(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    longer = sum(len(json.loads(line)["text"].split()) > 5 for line in lines)
    assert 0 < longer < len(lines)
    context = stage_context("fit")
    stage = world.fit(data=world.data(sequence_length=5), trainer=FEW)
    assert stage(context).metrics["truncated_texts"] == longer
    assert context.console.file.getvalue().startswith(
        f"fit: {longer} of 32 training texts are longer than data.sequence_length=5 and were cut\n"
    )
    context = stage_context("fit")
    assert world.fit(trainer=FEW)(context).metrics["truncated_texts"] == 0
    assert "cut" not in context.console.file.getvalue()


def test_text_without_labels_has_nothing_to_report(tmp_path: Path) -> None:
    data = EncoderWorld.make(tmp_path).made(corpus={}, sequence_length=5)
    data.corpus = Corpus("ours", "CC0", {"train": ["w4 w5 w6 w7 w8 w9"]})
    assert (data.report(), data.remarks()) == ({}, [])
