"""A student that is a causal language model with some of its transformer blocks left out."""

import re
from typing import Any

from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.students.causal_lm import load_causal_lm

# Those whose blocks are alike, lie in `model.layers` and are told apart by these keys only.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK = re.compile(r"(model\.layers\.)(\d+)(\..+)")


def kept_blocks(
    data: LanguageData,
    *,
    path: str,
    blocks: float | list[int],
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load a causal language model with some of its blocks, every weight as it was.

    Args:
        data: its tokenizer must be the model's own.
        path: model folder, or an id of the hub.
        blocks: which ones stay: their indices in rising order, or a fraction between 0 and 1, as
            `evenly_spaced` takes it.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: when no model lies there, it is of a type whose blocks are not known here, its
            tokenizer is another one than the data's, or it has no such blocks.
    """
    full = load_causal_lm(path, dtype=dtype, attn_implementation=attn_implementation, key="student")
    if full.config.model_type not in MODEL_TYPES:
        raise UserError(
            f"student.path={path}: a model of the type {full.config.model_type}; blocks can be "
            f"left out of those of the type {', '.join(MODEL_TYPES)}"
        )
    check_same_tokenizer(path, data.tokenizer, key="student")
    return without_other_blocks(full, chosen_blocks(blocks, full.config.num_hidden_layers)).train()


def chosen_blocks(blocks: float | list[int], number: int) -> list[int]:
    """Return the indices of the blocks to keep of `number`.

    Raises:
        UserError: for a fraction outside (0, 1), or indices that are not rising or not there.
    """
    if isinstance(blocks, int | float):
        if not 0 < blocks < 1:
            raise UserError(
                f"student.blocks={blocks}: expected a fraction between 0 and 1, both excluded, or "
                "a list of indices"
            )
        return evenly_spaced(blocks, number)
    chosen = list(blocks)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= number:
        raise UserError(
            f"student.blocks={chosen}: expected indices in rising order from 0 to {number - 1}, "
            f"for the model has {number} blocks; a fraction spaces them evenly"
        )
    return chosen


def evenly_spaced(fraction: float, number: int) -> list[int]:
    """Return evenly spaced indices below `number`, the first and the last always among them.

    There are `fraction * number` of them, rounded to the nearest and halves up, but at least two;
    the i-th of n is `i * (number - 1) / (n - 1)`, rounded alike. A quarter of 30 is 8: 0, 4, 8, 12,
    17, 21, 25, 29.
    """
    count = min(number, max(2, int(fraction * number + 0.5)))
    if count == 1:
        return [0]
    return [int(i * (number - 1) / (count - 1) + 0.5) for i in range(count)]


def without_other_blocks(full: Any, chosen: list[int]) -> PreTrainedModel:
    """Return a model of the chosen blocks, renumbered, with the weights of the full one.

    The model is made anew from its config: what a block or the body remembers of its number, for
    the cache and for windows of attention, is then right by construction.
    """
    config = full.config.__class__.from_dict(config_of_blocks(full.config.to_dict(), chosen))
    place = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, weight in full.state_dict().items():
        block = BLOCK.fullmatch(name)
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


def config_of_blocks(config: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Rewrite a config's number of blocks and what it says of each of them."""
    changed: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    if config.get("layer_types") is not None:
        changed["layer_types"] = [config["layer_types"][i] for i in chosen]
    if config.get("max_window_layers") is not None:
        # The blocks from this one on attend within a window.
        changed["max_window_layers"] = sum(i < config["max_window_layers"] for i in chosen)
    return config | changed
