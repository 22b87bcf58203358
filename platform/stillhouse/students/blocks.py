"""Which transformer blocks a causal language model has, and the model that is left of some of them.

Blocks are counted from 0.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Where a family of models keeps its blocks, and what its config says of them.

    Attributes:
        place: of their list in the model, dotted.
        count: key of their number.
        kinds: key of a list that names the kind of each, if there is one.
        windows_from: key of the first block that attends within a window, if there is one.
    """

    place: str = "model.layers"
    count: str = "num_hidden_layers"
    kinds: str | None = None
    windows_from: str | None = None


# Those whose blocks are told apart by these keys only, by the `model_type` of their config.
SHAPES = {
    "llama": Shape(),
    "mistral": Shape(),
    "qwen2": Shape(kinds="layer_types", windows_from="max_window_layers"),
    "qwen3": Shape(kinds="layer_types", windows_from="max_window_layers"),
    "gemma": Shape(),
    "gemma2": Shape(kinds="layer_types"),
    "gemma3_text": Shape(kinds="layer_types"),
    "gpt2": Shape(place="transformer.h", count="n_layer"),
    "gpt_neox": Shape(place="gpt_neox.layers"),
}


def check_blocks(model: PreTrainedModel, *, where: str) -> None:
    """Refuse a model whose blocks cannot be told, or cannot do without their numbers.

    Args:
        model: the model.
        where: it stands in the config, key and value, for messages.

    Raises:
        UserError: naming the types that are known.
    """
    config: Any = model.config
    if config.model_type not in SHAPES:
        raise UserError(
            f"{where}: a model of the type {config.model_type}; blocks can be left out of those of "
            f"the type {', '.join(SHAPES)}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"{where}: the model has scale_attn_by_inverse_layer_idx=true, by which a block "
            "attends otherwise when its number changes; take a model without it"
        )


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a model that `check_blocks` lets pass."""
    blocks = model.get_submodule(SHAPES[model.config.model_type].place)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def without_other_blocks(full: Any, chosen: list[int]) -> PreTrainedModel:
    """Return a model of the chosen blocks, renumbered, with the weights of the full one.

    The model is made anew from its config: what a block or the body remembers of its number, for
    the cache and for windows of attention, is then right by construction.

    Args:
        full: a model that `check_blocks` lets pass.
        chosen: blocks to keep, rising.
    """
    shape = SHAPES[full.config.model_type]
    block_name = re.compile(rf"({re.escape(shape.place)}\.)(\d+)(\..+)")
    config = full.config.__class__.from_dict(config_of_blocks(full.config.to_dict(), shape, chosen))
    place = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, weight in full.state_dict().items():
        block = block_name.fullmatch(name)
        if block is None:
            weights[name] = weight
        elif block[2] in place:
            weights[f"{block[1]}{place[block[2]]}{block[3]}"] = weight
    student, report = type(full).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=full.dtype,
        attn_implementation=full.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    student.generation_config = full.generation_config
    return student


def config_of_blocks(config: dict[str, Any], shape: Shape, chosen: list[int]) -> dict[str, Any]:
    """Rewrite a config's number of blocks and what it says of each of them."""
    changed: dict[str, Any] = {shape.count: len(chosen)}
    if shape.kinds is not None:
        changed[shape.kinds] = [config[shape.kinds][i] for i in chosen]
    if shape.windows_from is not None and config[shape.windows_from] is not None:
        changed[shape.windows_from] = sum(i < config[shape.windows_from] for i in chosen)
    return config | changed
