"""The stage `prune`: cut blocks out of a model, and hand on what is left as a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.records.block_scores import read_block_scores
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.blocks import blocks_of, check_blocks, without_other_blocks
from stillhouse.students.causal_lm import load_causal_lm

PRUNED = "pruned.json"


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Write a model without some of its blocks, every weight of the others as it was.

    Attributes:
        path: the model, a folder or an id of the hub, with its tokenizer.
        scores_path: what the stage `score_blocks` wrote of it.
        choose: of `students.block_choices`, partial, called with the scores of the blocks.
    """

    path: str
    scores_path: str
    choose: dict[str, Any]

    def __call__(self, context: StageContext) -> StageResult:
        """Choose; write the model, its tokenizer and `pruned.json`."""
        key = f"stages.{context.name}"
        scores = read_block_scores(self.scores_path, key=f"{key}.scores_path")
        dropped = instantiate(self.choose)(scores)
        # The one attention that every family has; only the head's check attends.
        full = load_causal_lm(self.path, dtype="auto", attn_implementation="eager", key=key)
        check_blocks(full, where=f"{key}.path={self.path}")
        number = len(blocks_of(full))
        if number != scores.blocks:
            raise UserError(
                f"{key}.scores_path={self.scores_path}: scores of {scores.blocks} blocks, the "
                f"model has {number}; expected those of the same model: score it anew"
            )
        tokenizer = load_tokenizer(self.path, key=f"{key}.path")
        kept = [block for block in range(number) if block not in dropped]
        pruned = without_other_blocks(full, kept)
        pruned.save_pretrained(context.output)
        tokenizer.save_pretrained(context.output)
        distance = scores.of_run(dropped)
        known = {} if distance is None else {"distance": distance}
        content = {"dropped": list(dropped), "kept": kept, "blocks": number, **known}
        write_json(context.output / PRUNED, content)
        context.console.print(f"{context.name}: {_in_words(dropped, number)}")
        removed = full.num_parameters() - pruned.num_parameters()
        return StageResult(
            metrics={
                "blocks": len(kept),
                "blocks_dropped": len(dropped),
                "parameters": pruned.num_parameters(),
                "parameters_removed": removed,
                **known,
            }
        )


def _in_words(dropped: Sequence[int], number: int) -> str:
    """Say in one line which blocks go."""
    return f"{len(dropped)} of {number} blocks dropped: {', '.join(map(str, dropped))}"
