"""How alike the attention matrices of a model's layers are (EchoAtt, 2409.14595).

With A_l [h, N, N] the attention probabilities of layer l, flattened over heads and positions:

    sim(i, j) = mean over the samples of cos(vec A_i, vec A_j)        s_i = mean over j != i of it

The matrices of all layers are never held at once. A forward pass keeps each layer's queries and
keys, which are small; the probabilities of all layers are then made for a few rows at a time, and
only their inner products are added up.

Shape legend: L layers, h heads, g key heads, N positions, R of them in a chunk, d head width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stillhouse.errors import UserError
from stillhouse.records.similarity import Similarity

IMPLEMENTATION = "stillhouse_recorded"

# Probabilities, of all layers together, that are held at a time.
CHUNK = 2**20

# What else may enter a layer's probabilities, by its name in transformers' attention interface.
UNKNOWN = ("softcap", "s_aux", "position_bias")


class _Layer(NamedTuple):
    """What decides one layer's probabilities: q [h, N, d], k [g, N, d], both rotated."""

    q: Tensor
    k: Tensor
    scale: float
    mask: Tensor | None


class _Recorder:
    """Keeps what the layers of one forward pass attend with."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.layers: list[_Layer] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as `sdpa` does, and keep queries and keys in float32 or better."""
        unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
        if unknown:
            raise UserError(
                f"{self.where}: {type(module).__name__} attends with {unknown[0]}; the analysis "
                "knows softmax(scale Q K^T + mask) only; take another model"
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[0]
        self.layers.append(_Layer(query[0].to(wide), key[0].to(wide), scale, mask))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )


_recorder: ContextVar[_Recorder] = ContextVar("recorder of attention")


def _recorded_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _recorder.get().attend(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _recorded_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@torch.no_grad()
def attention_similarity(
    model: PreTrainedModel, windows: Iterable[Int[Tensor, "N"]], *, where: str
) -> Similarity:
    """Compare the attention matrices of all pairs of a causal language model's layers.

    Args:
        model: in eval mode; its weights may be of any float dtype.
        windows: the samples, token ids without padding; one at least.
        where: the model stands in the config, key and value, for messages.

    Raises:
        UserError: for a model of one layer, one whose layers do not all attend by transformers'
            attention interface, have different numbers of heads, or attend with more than scaled
            products and a mask.
    """
    depth = int(model.config.num_hidden_layers)
    if depth < 2:
        raise UserError(f"{where}: the model has one layer; expected two or more, to compare them")
    total = torch.zeros(depth, depth, dtype=torch.float64)
    count = tokens = 0
    for ids in windows:
        products = _inner_products(_record(model, ids, where)).cpu()
        norms = products.diagonal().sqrt()
        # Rounding may carry a cosine past 1.
        total += (products / norms / norms.unsqueeze(-1)).clamp(max=1.0)
        count, tokens = count + 1, tokens + len(ids)
    assert count, "no samples"
    matrix = (total + total.mT) / (2 * count)
    kinds = getattr(model.config, "layer_types", None)
    kinds = tuple(kinds) if kinds and len(set(kinds)) > 1 else None
    return Similarity(matrix.fill_diagonal_(1.0), count, tokens, kinds)


def _record(model: PreTrainedModel, ids: Tensor, where: str) -> list[_Layer]:
    """Return what every layer attends with on one sample."""
    body: Any = model.base_model
    with _recording(model, where) as recorder:
        body(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False)
    layers, depth = recorder.layers, int(model.config.num_hidden_layers)
    if len(layers) != depth:
        raise UserError(
            f"{where}: {len(layers)} of the {depth} layers of {type(model).__name__} attend by "
            "transformers' attention interface, expected all; take a model such as Llama, Mistral, "
            "Qwen2 or Qwen3"
        )
    heads = [len(layer.q) for layer in layers]
    if len(set(heads)) > 1:
        raise UserError(
            f"{where}: the layers have {', '.join(map(str, heads))} heads; expected as many in "
            "each, since matrices are compared head by head; take another model"
        )
    return layers


@contextmanager
def _recording(model: PreTrainedModel, where: str) -> Iterator[_Recorder]:
    """Within the block, the model's layers leave what they attend with in the recorder."""
    before: Any = model.config._attn_implementation
    recorder = _Recorder(where)
    token = _recorder.set(recorder)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(before)
        _recorder.reset(token)


def _inner_products(layers: list[_Layer]) -> Float[Tensor, "L L"]:
    """Return <vec A_i, vec A_j> of all pairs in float64, a few rows of the matrices at a time."""
    heads, positions = layers[0].q.shape[:2]
    rows = max(1, CHUNK // (len(layers) * heads * positions))
    products = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=layers[0].q.device)
    for start in range(0, positions, rows):
        chunk = slice(start, min(start + rows, positions))
        A = torch.stack([_probabilities(layer, chunk).flatten().double() for layer in layers])
        products += A @ A.mT
    return products


def _probabilities(layer: _Layer, rows: slice) -> Float[Tensor, "g h/g R N"]:
    """Return the attention probabilities of some rows."""
    q = layer.q[:, rows].unflatten(0, (len(layer.k), -1))
    scores = layer.scale * q @ layer.k.unsqueeze(1).mT
    keys = torch.arange(scores.shape[-1], device=scores.device)
    if layer.mask is None:
        # The library's sign for plain causal attention.
        scores.masked_fill_(keys[rows].unsqueeze(-1) < keys, -torch.inf)
    else:
        # [1 or h, N, N]; one of numbers is added.
        mask = layer.mask[:, rows].expand(layer.q.shape[0], -1, -1).unflatten(0, (len(layer.k), -1))
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask
    return scores.softmax(-1)
