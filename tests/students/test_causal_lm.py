import re

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.records.language import SequenceBatch
from stillhouse.students.causal_lm import llama, load_causal_lm, pretrained, read_output

V = 23
# Large weights: near 0 a soft-cap is the identity and a padded position changes nothing.
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.7),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**SHAPE, logits_scaling=8.0, embedding_multiplier=3.0),
    "gpt2": GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def make_model(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture]).double().eval()


def batch_of(*rows: list[int]) -> SequenceBatch:
    """Rows padded on the right, masks by length; the labels are not read here."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    return SequenceBatch(ids, ids, mask, None if mask.all() else mask)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w2"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w0", pad_token="w1"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tokenizer_folder):
    return LanguageData(
        0,
        corpus={},
        tokenizer_path=str(tokenizer_folder),
        sequence_length=8,
        batch_size=2,
        evaluation_batch_size=2,
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", CONFIGS)
def test_head_record_reproduces_the_model_s_logits(architecture):
    model = make_model(architecture)
    batch = batch_of([3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7])
    output = read_output(model, batch)
    assert output.vocabulary_size == V
    torch.testing.assert_close(output.logits, model(input_ids=batch.input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_scale_and_soft_cap_change_the_logits(architecture):
    output = read_output(make_model(architecture), batch_of([3, 1, 4, 1, 5, 9, 2]))
    linear = F.linear(output.hidden_states, output.head.weight)
    assert (linear - output.logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("architecture", CONFIGS)
def test_padding_leaves_the_hidden_states_of_real_positions_alone(architecture):
    model = make_model(architecture)
    rows = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [8]]
    padded = read_output(model, batch_of(*rows)).hidden_states
    for states, row in zip(padded, rows, strict=True):
        alone = read_output(model, batch_of(row)).hidden_states[0]
        torch.testing.assert_close(states[: len(row)], alone)


def test_head_shares_the_model_s_tensors_so_that_it_learns():
    model = make_model("llama")
    output = read_output(model, batch_of([3, 1, 4]))
    assert output.head.weight is model.get_output_embeddings().weight
    output.logits.square().sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


# transformers gives a Qwen2 folder a tokenizer class that adds a token of its own.
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "qwen2"])
def test_saved_model_is_loaded_as_a_student_in_training_mode(architecture, data, tmp_path):
    saved = make_model(architecture)
    saved.save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    loaded = pretrained(data, path=str(tmp_path), dtype="float64", attn_implementation="eager")
    assert loaded.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict())


def test_missing_folder_is_refused_by_key_and_path(data, tmp_path):
    path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=re.escape(f"student.path={path}: there is no such folder")):
        pretrained(data, path=path)


def test_folder_without_a_model_is_refused_by_what_it_lacks(data, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=rf"student\.path={re.escape(str(tmp_path))}.*config\.json"):
        pretrained(data, path=str(tmp_path))


def test_folder_without_weights_is_refused_in_one_line(data, tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"student\.path=.* cannot be loaded") as refused:
        pretrained(data, path=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_dtype_that_torch_does_not_have_is_refused(data, tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"student\.dtype=float31"):
        pretrained(data, path=str(tmp_path), dtype="float31")


def test_student_with_another_tokenizer_is_refused(data, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    other = Tokenizer(models.WordLevel({str(i): i for i in range(V - 1)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(tmp_path)
    expected = f"its tokenizer has {V - 1} tokens, the data's {V}, and "
    with pytest.raises(UserError, match=expected):
        pretrained(data, path=str(tmp_path), dtype="float64")


def test_head_that_is_more_than_linear_is_refused(tmp_path):
    config = BertConfig(**SHAPE | {"is_decoder": True, "initializer_range": 1.0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertLMHeadModel is more than a linear layer"):
        load_causal_lm(str(tmp_path), dtype="float32", attn_implementation="eager", key="teacher")


LLAMA_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_llama_speaks_the_data_s_vocabulary_and_is_decided_by_the_seed(data):
    def make(seed: int):
        torch.manual_seed(seed)
        return llama(data, **LLAMA_SHAPE)

    one, same, other = make(1), make(1), make(2)
    assert one.get_output_embeddings().weight.shape == (V, 16)
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert (one.config.bos_token_id, one.config.pad_token_id) == (0, 1)
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 3}, {"num_key_value_heads": 3}])
def test_heads_that_do_not_divide_are_refused(data, wrong):
    with pytest.raises(UserError, match="must be a multiple of num_attention_heads"):
        llama(data, **(LLAMA_SHAPE | wrong))
