"""YAML values against the annotations of what they are given to."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from stillhouse.config.signatures import check_node, fits, keywords_of
from stillhouse.errors import UserError
from stillhouse.ranges import Count, CountFrom0, Finite, Positive, Share, Weight


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        ("1", int, False),
        (1, float, True),
        (1.5, int, False),
        ("x", str, True),
        (None, int | None, True),
        (None, int, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1], Sequence[float], True),
        (1, list[int], False),
        ("x", dict[str, int], False),
        ({"_target_": "x"}, int, True),
        (object(), Any, True),
        (1, Count, True),
        (0, Count, False),
        (1.0, Count, False),
        (None, Count | None, True),
        (0, Count | None, False),
        (0, CountFrom0, True),
        (-1, CountFrom0, False),
        (0, Weight, True),
        (math.inf, Weight, False),
        (math.nan, Weight, False),
        (0.0, Positive, False),
        (1e-9, Positive, True),
        (1, Share, True),
        (1.001, Share, False),
        (-2.5, Finite, True),
        (-math.inf, Finite, False),
    ],
)
def test_plain_types_are_judged(value, hint, expected: bool) -> None:
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("target", "key", "value", "expected"),
    [
        ("stages.rewrite.Rewrite", "batch_size", 0, "1 or more"),
        ("stages.rewrite.Rewrite", "max_exercises", 0, "1 or more, or null"),
        ("stages.rewrite.Rewrite", "max_exercises", "all", "int, or null"),
        ("stages.score_blocks.ScoreBlocks", "max_samples", 0, "1 or more"),
        ("students.block_choices.least_distant", "n", 0, "1 or more"),
        ("students.block_choices.least_distant", "n", 1.5, "int"),
        ("students.block_choices.least_distant", "n", "${oc.select:pruning.n,0}", "1 or more"),
        ("students.lora.lora", "rank", 0, "1 or more"),
        ("students.weight_merging.slerp", "weight", 2, "a number from 0 to 1"),
        ("students.weight_merging.weighted_sum", "first_weight", math.inf, "a finite number"),
        ("teachers.decoding.greedy", "max_new_tokens", 0, "1 or more"),
        ("teachers.decoding.sampled", "temperature", 0, "a number above 0"),
        ("evaluation.recovery.recovery", "speed_repeats", 0, "1 or more"),
        ("evaluation.speculative_models.speculative_decoding", "temperature", -1, "0 or more"),
        ("evaluation.speculative_models.speculative_decoding", "max_new_tokens", 1, "2 or more"),
        ("evaluation.encoders.encoder_models", "speed_tokens", 0, "1 or more"),
        ("evaluation.sharing_costs.sharing_costs", "repeats", 0, "1 or more"),
        ("families.sequence.word_kd.word_kd", "temperature", 0, "a number above 0"),
        ("families.optimizers.adamw", "learning_rate", 0, "a number above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_where_it_is_bound(target, key, value, expected):
    config = OmegaConf.create({"here": {"_target_": f"stillhouse.{target}", key: value}})
    for name, parameter in keywords_of(get_object(config.here._target_)).items():
        if name != key and parameter.default is parameter.empty:
            config.here[name] = "${later}"
    with pytest.raises(UserError) as refused:
        check_node("here", config.here)
    said = 0 if str(value).startswith("$") else value
    assert str(refused.value) == f"here.{key}={said}: expected {expected}"


def test_a_value_that_is_looked_up_where_there_is_none_is_asked_for() -> None:
    node = {
        "_target_": "stillhouse.students.block_choices.least_distant",
        "n": "${oc.select:pruning.n,null}",
    }
    with pytest.raises(UserError) as refused:
        check_node("here", OmegaConf.create({"here": node}).here)
    assert str(refused.value) == (
        "here.n=null: expected int; it is ${oc.select:pruning.n,null}, which has no value here: "
        "set here.n=<value>"
    )
