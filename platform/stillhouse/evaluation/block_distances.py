"""How far the blocks of a language model turn its residual stream (Gromov et al., 2403.17887).

With h^l(s) the residual stream at the last token of sample s, as block l is given it, and h^L what
the last block hands on, before the final norm:

    d(l, n) = mean over s of arccos( cos(h^l(s), h^(l+n)(s)) ) / pi
    BI_l    = 1 - mean over s of cos(h^l(s), h^(l+1)(s))          (Men et al., 2403.03853)

The paper of Block Influence takes the mean over all tokens; here both see the same ones.

Shape legend: L blocks, S = L + 1 places in the stream, B samples, T positions, D width.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import UserError
from stillhouse.records.block_scores import BlockScores
from stillhouse.records.language import SequenceBatch
from stillhouse.students.blocks import blocks_of, check_blocks


@torch.no_grad()
def block_scores(
    model: PreTrainedModel, batches: Iterable[SequenceBatch], *, where: str
) -> BlockScores:
    """Score the blocks of a causal language model by what they do to some samples.

    Args:
        model: in eval mode; its weights may be of any float dtype.
        batches: the samples, padded on either side or not at all; one at least.
        where: the model stands in the config, key and value, for messages.

    Raises:
        UserError: for a model whose blocks are not known, and for hidden states that are not
            finite.
    """
    check_blocks(model, where=where)
    blocks = blocks_of(model)
    angles = torch.zeros(len(blocks) + 1, len(blocks) + 1, dtype=torch.float64)
    cosines = torch.zeros_like(angles)
    samples = tokens = 0
    for batch in batches:
        cos = cosines_between(last_token_states(model, batch, where=where)).cpu()
        cosines += cos.sum(0)
        angles += cos.arccos().sum(0)
        real = batch.attention_mask
        samples += len(batch.input_ids)
        tokens += batch.input_ids.numel() if real is None else int(real.sum())
    assert samples, "no samples"
    influences = 1 - cosines.diagonal(offset=1) / samples
    return BlockScores(
        # A mean of nothing but halves of a turn may be rounded past 1.
        distances=by_run((angles / (samples * math.pi)).clamp(max=1.0)),
        influences=tuple(influences.tolist()),
        magnitudes=tuple(root_mean_square(block) for block in blocks),
        samples=samples,
        tokens=tokens,
    )


def last_token_states(
    model: PreTrainedModel, batch: SequenceBatch, *, where: str
) -> Float[Tensor, "S B D"]:
    """Return the residual stream at the last real token of every sample, in float64.

    Raises:
        UserError: for what is not finite, as where float16 overflows.
    """
    batch = batch.to(model.device)
    real = batch.attention_mask
    body: Any = model.base_model
    with _watching(model, _last_tokens(batch)) as stream:
        body(
            input_ids=batch.input_ids,
            attention_mask=None if real is None else real.long(),
            # A model with learnt positions would count what is padded on the left.
            position_ids=None if real is None else (real.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    states = torch.stack(stream)
    broken = (~states.isfinite()).any(-1).any(-1).tolist()
    if any(broken):
        place = broken.index(True)
        name = f"block {place} is given" if place < len(broken) - 1 else "the last block hands on"
        raise UserError(
            f"{where}: what {name} is not finite in {str(model.dtype).removeprefix('torch.')}; "
            "take dtype=float32, or a model that is not damaged"
        )
    return states


def cosines_between(states: Float[Tensor, "S B D"]) -> Float[Tensor, "B S S"]:
    """Return the cosine of every two places in the stream; of a place and itself it is 1."""
    directions = nn.functional.normalize(states, dim=-1).transpose(0, 1)
    # Rounding may carry a cosine past 1, and the least trace below it is an angle.
    cosines = (directions @ directions.mT).clamp(-1.0, 1.0)
    cosines.diagonal(dim1=1, dim2=2).fill_(1.0)
    return cosines


def by_run(between: Float[Tensor, "S S"]) -> Float[Tensor, "L S"]:
    """Sort the distance of every two places by first block and length of the run between them."""
    blocks = len(between) - 1
    runs = torch.full((blocks, blocks + 1), math.nan, dtype=between.dtype)
    for start in range(blocks):
        runs[start, : blocks - start + 1] = between[start, start:]
    return runs


def root_mean_square(block: nn.Module) -> float:
    """Return the L2 norm of a block's weights over the root of their number."""
    weights = list(block.parameters())
    squares = sum(float(weight.double().square().sum()) for weight in weights)
    return math.sqrt(squares / sum(weight.numel() for weight in weights))


def _last_tokens(batch: SequenceBatch) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """Return row and column of the last real token of every sample."""
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    real = batch.attention_mask
    if real is None:
        return rows, torch.full_like(rows, batch.input_ids.shape[1] - 1)
    assert bool(real.any(1).all()), "a sample of padding alone"
    positions = torch.arange(real.shape[1], device=real.device)
    return rows, (positions * real).argmax(1)


@contextmanager
def _watching(
    model: PreTrainedModel, places: tuple[Int[Tensor, "B"], Int[Tensor, "B"]]
) -> Iterator[list[Tensor]]:
    """Within the block, a forward pass leaves [B, D] of every place of the stream in the list."""
    stream: list[Tensor] = []

    def keep(hidden_states: Tensor) -> None:
        stream.append(hidden_states[places].double())

    def before(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(given[0])

    def after(block: nn.Module, given: tuple[Tensor, ...], handed_on: Tensor) -> None:
        keep(handed_on)

    blocks = list(blocks_of(model))
    handles = [block.register_forward_pre_hook(before) for block in blocks]
    # The library's last hidden states are those behind the final norm.
    handles.append(blocks[-1].register_forward_hook(after))
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()
