"""A checkpoint to go on from lies between two windows of accumulation, and behind no validation."""

import pytest
import torch
from training import bare_trainer, plain_sgd

from stillhouse.data.encoding import text_as_tokens
from stillhouse.data.language import KeptBatches
from stillhouse.data.windows import TokenWindows, collate_windows
from stillhouse.families.checkpoints import ResumeCheckpoint
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.families.sequence.sft import sft

WINDOWS = TokenWindows(
    [text_as_tokens([3, 1, 4, 1, 5], 0)] * 48, length=8, end_token=0, packing=False
).in_order()
BATCHES = [collate_windows([window], pad_token=0) for window in WINDOWS]


class Watched(ResumeCheckpoint):
    """Notes the number of batches that were trained on when a checkpoint is written."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.written: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        before = self._last_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._last_step != before:
            self.written.append(batch_idx + 1)


@pytest.mark.parametrize(
    ("accumulate", "every", "validation", "written"),
    [
        (1, 4, 100, [4, 8, 12, 16, 20]),
        # Steps 4, 8, … fall on a validation: the next step's end takes their place.
        (1, 4, 8, [4, 9, 13, 17, 21]),
        # The batch behind a validation is in the middle of a window of two.
        (2, 4, 8, [10, 18, 26, 34, 42]),
        (3, 2, 6, [9, 15, 21, 27, 33, 39, 45]),
    ],
)
def test_where_checkpoints_are_written(
    tiny_llama, tmp_path, accumulate, every, validation, written
):
    watched = Watched(checkpoint_every_n_steps=every)
    trainer = bare_trainer(
        tmp_path,
        callbacks=[watched],
        enable_checkpointing=True,
        max_steps=len(BATCHES) // accumulate if accumulate > 1 else 24,
        accumulate_grad_batches=accumulate,
        val_check_interval=validation if validation <= len(BATCHES) else 1.0,
    )
    module = SequenceDistiller(tiny_llama().float(), None, sft, plain_sgd).train()
    trainer.fit(module, KeptBatches(BATCHES), KeptBatches(BATCHES[:1]))
    assert watched.written == written
    assert not [n for n in written if n % accumulate or n % validation == 0]
    (kept,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(kept, weights_only=True)["global_step"] == written[-1] // accumulate
