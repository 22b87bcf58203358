"""Two ranks take the step of one process on the same texts, and validate alike."""

import pytest
import torch
from encoder_stages import BATCHES, OneStep
from sharded_trainers import Sharing


@pytest.mark.slow
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("sharing", list(Sharing))
@pytest.mark.filterwarnings("ignore:.*in distributed setting")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_step_of_two_ranks_with_accumulation_is_that_of_one_process(
    stage_context, sharing: Sharing, projection: bool
) -> None:
    """With all weights on each of them, and sharing them (FSDP2), the teacher's too."""
    together, alone = (stage_context(f"on {devices}") for devices in (2, 1))
    metrics = OneStep(devices=2, sharing=sharing, projection=projection)(together).metrics
    expected_metrics = OneStep(devices=1, projection=projection)(alone).metrics
    expected = torch.load(alone.output / "update_0.pt")
    assert expected.norm() > 0.1
    for rank in (0, 1):
        update = torch.load(together.output / f"update_{rank}.pt")
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(metrics)
    assert metrics["texts_seen"] == sum(len(batch.input_ids) for batch in BATCHES)
