"""A small diffusion transformer, and a step of continuous-time consistency training on it.

sCM (2410.11081) with TrigFlow's x_t = cos(t) x_0 + sin(t) z: the network F is differentiated along
its own trajectory, and its output is pulled against that tangent:

    dF/dt = JVP of F at (x_t, t) along (cos t sin t v, cos t sin t),   v = cos(t) z - sin(t) x_0
    g     = -cos²(t) (v - F⁻) - r cos(t) sin(t) x_t - r dF/dt          normalised: g / (|g| + 0.1)
    loss  = mean |F - F⁻ - g|²

F⁻ is F without a gradient. `two_pass_step` computes the tangent in a pass without autograd and the
gradient in another; `one_pass_step` takes both from one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, modulated, in torch's own operations."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA by the one backend that has a forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Attention and an MLP, each behind a modulated norm and a gate (DiT, 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor, attention: Attention, norm: Norm) -> Tensor:
        """Return x [B, N, D]; c [B, D] is the time's embedding."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c).chunk(6, -1)
        qkv = self.qkv(norm(x, shift, scale)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate[:, None] * self.projection(attended)
        hidden = gelu(self.inner(norm(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self.outer(hidden)


class SmallDiT(nn.Module):
    """x_t [B, N, channels] and t [B] -> F of x_t's shape."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 6, channels: int = 16):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, channels)

    def forward(
        self, x: Tensor, t: Tensor, attention: Attention, norm: Norm = plain_norm
    ) -> Tensor:
        """Return F."""
        frequencies = torch.exp(torch.linspace(0, -6, 32, device=t.device, dtype=t.dtype))
        angles = t[:, None] * frequencies
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c, attention, norm)
        return self.head(x)


def trajectory(tokens: int, channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, its velocity v [1, N, channels] and t [1]."""
    x_0, z, t = torch.randn(1, tokens, channels), torch.randn(1, tokens, channels), torch.ones(1)
    return t.cos() * x_0 + t.sin() * z, t.cos() * z - t.sin() * x_0, t


def tangents(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Along what F is differentiated."""
    return (t.cos() * t.sin())[:, None, None] * v, t.cos() * t.sin()


def loss(F: Tensor, F_t: Tensor, x: Tensor, v: Tensor, t: Tensor, r: float = 1.0) -> Tensor:
    """Return the loss of F, whose tangent F_t is a constant."""
    cos, sin = t.cos()[:, None, None], t.sin()[:, None, None]
    fixed = F.detach()
    g = -(cos**2) * (v - fixed) - r * cos * sin * x - r * F_t.detach()
    g = g / (g.norm() + 0.1)
    return (F - fixed - g).square().mean()


def two_pass_step(
    network: SmallDiT, x: Tensor, v: Tensor, t: Tensor, dual: Attention, norm: Norm = plain_norm
) -> None:
    """Leave the gradients in the parameters; `dual` is the attention of the pass with tangents."""
    with torch.no_grad():
        _, F_t = torch.func.jvp(lambda x, t: network(x, t, dual, norm), (x, t), tangents(v, t))
    F = network(x, t, scaled_dot_product_attention, norm)
    loss(F, F_t, x, v, t).backward()


def one_pass_step(
    network: SmallDiT, x: Tensor, v: Tensor, t: Tensor, dual: Attention, norm: Norm = plain_norm
) -> None:
    """Leave the gradients in the parameters, of one pass with tangents."""
    F, F_t = torch.func.jvp(lambda x, t: network(x, t, dual, norm), (x, t), tangents(v, t))
    loss(F, F_t, x, v, t).backward()
