"""The similarity of layers against eager attention in float64, its bounds, memory and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import peak_bytes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from stillhouse.errors import UserError
from stillhouse.evaluation import attention_similarity as module
from stillhouse.evaluation.attention_similarity import attention_similarity
from stillhouse.records.similarity import Similarity, read_similarity, write_similarity

V = 23
WHERE = "stages.analyse.path=a/model"
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama without groups": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**SHAPE, sliding_window=3),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=4,
        n_head=4,
        n_positions=32,
        initializer_range=0.5,
        scale_attn_by_inverse_layer_idx=True,
    ),
}


def make(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.double().eval()


def samples(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def by_hand(model: Any, windows: list[Tensor]) -> Tensor:
    """Return the mean cosine of whole matrices, as the library's eager attention gives them."""
    model.set_attn_implementation("eager")
    cosines = []
    for ids in windows:
        output = model(input_ids=ids.unsqueeze(0), output_attentions=True, use_cache=False)
        vectors = [A.double().flatten() for A in output.attentions]
        cosines.append(
            torch.tensor([[torch.cosine_similarity(a, b, 0) for a in vectors] for b in vectors])
        )
    return torch.stack(cosines).mean(0).double()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 4 * 4 * 11 * 3, 2**20])
def test_it_is_the_mean_cosine_of_eager_matrices(family, chunk, monkeypatch):
    """By single rows, by three at a time with a rest, and whole; samples of two lengths."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, windows = make(CONFIGS[family]), samples(11, 7, 11)
    similarity = attention_similarity(model, windows, where=WHERE)
    expected = by_hand(model, windows)
    assert (expected - 1).abs().masked_fill(torch.eye(4) > 0, 1).min() > 0.01
    # GPT-2's eager attention is in float64 here, a rotary model's softmax in float32.
    tolerance = 1e-12 if family == "gpt2" else 1e-6
    torch.testing.assert_close(similarity.matrix, expected, rtol=0, atol=tolerance)
    others = [[s for j, s in enumerate(row) if j != i] for i, row in enumerate(expected.tolist())]
    means = [sum(row) / 3 for row in others]
    assert similarity.scores == pytest.approx(means, abs=tolerance)
    assert (similarity.layers, similarity.windows, similarity.tokens) == (4, 3, 29)
    assert (similarity.layer_types is None) == (family != "qwen2"), "one kind only"


def test_its_diagonal_is_1_it_is_symmetric_and_in_bounds():
    matrix = attention_similarity(make(CONFIGS["mistral"]), samples(20, 20), where=WHERE).matrix
    assert torch.equal(matrix.diagonal(), torch.ones(4).double())
    assert torch.equal(matrix, matrix.mT)
    assert matrix.min() > 0
    assert matrix.max() <= 1


def test_a_duplicated_layer_that_reads_the_same_input_is_alike_to_1():
    model = make(CONFIGS["llama"])
    with torch.no_grad():
        # Layer 1 adds nothing, so that layer 2, its copy, reads what it read.
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    matrix = attention_similarity(model, samples(12, 12), where=WHERE).matrix
    assert float(matrix[1, 2]) == pytest.approx(1, abs=1e-14)
    assert float(matrix[0, 1]) < 0.99
    assert float(matrix[2, 3]) < 0.99


@torch.no_grad()
def test_half_precision_is_widened_before_the_softmax():
    """The reference reads the same bfloat16 queries and keys, and never rounds again."""
    model = make(CONFIGS["llama"]).bfloat16()
    (ids,) = samples(16)
    found = attention_similarity(model, [ids], where=WHERE).matrix
    layers = module._record(model, ids, WHERE)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    vectors = []
    for layer in layers:
        keys = layer.k.double().repeat_interleave(2, dim=0)
        scores = (layer.q.double() @ keys.mT * layer.scale).masked_fill(~causal, -torch.inf)
        vectors.append(scores.softmax(-1).flatten())
    expected = torch.tensor([[torch.cosine_similarity(a, b, 0) for a in vectors] for b in vectors])
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-6)
    assert {layer.q.dtype for layer in layers} == {torch.float32}


def test_the_matrices_of_all_layers_are_never_held_at_once():
    shape = SHAPE | {"num_hidden_layers": 8, "num_attention_heads": 8, "hidden_size": 32}
    model, (ids,) = make(LlamaConfig(**shape)).float(), samples(640)
    stack = 8 * 8 * 640**2 * 4
    held = peak_bytes(lambda: attention_similarity(model, [ids], where=WHERE))
    assert held < stack / 3, f"{held / 1e6:.0f} MB, the stack has {stack / 1e6:.0f}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_the_model_attends_afterwards_as_before(attention):
    model, (ids,) = make(CONFIGS["qwen2"], attention), samples(9)
    before = model(ids.unsqueeze(0)).logits
    attention_similarity(model, [ids], where=WHERE)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids.unsqueeze(0)).logits, before)


def refusal(config: Any, attention: str = "sdpa") -> str:
    model = make(config, attention)
    with pytest.raises(UserError) as refused:
        attention_similarity(model, samples(5), where=WHERE)
    assert model.config._attn_implementation != module.IMPLEMENTATION
    return str(refused.value)


def test_a_model_that_attends_by_itself_is_refused():
    assert refusal(BloomConfig(vocab_size=V, hidden_size=16, n_layer=3, n_head=2), "eager") == (
        "stages.analyse.path=a/model: 0 of the 3 layers of BloomForCausalLM attend by "
        "transformers' attention interface, expected all; take a model such as Llama, Mistral, "
        "Qwen2 or Qwen3"
    )


def test_layers_with_different_numbers_of_heads_are_refused():
    model = make(CONFIGS["llama without groups"])
    narrow = LlamaConfig(**SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 2}, head_dim=4)
    model.model.layers[1].self_attn = make(narrow).model.layers[1].self_attn
    model.model.layers[1].self_attn.config = model.config
    with pytest.raises(UserError) as refused:
        attention_similarity(model, samples(5), where=WHERE)
    assert str(refused.value) == (
        "stages.analyse.path=a/model: the layers have 4, 2, 4, 4 heads; expected as many in each, "
        "since matrices are compared head by head; take another model"
    )


def test_capped_scores_are_refused():
    assert refusal(Gemma2Config(**SHAPE, head_dim=4), "eager") == (
        "stages.analyse.path=a/model: Gemma2Attention attends with softcap; the analysis knows "
        "softmax(scale Q K^T + mask) only; take another model"
    )


def test_one_layer_is_refused():
    assert refusal(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})) == (
        "stages.analyse.path=a/model: the model has one layer; expected two or more, to compare "
        "them"
    )


def test_written_and_read(tmp_path: Path):
    similarity = attention_similarity(make(CONFIGS["qwen2"]), samples(8), where=WHERE)
    write_similarity(similarity, tmp_path)
    again = read_similarity(str(tmp_path), key="stages.sharing.analysis_path")
    assert torch.equal(again.matrix, similarity.matrix)
    assert (again.windows, again.tokens, again.scores) == (1, 8, similarity.scores)
    assert again.layer_types == ("full_attention",) * 2 + ("sliding_attention",) * 2
    content = json.loads((tmp_path / "similarity.json").read_text())
    assert set(content) == {
        *("layers", "windows", "tokens", "layer_types", "similarity", "scores", "cut")
    }
    assert content["cut"] == similarity.cut


@pytest.mark.parametrize(
    ("scores", "cut"), [([0.5, 0.1, 0.9, 0.8], 0.3), ([0.2, 0.4, 0.6], 0.3), ([0.5, 0.5], None)]
)
def test_the_cut_lies_in_the_largest_gap(scores, cut, monkeypatch):
    similarity = Similarity(torch.eye(len(scores)), 1, 1)
    similarity.__dict__["scores"] = scores
    assert similarity.cut == (None if cut is None else pytest.approx(cut))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "{}",
            "no similarity of layers can be read from similarity.json; expected what the stage "
            "`analyse` wrote",
        ),
        (
            '{"similarity": [[1.0, 0.5]], "windows": 1, "tokens": 8}',
            "similarity.json holds a similarity of the shape [1, 2]; expected [layers, layers], of "
            "two layers or more; run the stage `analyse` anew",
        ),
        (
            '{"similarity": [[1.0, 0.5], [0.5, 1.0]], "windows": 1, "tokens": 8, '
            '"layer_types": ["full_attention"]}',
            "similarity.json names 1 layer_types of 2 layers; run the stage `analyse` anew",
        ),
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, content, message):
    (tmp_path / "similarity.json").write_text(content)
    with pytest.raises(UserError) as refused:
        read_similarity(str(tmp_path), key="stages.sharing.analysis_path")
    assert str(refused.value) == f"stages.sharing.analysis_path={tmp_path}: {message}"
