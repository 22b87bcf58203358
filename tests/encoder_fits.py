"""Fits of a tiny encoder on a few labelled texts, as nodes of the stage `fit`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from encoders import make_tokenizer

from stillhouse.data.encoders import EncoderData
from stillhouse.stages.fit import Fit

FINETUNE = {"_target_": "stillhouse.families.progressive.finetune.finetune", "_partial_": True}
ENCODER = {
    "_target_": "stillhouse.students.encoders.encoder",
    "_partial_": True,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@dataclass(frozen=True)
class EncoderWorld:
    """A folder with a tokenizer and a labelled file of words that it knows."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, texts: int = 32) -> "EncoderWorld":
        """Write texts of 2 to 7 words; the label is the first one's parity, now and then not."""
        make_tokenizer(10).save_pretrained(folder)
        draws = torch.Generator().manual_seed(0)
        for split in ("train", "validation", "test"):
            lines, noise = [], split == "train"
            for number in range(texts):
                # Of more words, the special ones w1 and w2 would be a part of others.
                length = int(torch.randint(2, 8, (), generator=draws))
                words = torch.randint(4, 10, (length,), generator=draws).tolist()
                label = (words[0] + noise * (number % 3 == 0)) % 2
                text = " ".join(f"w{n}" for n in words)
                lines.append(json.dumps({"text": text, "label": label}))
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        return cls(folder)

    def data(self, **changes: Any) -> dict[str, Any]:
        """Return the node of the labelled text."""
        target = {"_target_": "stillhouse.data.encoders.EncoderData", "_partial_": True}
        splits = ("train", "validation", "test")
        corpus = {
            "_target_": "stillhouse.data.labelled.files.labelled_files",
            **{f"{split}_path": str(self.folder / f"{split}.jsonl") for split in splits},
            "kind": "classification",
            "names": ["even", "odd"],
            "name": None,
            "licence": "CC0",
        }
        settings = {
            "tokenizer_path": str(self.folder),
            "sequence_length": 8,
            "batch_size": 4,
            "evaluation_batch_size": 10,
        }
        return target | {"corpus": corpus} | settings | changes

    def made(self, **changes: Any) -> EncoderData:
        """Return the labelled text itself."""
        node = {k: v for k, v in self.data(**changes).items() if not k.startswith("_")}
        return EncoderData(0, **node)

    def fit(self, **changes: Any) -> Fit:
        """Return a stage that fine-tunes, dropout and all; `trainer` and `family` add to theirs."""
        family = {
            "_target_": "stillhouse.families.progressive.module.ProgressiveDistiller",
            "_partial_": True,
        }
        trainer = {
            "_target_": "lightning.pytorch.Trainer",
            "_partial_": True,
            "max_steps": 80,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "accelerator": "cpu",
            "enable_model_summary": False,
        }
        nodes = {
            "method": FINETUNE,
            "teacher": None,
            "student": ENCODER,
            "data": self.data(),
            "optimizer": {
                "_target_": "stillhouse.families.optimizers.adamw",
                "_partial_": True,
                "learning_rate": 0.015,
            },
            "seed": 0,
        }
        family |= changes.pop("family", {})
        trainer |= changes.pop("trainer", {})
        return Fit(**(nodes | {"family": family, "trainer": trainer} | changes))


class Recorder(pl.Callback):
    """Notes what every validation found, and the student's weights there."""

    seen: list[tuple[int, dict[str, float], dict[str, torch.Tensor]]]

    def __init__(self, *, seen: list[Any]) -> None:
        self.seen = seen

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        student: Any = pl_module.student
        weights = {name: t.clone() for name, t in student.state_dict().items()}
        self.seen.append((trainer.global_step, found, weights))


class Stop(pl.Callback):
    """Ends the fit behind a step as a kill would, when nothing can be put right any more."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")
