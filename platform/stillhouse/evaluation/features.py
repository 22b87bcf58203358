"""Features of pictures, by the networks that find them; each gives its distance its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.evaluation.generators import device
from stillhouse.students.classifiers import SmallClassifier

BATCH = 500


@dataclass(frozen=True)
class Seen:
    """What a network sees in pictures.

    Attributes:
        features: [N, D].
        logits: [N, classes]; None for a network of other classes than the data's.
    """

    features: Float[Tensor, "N D"]
    logits: Float[Tensor, "N V"] | None


Features = Callable[[Float[Tensor, "N C H W"]], Seen]


def classifier(*, path: str) -> Features:
    """Return the features of a classifier that a stage trained on the same data.

    Args:
        path: its folder.

    Raises:
        UserError: for a folder without one.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"evaluation.classifier.path or evaluation.features.path={path}: there is no "
            "classifier; expected the artifact of a stage of conf/stage/classifier.yaml"
        )
    network: Any = SmallClassifier.from_pretrained(path)
    network = network.to(device()).eval()
    mean, std = network.config["mean"], network.config["std"]

    @torch.no_grad()
    def see(pixels: Tensor) -> Seen:
        said = [
            network((part.to(device()) - mean) / std) for part in pixels.clamp(0, 1).split(BATCH)
        ]
        return Seen(
            torch.cat([part.features for part in said]).cpu(),
            torch.cat([part.logits for part in said]).cpu(),
        )

    return see
