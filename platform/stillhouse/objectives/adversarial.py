"""Adversarial losses; logits are high for what is taken for real.

Ian Goodfellow et al., arXiv:1406.2661, in its non-saturating form (DMD2), and the hinge loss of
Jae Hyun Lim, Jong Chul Ye, arXiv:1705.02894 (latent adversarial distillation, SANA-Sprint).

    non-saturating    L_G = softplus(-l_fake)    L_D = softplus(l_fake) + softplus(-l_real)
    hinge             L_G = -l_fake              L_D = (relu(1 + l_fake) + relu(1 - l_real)) / 2

Each is a mean over all logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus


@dataclass(frozen=True)
class Adversarial:
    """Both sides of an adversarial loss.

    Attributes:
        generator: called with the logits of samples.
        discriminator: called with (those of samples, those of real data).
    """

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def non_saturating() -> Adversarial:
    """Return DMD2's."""
    return Adversarial(_non_saturating_generator, _non_saturating_discriminator)


def hinge() -> Adversarial:
    """Return SANA-Sprint's."""
    return Adversarial(_hinge_generator, _hinge_discriminator)


def _non_saturating_generator(fake: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    return softplus(-fake).mean()


def _non_saturating_discriminator(
    fake: Float[Tensor, "B K"], real: Float[Tensor, "C K"]
) -> Float[Tensor, ""]:
    return softplus(fake).mean() + softplus(-real).mean()


def _hinge_generator(fake: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    return -fake.mean()


def _hinge_discriminator(
    fake: Float[Tensor, "B K"], real: Float[Tensor, "C K"]
) -> Float[Tensor, ""]:
    return (relu(1 + fake).mean() + relu(1 - real).mean()) / 2
