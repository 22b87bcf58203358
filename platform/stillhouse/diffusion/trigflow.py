"""Any network as one on TrigFlow's path.

A network that predicts a x_0 + b ε on a path with α and σ is asked at the time s where σ/α = tan t,
of an input scaled to that path; with κ = √(α² + σ²) at s:

    x_s = κ x_t        F(x_t, t) = (κ output(x_s, s) - (a cos t + b sin t) x_s) / (α b - σ a)

For a rectified flow this is SANA-Sprint's wrapper (2503.09641, eq. 5 to 8):

    κ = 1 / (sin t + cos t)      s = κ sin t      F = κ v(x_s, s) + (cos t - sin t) x_s

Exact, without training, and differentiable in t: what depends on t here is part of a tangent.
"""

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.diffusion.paths import TRIGFLOW, Path, Prediction, along
from stillhouse.records.diffusion import Condition


class TrigFlowView(nn.Module):
    """F(x_t, t) of a network that was trained otherwise.

    Args:
        network: called with (x_s, s, condition, guidance_scale).
        path, prediction: of the network.
    """

    def __init__(self, network: nn.Module, path: Path, prediction: Prediction) -> None:
        super().__init__()
        self.network = network
        self.path = path
        self.prediction = prediction

    def forward(
        self,
        x_t: Float[Tensor, "B ..."],
        t: Float[Tensor, "B"],
        condition: Condition,
        guidance_scale: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Return F; arguments as in `records.diffusion.TrigFlowNetwork`."""
        # π/2 in float32 lies behind π/2, where tan t is negative.
        path, t = self.path, t.double().clamp(max=TRIGFLOW.last)
        # A path that ends before its noise is pure is asked for no time behind its last.
        s = path.time_of_angle(t).clamp(max=path.last)
        alpha, sigma = path.alpha(s), path.sigma(s)
        a, b = self.prediction(path, s)
        scale, whole = path.scale(s), alpha * b - sigma * a
        x_s = along(scale, x_t) * x_t
        output = self.network(x_s, s, condition, guidance_scale)
        of_x = (a * t.cos() + b * t.sin()) / whole
        return along(scale / whole, x_t) * output - along(of_x, x_t) * x_s


def denoised(x_t: Tensor, F: Tensor, t: Float[Tensor, "B"]) -> Tensor:
    """Return cos(t) x_t - sin(t) F: x_0 as F has it, and the consistency function f."""
    t = t.double()
    return along(t.cos(), x_t) * x_t - along(t.sin(), x_t) * F


def noised(x_0: Tensor, noise: Tensor, t: Float[Tensor, "B"]) -> Tensor:
    """Return x_t = cos(t) x_0 + sin(t) ε on TrigFlow's path."""
    t = t.double()
    return along(TRIGFLOW.alpha(t), x_0) * x_0 + along(TRIGFLOW.sigma(t), x_0) * noise


def velocity(x_0: Tensor, noise: Tensor, t: Float[Tensor, "B"]) -> Tensor:
    """Return cos(t) ε - sin(t) x_0, the velocity of that path."""
    t = t.double()
    return along(t.cos(), x_0) * noise - along(t.sin(), x_0) * x_0
