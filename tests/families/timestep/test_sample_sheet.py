"""The sheet of samples: one noise, a line a validation, W&B at once, and kept over a kill."""

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import torch
from generators import POINTS, data_of, point_generator
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from training import bare_trainer

from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.sample_sheet import SampleSheet
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms


def towards_one(networks: Any, batch: ImageBatch, *_: Any) -> LossTerms:
    t = torch.full((len(batch.x_0),), 1.0, dtype=torch.double)
    return LossTerms((networks.student(batch.x_0, t, batch.condition) - 1).square().mean())


def sheet_of(folder: Path, steps: int, rate: float = 0.0, **options: Any) -> SampleSheet:
    """Train on points with a validation after every step."""
    sheet = SampleSheet(count=3, most_validations=4)
    module = TimestepDistiller(
        point_generator(),
        None,
        towards_one,
        lambda module, max_steps: torch.optim.SGD(module.parameters(), lr=rate),
        times={"1": [1.5708]},
        guidance_scale=1.0,
        takes_tangents=False,
        learnt_weighting=False,
    )
    settings = {"max_steps": steps, "val_check_interval": 1, "callbacks": [sheet]}
    trainer = bare_trainer(folder, **(settings | options))
    trainer.fit(module, datamodule=data_of(POINTS))
    return sheet


def test_the_noise_is_the_same_at_every_validation(tmp_path: Path) -> None:
    still = sheet_of(tmp_path, 3).state_dict()["drawn"]
    assert list(still) == [1, 2, 3]
    assert still[1].shape == (12, 2)
    assert torch.equal(still[1], still[3])
    learning = sheet_of(tmp_path, 2, rate=0.1).state_dict()["drawn"]
    assert not torch.allclose(learning[1], learning[2])


def test_the_newest_is_kept_and_every_second_goes(tmp_path: Path) -> None:
    assert list(sheet_of(tmp_path, 5).state_dict()["drawn"]) == [1, 3, 5]
    assert list(sheet_of(tmp_path, 6).state_dict()["drawn"]) == [1, 3, 5, 6]


def test_earlier_samples_outlive_a_kill(tmp_path: Path) -> None:
    before = sheet_of(tmp_path, 2)
    after = SampleSheet(count=3, most_validations=4)
    after.load_state_dict(before.state_dict())
    draw = after.pictures()["samples"]
    assert draw(tmp_path / "samples.png").is_file()
    assert SampleSheet(count=3, most_validations=4).pictures() == {}


def test_wandb_gets_each_validation_as_it_comes(tmp_path: Path) -> None:
    logger = create_autospec(WandbLogger, instance=True)
    seen: list[tuple[str, int, tuple[int, int]]] = []

    def log_image(key: str, images: list[str], step: int) -> None:
        with Image.open(images[0]) as picture:
            seen.append((key, step, picture.size))

    logger.log_image = log_image
    logger.save_dir = str(tmp_path)
    sheet_of(tmp_path, 2, logger=[logger], log_every_n_steps=1)
    assert [(key, step) for key, step, _ in seen] == [("samples", 1), ("samples", 2)]
