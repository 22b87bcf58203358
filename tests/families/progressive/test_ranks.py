"""Two ranks take the step of one process on the same texts, and validate alike."""

import pytest
import torch
from encoder_stages import BATCHES, OneStep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*in distributed setting")
def test_step_of_two_ranks_with_accumulation_is_that_of_one_process(stage_context) -> None:
    together, alone = (stage_context(f"on {devices}") for devices in (2, 1))
    metrics = OneStep(devices=2)(together).metrics
    expected_metrics = OneStep(devices=1)(alone).metrics
    expected = torch.load(alone.output / "update_0.pt")
    assert expected.norm() > 0.1
    for rank in (0, 1):
        update = torch.load(together.output / f"update_{rank}.pt")
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(metrics)
    assert metrics["texts_seen"] == sum(len(batch.input_ids) for batch in BATCHES)
