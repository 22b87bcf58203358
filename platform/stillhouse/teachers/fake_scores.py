"""Fake scores: networks that follow what a student generates, made of its teacher.

A builder is called with (teacher) and returns a network of the same signature that learns. What is
distilled from the two of them is their difference (`families.timestep.matching`).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count, Positive
from stillhouse.records.diffusion import Condition
from stillhouse.students.denoiser_folders import load_denoiser
from stillhouse.students.denoisers import Denoiser


def full_copy(teacher: nn.Module) -> nn.Module:
    """Return a copy of the teacher, all of whose weights learn (DMD2, rCM).

    Args:
        teacher: a network with weights.

    Raises:
        UserError: for a teacher that is known and has none.
    """
    if not any(True for _ in teacher.parameters()):
        raise UserError(
            f"stages.<stage>.family.fake_score: the teacher, a {type(teacher).__name__}, has no "
            "weights to begin from; expected fake_score=pretrained, with the path of a network of "
            "the same data"
        )
    return copy.deepcopy(teacher).requires_grad_(True)


def pretrained(teacher: nn.Module, *, path: str) -> Denoiser:
    """Return a network of an earlier stage, for a teacher that is known exactly.

    Its architecture may be another one than the teacher's.

    Args:
        teacher: whose samples and conditions it is asked about too.
        path: a pipeline's folder.

    Raises:
        UserError: for a folder without such a pipeline, and one of other samples or conditions.
    """
    key = "stages.<stage>.family.fake_score.path"
    found = load_denoiser(path, key=key)
    for name, read in (
        ("samples have the shape", _sample_shape),
        ("number of classes is", _num_classes),
        ("captions have the width", _caption_width),
    ):
        ours, theirs = read(found), read(teacher)
        if theirs is not None and ours != theirs:
            raise UserError(
                f"{key}={path}: its {name} {ours}, the teacher's {theirs}; expected a network that "
                "was trained on the teacher's data"
            )
    return found


def _sample_shape(network: Any) -> str | None:
    shape = getattr(network, "sample_shape", None)
    return None if shape is None else " x ".join(map(str, shape))


def _num_classes(network: Any) -> int | None:
    if not isinstance(network, Denoiser):
        return getattr(network, "num_classes", None)
    config = network.model.config
    # A UNet2DModel counts the class of none as well.
    embedded = config.get("num_class_embeds") or 0
    return config.get("num_classes", embedded - (embedded > 0 and network.unconditional))


def _caption_width(network: Any) -> int | None:
    return network.caption_width if isinstance(network, Denoiser) else None


def lora(
    teacher: nn.Module, *, rank: Count, alpha: Positive, target_modules: Sequence[str]
) -> "AdaptedTeacher":
    """Return the teacher with low-rank adapters, which alone learn (SwiftBrush).

    Args:
        teacher: whose weights are shared, and stay.
        rank: r.
        alpha: α of W + (α/r) B A.
        target_modules: last names of the linear layers that get an adapter.

    Raises:
        UserError: for a name that no linear layer has.
    """
    layers = {name: m for name, m in teacher.named_modules() if isinstance(m, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in layers})
    for wanted in target_modules:
        if wanted not in known:
            raise UserError(
                f"stages.<stage>.family.fake_score.target_modules={list(target_modules)}: the "
                f"teacher has no linear layer {wanted}; it has {', '.join(known) or 'none'}"
                f"{did_you_mean(wanted, known)}"
            )
    chosen = {n: m for n, m in layers.items() if n.rpartition(".")[2] in target_modules}
    return AdaptedTeacher(teacher, chosen, rank, alpha)


class Adapter(nn.Module):
    """(α/r) B A, without an effect at first."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        # Behind a frozen layer, float32 whatever that is.
        self.A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """Return what is added to the layer's output."""
        return (self.scale * linear(linear(x.to(self.A.dtype), self.A), self.B)).to(x.dtype)


class AdaptedTeacher(nn.Module):
    """A teacher whose layers are adapted while this is called, and at no other time.

    The weights exist once. Hooks stand for the length of a call, so the teacher itself is what it
    was whatever happens here.

    Args:
        teacher: the network; it is held, and no part of this module.
        layers: of the teacher, by name.
        rank, alpha: of the adapters.
    """

    def __init__(
        self, teacher: nn.Module, layers: dict[str, nn.Linear], rank: int, alpha: float
    ) -> None:
        super().__init__()
        self._teacher: tuple[Any] = (teacher,)
        self._layers = tuple(layers.values())
        self.adapters = nn.ModuleList(Adapter(layer, rank, alpha) for layer in self._layers)

    @property
    def trunk(self) -> nn.Module:
        """The teacher, whose modules are the ones that are called."""
        return self._teacher[0]

    @property
    def unconditional(self) -> bool:
        """Whether the teacher knows samples of which nothing is said."""
        return getattr(self._teacher[0], "unconditional", True)

    def forward(
        self,
        x_t: Float[Tensor, "B ..."],
        t: Float[Tensor, "B"],
        condition: Condition,
        guidance_scale: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Return F; arguments as in `records.diffusion.TrigFlowNetwork`."""
        with self._adapted():
            return self._teacher[0](x_t, t, condition, guidance_scale)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        handles = [
            # First of all, so that whoever watches a layer sees it adapted.
            layer.register_forward_hook(_added(adapter), prepend=True)
            for layer, adapter in zip(self._layers, self.adapters, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _added(adapter: nn.Module) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    return hook
