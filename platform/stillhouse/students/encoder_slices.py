"""Students cut from an encoder: some of its blocks, and of each block some of its units.

A choice is called with (importance [n], count) and returns the indices of the units that stay,
rising: `first`, `largest`. Blocks are counted from 0.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError
from stillhouse.students.encoder_layouts import blocks_of, layout_of
from stillhouse.students.encoders import check_fits, load_encoder
from stillhouse.students.kept_blocks import chosen_blocks

Choice = Callable[[Tensor, int], Tensor]

SLICED = ("bert", "ernie", "roberta", "xlm-roberta", "camembert", "distilbert")
# The axes of a weight, by the first pattern that its name holds: D the hidden width, F that of the
# feed-forward network, Q the units of queries and keys, V those of values; "-" stays whole.
AXES = (
    (r"_embeddings\.", "-D"),
    (r"(query|key|q_lin|k_lin)\.", "QD"),
    (r"(value|v_lin)\.", "VD"),
    (r"(attention\.output\.dense|out_lin)\.", "DV"),
    (r"(intermediate\.dense|lin1)\.", "FD"),
    (r"(output\.dense|lin2)\.", "DF"),
    (r"(^classifier|out_proj)\.(weight|bias)$", "-D"),
    ("", "DD"),
)


def layer_drop(
    data: EncoderData,
    *,
    path: str,
    blocks: float | list[int],
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load an encoder with some of its blocks, every weight as it was.

    Args:
        data: its tokenizer must be the model's own; where it has a task, the student has a head.
        path: model folder, or an id of the hub.
        blocks: which ones stay, as `kept_blocks` takes them: a fraction, or indices.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: as `load_encoder` and `check_fits`, and for blocks that are not there.
    """
    full = _load(data, path, dtype, attn_implementation)
    chosen = chosen_blocks(blocks, len(blocks_of(full)))
    return _of_blocks(full, chosen).train()


def width_slice(
    data: EncoderData,
    *,
    path: str,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    choose: Choice,
    blocks: float | list[int] | None = None,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load an encoder with some of the units of its layers, the weights between them as they were.

    The hidden units are the same everywhere; heads, units of a head and of the feed-forward network
    are chosen block by block. At full width it is the model itself.

    Args:
        data: its tokenizer must be the model's own; where it has a task, the student has a head.
        path: model folder, or an id of the hub.
        hidden_size: hidden units that stay.
        intermediate_size: units of the feed-forward networks that stay.
        num_attention_heads: heads that stay, each `hidden_size / num_attention_heads` units wide.
        choose: which ones. The importance of a unit is the sum of squares of the weights that read
            it; of a unit of queries and keys, the product of the squared norms of its two rows; of
            a head, the sum over its values.
        blocks: which blocks stay, as in `layer_drop`; null keeps all.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: as `layer_drop`; for a type that cannot be sliced, and for sizes that are not
            within the model's.
    """
    full = _load(data, path, dtype, attn_implementation)
    shape = _Widths(hidden_size, intermediate_size, num_attention_heads)
    _check_widths(full, shape, path)
    if blocks is not None:
        full = _of_blocks(full, chosen_blocks(blocks, len(blocks_of(full))))
    return _of_units(full, shape, choose).train()


def first(importance: Float[Tensor, "n"], count: int) -> Int[Tensor, "count"]:
    """Return the first units, whatever they are worth."""
    return torch.arange(count, device=importance.device)


def largest(importance: Float[Tensor, "n"], count: int) -> Int[Tensor, "count"]:
    """Return the units of the greatest importance, in their order; of equals the earlier one."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


@dataclass(frozen=True)
class _Widths:
    """What `width_slice` makes of a model."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _load(data: EncoderData, path: str, dtype: str, attn_implementation: str) -> PreTrainedModel:
    full = load_encoder(
        path, task=data.task, dtype=dtype, attn_implementation=attn_implementation, key="student"
    )
    check_fits(full, data, path=path, key="student")
    return full


def _check_widths(full: PreTrainedModel, wanted: _Widths, path: str) -> None:
    """Refuse what is not a part of the model.

    Raises:
        UserError: naming the key and the model's size.
    """
    config: Any = full.config
    if config.model_type not in SLICED:
        raise UserError(
            f"student.path={path}: a model of the type {config.model_type}; the width can be "
            f"sliced of those of the type {', '.join(SLICED)}"
        )
    ours = {name: getattr(wanted, name) for name in wanted.__annotations__}
    theirs = _widths_of(full)
    for name, size in ours.items():
        most = getattr(theirs, name)
        if not 1 <= size <= most:
            raise UserError(f"student.{name}={size}: expected 1 to {most}, as the model has")
    heads, width = wanted.num_attention_heads, wanted.hidden_size
    if width % heads or wanted.head_size > theirs.head_size:
        raise UserError(
            f"student.num_attention_heads={heads}: expected a divisor of student.hidden_size="
            f"{width} that leaves heads of at most {theirs.head_size} units, as the model has"
        )


def _widths_of(full: PreTrainedModel) -> _Widths:
    config: Any = full.config
    # DistilBERT's config has another name for it.
    inner = getattr(config, "hidden_dim", None) or config.intermediate_size
    return _Widths(config.hidden_size, inner, config.num_attention_heads)


def _of_blocks(full: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """Return a model of the chosen blocks, renumbered."""
    name_of = re.compile(rf"((?:.+\.)?{re.escape(layout_of(full).blocks)}\.)(\d+)(\..+)")
    place = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, weight in full.state_dict().items():
        block = name_of.fullmatch(name)
        if block is None:
            weights[name] = weight
        elif block[2] in place:
            weights[f"{block[1]}{place[block[2]]}{block[3]}"] = weight
    return _made_anew(full, {"num_hidden_layers": len(chosen)}, weights)


def _of_units(full: PreTrainedModel, wanted: _Widths, choose: Choice) -> PreTrainedModel:
    """Return a model of the chosen units."""
    blocks = [_weights_by_axes(block.state_dict()) for block in blocks_of(full)]
    read = torch.stack([_read(weights, "D") for weights in blocks]).sum(0)
    hidden = choose(read, wanted.hidden_size)
    inside = [_units_of_block(w, wanted, _widths_of(full), choose) for w in blocks]
    number_of = re.compile(rf"{re.escape(layout_of(full).blocks)}\.(\d+)\.")
    weights = {}
    for name, weight in full.state_dict().items():
        found = number_of.search(name)
        units = {"D": hidden, **({} if found is None else inside[int(found[1])])}
        # A bias has the first axis of its weight alone.
        for dim, axis in enumerate(_axes(name)[: weight.ndim]):
            weight = weight if axis == "-" else weight.index_select(dim, units[axis])
        weights[name] = weight.contiguous()
    inner = "hidden_dim" if full.config.model_type == "distilbert" else "intermediate_size"
    sizes = {
        "hidden_size": wanted.hidden_size,
        inner: wanted.intermediate_size,
        "num_attention_heads": wanted.num_attention_heads,
    }
    return _made_anew(full, sizes, weights)


def _units_of_block(
    weights: Mapping[str, list[Tensor]], wanted: _Widths, full: _Widths, choose: Choice
) -> dict[str, Tensor]:
    """Return the units of one block that stay, by axis."""
    by_head = (full.num_attention_heads, full.head_size)
    queries, keys = (w.double().square().sum(1).view(by_head) for w in weights["QD"])
    values = _read(weights, "V").view(by_head)
    heads = choose(values.sum(1), wanted.num_attention_heads).tolist()

    def within(importance: Tensor) -> Tensor:
        kept = [choose(importance[h], wanted.head_size) + h * full.head_size for h in heads]
        return torch.cat(kept)

    return {
        "Q": within(queries * keys),
        "V": within(values),
        "F": choose(_read(weights, "F"), wanted.intermediate_size),
    }


def _weights_by_axes(state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the matrices of a block by the axes that they have."""
    found: dict[str, list[Tensor]] = {}
    for name, weight in state.items():
        if weight.ndim == 2:
            found.setdefault(_axes(name), []).append(weight)
    return found


def _read(weights: Mapping[str, list[Tensor]], axis: str) -> Float[Tensor, "n"]:
    """Return the sum of squares of the weights that read each unit of an axis, in float64."""
    readers = [m for axes, matrices in weights.items() if axes[1] == axis for m in matrices]
    return torch.stack([m.double().square().sum(0) for m in readers]).sum(0)


def _axes(name: str) -> str:
    return next(axes for pattern, axes in AXES if re.search(pattern, name))


def _made_anew(
    full: PreTrainedModel, sizes: Mapping[str, int], weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return a model of other sizes: what a layer remembers of its number is right again."""
    config: Any = copy.deepcopy(full.config)
    for name, size in sizes.items():
        setattr(config, name, size)
    loader: Any = type(full)
    student, report = loader.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=full.dtype,
        attn_implementation=full.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return student
