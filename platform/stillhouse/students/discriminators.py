"""Discriminators: heads on the features of a diffusion network, which tell real from generated.

Axel Sauer et al., arXiv:2403.12015 (latent adversarial distillation); DMD2, arXiv:2405.14867, whose
head stands on the bottleneck of the fake score. Logits are high for what is taken for real.

Shape legend: B batch, N tokens, D width, K logits of a sample.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count
from stillhouse.records.diffusion import Condition, TrigFlowNetwork

Head = Callable[[int], nn.Module]
KERNEL = "stages.<stage>.family.discriminator.head.kernel"


def on_features(trunk: nn.Module, *, features: Sequence[str], head: Head) -> "Discriminator":
    """Return a head for each of some modules' outputs.

    Args:
        trunk: the fake score or the teacher, with `sample_shape`.
        features: names of modules, whose outputs are [B, N, D], [B, D, H, W] or [B, D].
        head: called with D, returns a module from [B, N, D] to a logit of each token.

    Raises:
        UserError: for a name that the trunk does not have, and a trunk without features.
    """
    trunk = getattr(trunk, "trunk", trunk)
    key = "stages.<stage>.family.discriminator.features"
    known = [name for name, _ in trunk.named_modules() if name]
    if not known:
        raise UserError(
            f"{key}={list(features)}: the teacher, a {type(trunk).__name__}, has no modules to "
            "read features of; expected teacher=denoiser"
        )
    for wanted in features:
        if wanted not in known:
            raise UserError(
                f"{key}={list(features)}: heads stand on the fake score, else on the teacher; the "
                f"one here, a {type(getattr(trunk, 'model', trunk)).__name__}, has no module "
                f"{wanted}; expected one such as {', '.join(_examples(known))}"
                f"{did_you_mean(wanted, known)}"
            )
    if not features:
        raise UserError(f"{key}=[]: expected the name of a module, such as {_examples(known)[0]}")
    shape: Any = trunk.sample_shape
    x, t = torch.zeros(2, *shape), torch.full((2,), 0.8, dtype=torch.double)
    with torch.no_grad(), _watched(trunk, features) as seen:
        # Some know no samples without a class.
        knows_none = getattr(trunk, "unconditional", True)
        trunk(x, t, Condition(None if knows_none else torch.zeros(2, dtype=torch.long)))
    return Discriminator({name: head(_tokens(seen[name]).shape[-1]) for name in features})


class Discriminator(nn.Module):
    """Heads, and no trunk: that is passed in, so that it may be a teacher or learn itself.

    Args:
        heads: by the name of the module that each stands on.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.features = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    def forward(
        self,
        trunk: TrigFlowNetwork,
        x_t: Float[Tensor, "B ..."],
        t: Float[Tensor, "B"],
        condition: Condition,
    ) -> Float[Tensor, "B K"]:
        """Return all heads' logits, float32; gradients reach x_t through the trunk."""
        with _watched(trunk, self.features) as seen:
            trunk(x_t, t, condition)
        pairs = zip(self.features, self.heads, strict=True)
        logits = [head(_tokens(seen[name])).flatten(1) for name, head in pairs]
        return torch.cat(logits, 1).float()


def mlp_head(width: int, *, hidden: Count) -> nn.Module:
    """Return two layers, a logit a token.

    Args:
        width: D.
        hidden: between the layers.
    """
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, 1),
    )


def convolutional_head(width: int, *, kernel: Count = 9, virtual_batch: Count = 8) -> nn.Module:
    """Return SANA-Sprint's head: spectral norms, a circular convolution along the tokens.

    Args:
        width: D.
        kernel: of the convolution; odd, and of at most 2 N + 1 tokens.
        virtual_batch: samples that are normalised together.

    Raises:
        UserError: for an even kernel; when it is called, for one that is longer than that.
    """
    if kernel % 2 == 0:
        raise UserError(f"{KERNEL}={kernel}: expected an odd number, such as {kernel + 1}")
    return _ConvolutionalHead(width, kernel, virtual_batch)


class _ConvolutionalHead(nn.Module):
    def __init__(self, width: int, kernel: int, virtual_batch: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.first = _block(width, 1, virtual_batch)
        self.second = _block(width, kernel, virtual_batch)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 N"]:
        tokens = x.shape[1]
        if self.kernel // 2 > tokens:
            raise UserError(
                f"{KERNEL}={self.kernel}: there are {tokens} tokens; expected at most "
                f"{2 * tokens + 1}"
            )
        x = self.first(x.mT)
        return self.last((x + self.second(x)) / math.sqrt(2))


def _block(width: int, kernel: int, virtual_batch: int) -> nn.Module:
    return nn.Sequential(
        spectral_norm(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        ),
        _VirtualBatchNorm(width, virtual_batch),
        nn.LeakyReLU(0.2),
    )


class _VirtualBatchNorm(nn.Module):
    """Normalise over some samples at a time: a sample's logits depend on few others."""

    def __init__(self, width: int, virtual_batch: int) -> None:
        super().__init__()
        self.virtual_batch = virtual_batch
        self.weight = nn.Parameter(torch.ones(width, 1))
        self.bias = nn.Parameter(torch.zeros(width, 1))

    def forward(self, x: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
        parts = []
        for part in x.split(self.virtual_batch):
            variance, mean = torch.var_mean(part, (0, 2), correction=0, keepdim=True)
            parts.append((part - mean) * torch.rsqrt(variance + 1e-5))
        return torch.cat(parts) * self.weight + self.bias


@contextmanager
def _watched(trunk: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give what modules return, by name, while the trunk is called."""
    seen: dict[str, Tensor] = {}
    # A teacher with adapters is no part of the module that adapts it.
    modules = dict(getattr(trunk, "trunk", trunk).named_modules())
    handles = [modules[name].register_forward_hook(_kept(seen, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _kept(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return hook


def _tokens(features: Tensor) -> Float[Tensor, "B N D"]:
    if features.ndim == 4:
        return features.flatten(2).mT
    return features.unsqueeze(1) if features.ndim == 2 else features


def _examples(names: Sequence[str]) -> list[str]:
    """Return names of blocks, the outermost ones that are numbered."""
    numbered = [n for n in names if n.rpartition(".")[2].isdigit()]
    least = min((n.count(".") for n in numbered), default=0)
    return [n for n in numbered if n.count(".") == least][:6] or list(names[:6])
