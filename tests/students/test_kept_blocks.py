"""A student of some of a model's blocks: the right weights, the right numbers, the right cache."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.students.kept_blocks import evenly_spaced, kept_blocks

V = 23
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
# A window shorter than the sequences: a block that took another's kind would change the logits.
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=3, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE, **WINDOW),
    "qwen3": Qwen3Config(**SHAPE, **WINDOW, head_dim=8),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> LanguageData:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return LanguageData(
        0,
        corpus={},
        tokenizer_path=str(folder),
        sequence_length=8,
        batch_size=2,
        evaluation_batch_size=2,
    )


def save_tokenizer(folder: Path, size: int = V) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w0", pad_token="w1"
    ).save_pretrained(folder)


@pytest.fixture(params=CONFIGS)
def full(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A saved model of six blocks; `path` is where it lies."""
    return save(CONFIGS[request.param], tmp_path / "full", monkeypatch)


def save(config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).double().eval()
    model.generation_config.max_new_tokens = 13
    model.save_pretrained(folder)
    save_tokenizer(folder)
    # transformers gives a Qwen2 folder a tokenizer class that adds a token of its own.
    monkeypatch.setattr(
        "stillhouse.data.vocabulary.AutoTokenizer.from_pretrained",
        PreTrainedTokenizerFast.from_pretrained,
    )
    model.path = str(folder)
    return model


def keep(data: LanguageData, full: Any, blocks: float | list[int], **changes: Any) -> Any:
    options = {"dtype": "float64", "attn_implementation": "eager"} | changes
    return kept_blocks(data, path=full.path, blocks=blocks, **options)


def ids_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, V, (3, 11), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_by_hand(full: Any, blocks: list[int]) -> torch.Tensor:
    """Return the full model's logits with the other blocks passed over."""
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: inputs[0])
        for index, layer in enumerate(full.model.layers)
        if index not in blocks
    ]
    logits = full(ids_of(), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[0, 2, 5], [1, 4], [3], list(range(6))])
def test_logits_are_those_of_the_full_model_with_the_others_passed_over(data, full, blocks):
    student = keep(data, full, blocks).eval()
    full.config._attn_implementation = "eager"
    expected = logits_by_hand(full, blocks)
    if len(blocks) < 6:
        whole = full(ids_of(), use_cache=False).logits
        assert (whole - expected).abs().max() > 0.1, "passing blocks over changes nothing here"
    torch.testing.assert_close(student(ids_of(), use_cache=False).logits, expected)


def test_every_weight_is_a_copy_and_the_config_tells_of_the_kept_blocks(data, full):
    student = keep(data, full, [0, 2, 5])
    ours, theirs = student.state_dict(), full.state_dict()
    for new, old in enumerate([0, 2, 5]):
        for name in [n for n in ours if n.startswith(f"model.layers.{new}.")]:
            source = name.replace(f"layers.{new}.", f"layers.{old}.")
            assert torch.equal(ours[name], theirs[source])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ours[name], theirs[name])
    assert len(ours) == 3 + 3 * (len(theirs) - 3) // 6
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert student.config.num_hidden_layers == 3
    assert student.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in student.parameters())
    tied = full.config.tie_word_embeddings
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert student.generation_config.max_new_tokens == 13
    if full.config.model_type.startswith("qwen"):
        assert student.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"]
        assert student.config.max_window_layers == 2


def test_making_one_draws_nothing_from_the_global_generator(data, full):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    keep(data, full, 0.5)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_a_saved_student_gives_equal_logits(data, full, tmp_path):
    student = keep(data, full, 0.5).eval()
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", attn_implementation="eager"
    ).eval()
    assert type(again) is type(full)
    assert again.config.num_hidden_layers == 3
    torch.testing.assert_close(again.state_dict(), student.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(ids_of()).logits, student(ids_of()).logits)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[0, 2, 5], [0, 1], [4, 5]])
def test_generation_with_and_without_a_cache_agrees(data, full, blocks):
    """Past the windows; also where only blocks with, or only ones without a window are left."""
    student = keep(data, full, blocks, attn_implementation="sdpa").eval()
    options = {"do_sample": False, "max_new_tokens": 12, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cached, plain = (
        student.generate(ids_of(), **options, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    assert len(cached.past_key_values.layers) == len(blocks)


@pytest.mark.parametrize(
    ("fraction", "number", "expected"),
    [
        (0.25, 30, [0, 4, 8, 12, 17, 21, 25, 29]),
        (0.5, 30, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]),
        (0.5, 6, [0, 3, 5]),
        (0.5, 5, [0, 2, 4]),
        (0.01, 30, [0, 29]),
        (0.99, 6, [0, 1, 2, 3, 4, 5]),
        (0.25, 2, [0, 1]),
        (0.5, 1, [0]),
    ],
)
def test_a_fraction_spaces_blocks_evenly(fraction, number, expected):
    assert evenly_spaced(fraction, number) == expected


def test_a_fraction_always_keeps_both_ends_and_no_block_twice():
    for number in range(2, 40):
        for percent in range(1, 100):
            chosen = evenly_spaced(percent / 100, number)
            gaps = {b - a for a, b in pairwise(chosen)}
            assert chosen[0] == 0
            assert chosen[-1] == number - 1
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return save(CONFIGS["llama"], tmp_path / "full", monkeypatch)


@pytest.mark.parametrize("blocks", [0, 1, 1.0, -0.5, 8, 1.5])
def test_a_number_that_is_no_fraction(data, llama, blocks):
    with pytest.raises(UserError) as refused:
        keep(data, llama, blocks)
    assert str(refused.value) == (
        f"student.blocks={blocks}: expected a fraction between 0 and 1, both excluded, or a list "
        "of indices"
    )


@pytest.mark.parametrize("blocks", [[], [0, 6], [-1, 2], [2, 0], [1, 1, 2]])
def test_indices_that_are_not_there_or_not_rising(data, llama, blocks):
    with pytest.raises(UserError) as refused:
        keep(data, llama, blocks)
    assert str(refused.value) == (
        f"student.blocks={blocks}: expected indices in rising order from 0 to 5, for the model has "
        "6 blocks; a fraction spaces them evenly"
    )


def test_a_model_whose_blocks_are_not_known(data, tmp_path, monkeypatch):
    config = OPTConfig(
        vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = save(config, tmp_path / "opt", monkeypatch)
    with pytest.raises(UserError) as refused:
        keep(data, model, 0.5)
    assert str(refused.value) == (
        f"student.path={model.path}: a model of the type opt; blocks can be left out of those of "
        "the type llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt2, gpt_neox"
    )


def test_a_model_with_another_tokenizer(data, llama):
    save_tokenizer(Path(llama.path), V - 1)
    with pytest.raises(UserError, match=f"its tokenizer has {V - 1} tokens, the data's {V}, and "):
        keep(data, llama, 0.5)
