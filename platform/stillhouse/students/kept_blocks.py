"""A student that is a causal language model with some of its transformer blocks left out."""

from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.students.blocks import blocks_of, check_blocks, without_other_blocks
from stillhouse.students.causal_lm import load_causal_lm


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
    check_blocks(full, where=f"student.path={path}")
    check_same_tokenizer(path, data.tokenizer, key="student")
    return without_other_blocks(full, chosen_blocks(blocks, len(blocks_of(full)))).train()


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
