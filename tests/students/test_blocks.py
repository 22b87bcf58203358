"""Models of some blocks, of every family: the right weights, numbers, kinds, cache and sizes."""

from typing import Any

import pytest
import torch
from decoders import CONFIGS, V, logits_passing_over, make
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from stillhouse.errors import UserError
from stillhouse.students.blocks import (
    SHAPES,
    blocks_of,
    check_blocks,
    config_of_blocks,
    without_other_blocks,
)

KEPT = [[0, 2, 5], [1, 4], [3], [0, 1, 2], [0, 3], list(range(6))]


@pytest.fixture(params=CONFIGS)
def full(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def some_ids() -> torch.Tensor:
    return torch.randint(2, V, (3, 11), generator=torch.Generator().manual_seed(0))


def test_every_family_of_the_table_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(SHAPES)


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT)
def test_logits_are_those_of_the_full_model_with_the_others_passed_over(full, kept):
    cut = without_other_blocks(full, kept).eval()
    expected = logits_passing_over(full, set(range(6)) - set(kept), some_ids())
    if len(kept) < 6:
        whole = full(some_ids(), use_cache=False).logits
        assert (whole - expected).abs().max() > 0.1, "passing blocks over changes nothing here"
    torch.testing.assert_close(cut(some_ids(), use_cache=False).logits, expected)


def test_weights_are_copies_tied_ones_stay_tied_and_the_config_tells_of_the_kept(full):
    full.generation_config.max_new_tokens = 13
    cut: Any = without_other_blocks(full, [0, 2, 5])
    assert type(cut) is type(full)
    assert cut.dtype == torch.float64
    assert cut.config.num_hidden_layers == len(blocks_of(cut)) == 3
    for new, old in zip(blocks_of(cut), (blocks_of(full)[i] for i in (0, 2, 5)), strict=True):
        torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    inside = sum(p.numel() for i in (1, 3, 4) for p in blocks_of(full)[i].parameters())
    assert cut.num_parameters() == full.num_parameters() - inside
    numbers = [m.layer_idx for b in blocks_of(cut) for m in b.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(numbers)) == [0, 1, 2]
    tied = full.get_output_embeddings().weight is full.get_input_embeddings().weight
    assert tied == full.config.tie_word_embeddings
    assert (cut.get_output_embeddings().weight is cut.get_input_embeddings().weight) == tied
    kinds = getattr(full.config, "layer_types", None)
    if kinds is not None:
        assert len(set(kinds)) == 2
        assert cut.config.layer_types == [kinds[0], kinds[2], kinds[5]]
    if full.config.model_type.startswith("qwen"):
        assert cut.config.max_window_layers == 2
    assert cut.generation_config.max_new_tokens == 13


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2, 5], [0], [1, 4]])
def test_one_saved_and_read_gives_equal_logits(full, kept, tmp_path):
    """Also where blocks of one kind alone are left, of which config and rotations then tell."""
    cut: Any = without_other_blocks(full, kept).eval()
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(full)
    assert len(blocks_of(again)) == len(kept)
    torch.testing.assert_close(again.state_dict(), cut.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(some_ids()).logits, cut(some_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2, 5], [0], [1, 4], [4, 5]])
def test_greedy_generation_with_and_without_a_cache_agrees(full, kept):
    """Past the windows; also where only blocks with, or only ones without a window are left."""
    cut: Any = without_other_blocks(full, kept).eval()
    options = {"do_sample": False, "max_new_tokens": 9, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cached, plain = (
        cut.generate(some_ids(), **options, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    assert len(cached.past_key_values.layers) == len(kept)


@pytest.mark.parametrize(
    ("n", "left"),
    [
        (0, 8_030_261_248),
        (2, 7_594_037_248),
        (4, 7_157_813_248),
        (6, 6_721_589_248),
        (8, 6_285_365_248),
        (10, 5_849_141_248),
    ],
)
def test_parameters_left_of_llama_3_1_8b(n, left):
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    kept = [block for block in range(32) if not 20 <= block < 20 + n]
    changed = config_of_blocks(config.to_dict(), SHAPES["llama"], kept)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(changed))
    assert {sum(p.numel() for p in b.parameters()) for b in blocks_of(model)} == {218_112_000}
    assert model.num_parameters() == left


def test_a_model_whose_blocks_are_not_known():
    config = OPTConfig(
        vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(UserError) as refused:
        check_blocks(AutoModelForCausalLM.from_config(config), where="stages.prune.path=a/model")
    assert str(refused.value) == (
        "stages.prune.path=a/model: a model of the type opt; blocks can be left out of those of "
        "the type llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt2, gpt_neox"
    )


def test_a_model_that_scales_by_the_number_of_a_block():
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(UserError) as refused:
        check_blocks(AutoModelForCausalLM.from_config(config), where="stages.prune.path=a/model")
    assert str(refused.value) == (
        "stages.prune.path=a/model: the model has scale_attn_by_inverse_layer_idx=true, by which a "
        "block attends otherwise when its number changes; take a model without it"
    )
