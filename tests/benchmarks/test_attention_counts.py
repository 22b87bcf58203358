"""The counts behind the bound of `attention_sharing.py`, against closed forms and torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_sharers import FOLLOWERS, LEADERS, full_model
from scripts import imported
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of

FILE = Path(__file__).parents[2] / "benchmarks" / "attention_counts.py"
ALONE = tuple(range(6))
GROUP = (0, 1, 1, 1, 4, 5)


@pytest.fixture(scope="module")
def counts() -> Iterator[Any]:
    with imported(FILE) as module:
        yield module


def test_parameters_of_tinyllama(counts: Any) -> None:
    """Of 1,100,048,384 the paper's 5, 9 and 17 followers of 22 remove 23.6, 42.5 and 80.2 M."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        full = LlamaForCausalLM(config)
    whole = counts.Shape(tuple(range(22))).parameters
    assert full.num_parameters() == whole + 2 * 32000 * 2048 == 1_100_048_384
    for followers in (5, 9, 17):
        sharing = sharing_of(range(2, 2 + followers), 22, key="f")
        removed = whole - counts.Shape(sharing.leaders).parameters
        assert removed == followers * (2048 * 2048 + 2048 * 256) == followers * 4_718_592


def test_cache_shrinks_by_half_a_layer_a_follower(counts: Any) -> None:
    whole, shared = (counts.Shape(leaders).cache_bytes_a_token for leaders in (ALONE, GROUP))
    assert whole == 6 * 2 * 256 * 4
    assert shared == whole * (1 - 2 / 12)


@pytest.mark.parametrize("followers", [[], FOLLOWERS])
def test_flops_of_a_decoding_step_are_those_that_torch_counts(
    counts: Any, followers: list[int]
) -> None:
    """One query sees every key, so no implementation computes what the mask hides."""
    full = full_model("llama")
    full.set_attn_implementation("eager")
    body: Any = full.model
    if followers:
        body = share_attention(full, sharing_of(followers, 6, key="f"), where="").model
    cache, x = DynamicCache(config=body.config), torch.randn(3, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        body(inputs_embeds=x[:, :7], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            body(inputs_embeds=x[:, 7:], past_key_values=cache)
    leaders = tuple(LEADERS) if followers else ALONE
    shape = counts.Shape(leaders, 16, 24, 4, 2, 4, bytes_a_number=8)
    ours = sum(work.flops for work in counts.Call(shape, 3, 1, 8).forward())
    # Rotary angles are a product too, which the counts leave out: 2 positions of each frequency.
    assert 0 <= counter.get_total_flops() - ours <= 2 * 3 * 2


def products(counts: Any, leaders: tuple[int, ...], works: str, N: int = 64) -> float:
    """FLOPs of attention alone, in products of N x N x d a head that a causal mask halves."""
    shape = counts.Shape(leaders)
    call = counts.Call(shape, 1, N, N)
    maps = sum(i * o for layer in range(6) for i, o in shape.projections(layer))
    linear = 2.0 * N * maps * (1 if works == "forward" else 2)
    total = sum(work.flops for work in getattr(call, works)())
    return (total - linear) / (2 * 32 * 64 * N * (N + 1) / 2)


def test_products_of_a_group(counts: Any) -> None:
    """m layers alone: 2 m and 5 m; a group of m: m + 1 and 2 m + 2."""
    assert products(counts, ALONE, "forward") == 2 * 6
    assert products(counts, ALONE, "backward") == 5 * 6
    assert products(counts, GROUP, "forward") == (3 + 1) + 2 * 3
    assert products(counts, GROUP, "backward") == (2 * 3 + 2) + 5 * 3


def test_exponentials_are_one_an_entry(counts: Any) -> None:
    """A decoding step's; a group takes its exponentials once, also in training."""
    entries = 32 * 2 * 10
    for leaders, computed in ((ALONE, 6), (GROUP, 4)):
        call = counts.Call(counts.Shape(leaders), 2, 1, 10)
        assert sum(work.exps for work in call.forward()) == computed * entries
    backward = counts.Call(counts.Shape(GROUP), 2, 1, 10).backward()
    assert sum(work.exps for work in backward) == 3 * entries


def test_bytes_of_a_decoding_step(counts: Any) -> None:
    """Weights and cache are read once; the rest is activations of one token and rows of A."""
    keys, d, inner, kv = 1 << 20, 2048, 5632, 256
    maps_of = {"q": d + d, "k": d + kv, "v": d + kv, "o": d + d, "mlp": 3 * (d + inner)}
    rotary, rows = 2 * (d + kv), 2 * d
    beside = 4 * d + 6 * d + 3 * inner  # norms, residuals, gate
    alone = 6 * (sum(maps_of.values()) + beside + rotary + rows)
    less = maps_of["q"] + maps_of["k"] + rotary + d
    # A row of A goes out of the leader and into two followers.
    group = alone - 2 * less + 3 * 32 * keys
    for leaders, rest in ((ALONE, alone), (GROUP, group)):
        shape = counts.Shape(leaders)
        call = counts.Call(shape, 1, 1, keys)
        moved = sum(work.moved for work in call.forward())
        maps = 4 * (shape.parameters - 13 * 2048)
        assert moved == maps + keys * shape.cache_bytes_a_token + 4 * rest
    update = sum(work.moved for work in call.update())
    assert update == 7 * 4 * shape.parameters


def test_an_operator_takes_the_longest_of_its_three_times(counts: Any) -> None:
    rates = counts.Rates(flops=10.0, moved=5.0, exps=2.0)
    works = [counts.Work(30.0, 5.0, 2.0), counts.Work(10.0, 20.0, 2.0), counts.Work(0.0, 0.0, 10.0)]
    assert counts.least_seconds(works, rates) == 3.0 + 4.0 + 5.0
