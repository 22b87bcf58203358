"""What a model's cache holds, by its shape."""

import pytest
from attention_sharers import FOLLOWERS, full_model

from stillhouse.evaluation.speed import size_and_speed
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of

LAYERS = 6
CONTEXT, NEW = 9, 3


def measured(model) -> dict[str, float | int]:
    return dict(size_and_speed(model, context=CONTEXT, new_tokens=NEW, repeats=1))


@pytest.mark.parametrize("followers", [[], [1], FOLLOWERS, [1, 2, 3, 4, 5]])
def test_every_follower_saves_half_a_layer_of_cache(followers: list[int]) -> None:
    full = full_model("llama")
    student = share_attention(full, sharing_of(followers, LAYERS, key="f"), where="")
    whole = LAYERS * 2 * 2 * 4 * 8  # keys and values, 2 heads of width 4, 8 bytes a number
    assert measured(full)["kv_cache_bytes_per_token"] == whole
    saved = len(followers) / (2 * LAYERS)
    assert measured(student)["kv_cache_bytes_per_token"] == pytest.approx(whole * (1 - saved))


def test_a_window_keeps_one_token_less_than_it_sees() -> None:
    """Blocks 3 to 5 have a window of 4: of 9 tokens they keep 3."""
    held = 3 * CONTEXT + 3 * (4 - 1)
    bytes_a_layer_and_token = 2 * 2 * 8 * 8
    ours = measured(full_model("qwen3"))["kv_cache_bytes_per_token"]
    assert ours == pytest.approx(held * bytes_a_layer_and_token / CONTEXT)


def test_shared_parameters_count_once(tiny_llama) -> None:
    tied, apart = (tiny_llama(tie_word_embeddings=tie) for tie in (True, False))
    numbers = [measured(model)["parameters"] for model in (tied, apart)]
    assert numbers[1] - numbers[0] == 23 * 16
