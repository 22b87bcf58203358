"""Small classifiers of pictures, whose last hidden layer serves as features."""

from dataclasses import dataclass

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.images import ImageData
from stillhouse.errors import UserError
from stillhouse.ranges import Count


@dataclass
class Classified(BaseOutput):
    """What a classifier says.

    Attributes:
        logits: [B, classes].
        features: [B, D], the last hidden layer.
    """

    logits: Tensor
    features: Tensor


class SmallClassifier(ModelMixin, ConfigMixin):
    """Convolutions at two resolutions and a hidden layer.

    Args:
        in_channels: of a picture.
        num_classes: how many.
        width: channels at the first resolution; twice as many at the second.
        feature_width: D.
        mean, std: how pictures are normalised that it is to be given.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int,
        feature_width: int,
        mean: float,
        std: float,
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, feature_width),
            nn.GELU(),
        )
        self.head = nn.Linear(feature_width, num_classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Classified:
        """Return logits and features of normalised pictures."""
        features = self.trunk(x)
        return Classified(logits=self.head(features), features=features)


def small_classifier(data: ImageData, *, width: Count, feature_width: Count) -> SmallClassifier:
    """Return a new classifier for the data's classes.

    Args:
        data: pictures with classes.
        width, feature_width: as in `SmallClassifier`.

    Raises:
        UserError: for data without classes or without pictures.
    """
    if not data.classes or len(data.image_shape) != 3:
        raise UserError(
            "student: a classifier needs pictures with classes; expected data=digits, or another "
            "source with labels"
        )
    mean, std = data.mean, data.std
    assert isinstance(mean, float)
    assert isinstance(std, float)
    return SmallClassifier(
        in_channels=data.image_shape[0],
        num_classes=len(data.classes),
        width=width,
        feature_width=feature_width,
        mean=mean,
        std=std,
    )
