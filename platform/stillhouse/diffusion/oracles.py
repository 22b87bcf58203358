"""Teachers whose every answer is known: mixtures of Gaussians on TrigFlow's path.

Data x_0 ~ Σ_k π_k N(μ_k, s_k² I). With V_k = s_k² cos² t + sin² t, δ_k = x_t - μ_k cos t and the
posterior weights γ_k(x_t, t) of the components:

    score  = -Σ γ_k δ_k / V_k
    F      = Σ γ_k (-sin t μ_k + (1 - s_k²) sin t cos t δ_k / V_k)        dx/dt
    E[x_0] = cos t x_t - sin t F

and for a single component the end of the path through x_t, and the F that computes it:

    f*(x_t, t) = μ + s δ / √V        F* = (cos t x_t - f*) / sin t
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.records.diffusion import UNCONDITIONAL, Condition


class GaussianMixture(nn.Module):
    """An exact teacher in TrigFlow's convention, and its data.

    Args:
        means: [K][D].
        deviations: [K], s_k of a coordinate.
        weights: [K], in proportion; None for equal ones.
        labels: [K], the class of each component from 0; None gives each its own. A sample with a
            label comes from the components of that class.

    Raises:
        UserError: for lists of unequal lengths, deviations or weights that are not above 0.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        deviations: Sequence[float],
        weights: Sequence[float] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        count = len(means)
        weights = [1.0] * count if weights is None else weights
        labels = list(range(count)) if labels is None else labels
        lengths = {len(means), len(deviations), len(weights), len(labels)}
        if len(lengths) > 1 or len({len(mean) for mean in means}) > 1:
            raise UserError(
                "means, deviations, weights and labels of a mixture: expected one of each for "
                "every component, and means of one length"
            )
        if not all(value > 0 for value in [*deviations, *weights]):
            raise UserError(
                f"deviations={list(deviations)}, weights={list(weights)}: expected numbers above 0"
            )
        self.means = nn.Buffer(torch.tensor(means, dtype=torch.double))
        self.deviations = nn.Buffer(torch.tensor(deviations, dtype=torch.double))
        shares = torch.tensor(weights, dtype=torch.double)
        self.weights = nn.Buffer(shares / shares.sum())
        self.labels = nn.Buffer(torch.tensor(labels))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return tuple(self.means.shape[1:])

    def sample(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B D"], Int[Tensor, "B"]]:
        """Return samples of the data, float32, and the component of each."""
        chosen = torch.multinomial(self.weights.cpu(), count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.double)
        x_0 = self.means.cpu()[chosen] + self.deviations.cpu()[chosen, None] * noise
        return x_0.float(), chosen

    def forward(
        self,
        x_t: Float[Tensor, "B D"],
        t: Float[Tensor, "B"],
        condition: Condition,
        guidance_scale: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Return F; arguments as in `records.diffusion.TrigFlowNetwork`."""
        t = t.double()
        of = self._posterior(x_t, t, condition)
        cos, sin = t.cos()[:, None, None], t.sin()[:, None, None]
        shrink = (1 - self.deviations.square())[:, None] * sin * cos
        F = -sin * self.means + shrink * of.offsets / of.variances[..., None]
        return (of.weights[..., None] * F).sum(1).to(x_t.dtype)

    def score(
        self, x_t: Float[Tensor, "B D"], t: Float[Tensor, "B"], condition: Condition
    ) -> Float[Tensor, "B D"]:
        """Return the gradient of log p(x_t) in x_t."""
        of = self._posterior(x_t, t.double(), condition)
        terms = of.offsets * (of.weights / of.variances)[..., None]
        return -terms.sum(1).to(x_t.dtype)

    def consistency(self, x_t: Float[Tensor, "B D"], t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Return f*, the data at the end of the path through x_t, of a single component.

        Raises:
            UserError: for a mixture, whose paths have no closed form.
        """
        if len(self.means) > 1:
            raise UserError("the consistency function is known for a single Gaussian only")
        of = self._posterior(x_t, t.double(), Condition())
        standard = of.offsets[:, 0] / of.variances[:, :1].sqrt()
        return (self.means[0] + self.deviations[0] * standard).to(x_t.dtype)

    def _posterior(self, x_t: Tensor, t: Tensor, condition: Condition) -> "_Posterior":
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        offsets = x_t.double()[:, None] - self.means * cos[..., None]
        variances = self.deviations.square() * cos.square() + sin.square()
        logits = self.weights.log() - offsets.square().sum(2) / (2 * variances)
        logits = logits - x_t.shape[1] / 2 * variances.log()
        if condition.labels is not None:
            labels = condition.labels[:, None]
            other = (labels != self.labels) & (labels != UNCONDITIONAL)
            logits = logits.masked_fill(other, -torch.inf)
        return _Posterior(logits.softmax(1), offsets, variances)


class _Posterior(NamedTuple):
    """What all answers are made of; K components."""

    weights: Float[Tensor, "B K"]
    offsets: Float[Tensor, "B K D"]
    variances: Float[Tensor, "B K"]
