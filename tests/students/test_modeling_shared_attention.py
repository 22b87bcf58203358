"""Models whose layers share attention: their logits, gradients and texts, and a folder that loads.

Card checks 1 to 5 and 7 of EchoAtt.
"""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_sharers import CONFIGS, FOLLOWERS, LEADERS, full_model, logits_by_hand, some_ids
from commands import ROOT
from omegaconf import OmegaConf
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from stillhouse.students.modeling_shared_attention import (
    SharedAttentionLlamaConfig,
    SharedAttentionLlamaForCausalLM,
    SharedAttentionQwen2Config,
)
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import Sharing, sharing_of
from stillhouse_kernels import follower_attention

SHARING = sharing_of(FOLLOWERS, 6, key="followers")


@pytest.fixture(params=CONFIGS)
def full(request: pytest.FixtureRequest) -> Any:
    return full_model(request.param)


def shared(full: Any, sharing: Sharing = SHARING) -> Any:
    return share_attention(full, sharing, where="student").eval()


@torch.no_grad()
def test_logits_are_those_written_out(full: Any) -> None:
    ids = some_ids(2, 11)
    wanted = logits_by_hand(full, LEADERS, ids)
    torch.testing.assert_close(shared(full)(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    unshared = logits_by_hand(full, range(6), ids)
    torch.testing.assert_close(full(ids).logits, unshared, rtol=1e-5, atol=1e-6)
    assert (unshared - wanted).abs().max() > 0.1, "sharing changes nothing here"


def test_gradients_are_those_written_out(full: Any) -> None:
    ids, weights = some_ids(2, 11), torch.randn(2, 11, 53, dtype=torch.float64)
    (logits_by_hand(full, LEADERS, ids) * weights).sum().backward()
    wanted = {n: p.grad for n, p in full.named_parameters() if p.grad is not None}
    student = shared(full).train()
    (student(ids).logits * weights).sum().backward()
    found = {n: p.grad for n, p in student.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_nothing_shared_is_the_teacher_bit_for_bit(full: Any) -> None:
    ids = some_ids(2, 11)
    student = shared(full, sharing_of([], 6, key="followers"))
    assert torch.equal(student(ids).logits, full(ids).logits)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in full.parameters())


@torch.no_grad()
def test_a_teacher_whose_group_is_alike_is_its_student(full: Any) -> None:
    for leader, follower in ((1, 2), (3, 4), (3, 5)):
        source, target = full.model.layers[leader], full.model.layers[follower]
        target.input_layernorm.load_state_dict(source.input_layernorm.state_dict())
        for name, module in source.self_attn.named_children():
            if name[0] in "qk":
                target.self_attn.get_submodule(name).load_state_dict(module.state_dict())
        # Members then see one and the same hidden state.
        for block in (source, target):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    ids = some_ids(2, 11)
    torch.testing.assert_close(shared(full)(ids).logits, full(ids).logits)


def test_followers_have_no_query_and_key_parameters(full: Any) -> None:
    names = [name for name, _ in shared(full).named_parameters()]
    for layer, leader in enumerate(LEADERS):
        own = {n.split("self_attn.")[1][0] for n in names if f"layers.{layer}.self_attn." in n}
        assert own == ({"q", "k", "v", "o"} if layer == leader else {"v", "o"})


def test_a_follower_alone_teaches_its_leader(full: Any) -> None:
    student = shared(full)
    blocks = student.model.layers
    outputs = []
    blocks[2].self_attn.register_forward_hook(lambda m, args, output: outputs.append(output[0]))
    # What the leader adds to the residual stream is cut: its matrix is the only way back.
    blocks[1].self_attn.register_forward_hook(lambda m, args, output: (output[0].detach(), None))
    student(some_ids(2, 11))
    outputs[0].square().sum().backward()
    for name in ("q_proj", "k_proj"):
        assert blocks[1].self_attn.get_submodule(name).weight.grad.norm() > 1e-3


def test_one_matrix_serves_a_group_and_is_let_go(full: Any) -> None:
    seen: list[tuple[int, Any]] = []
    places: list[Any] = []
    student = shared(full)

    def look(module: Any, args: Any, kwargs: Any) -> None:
        state, keys = kwargs["handover"].take(module.leader, False)
        seen.append((module.leader, state))
        A = torch.zeros(2, 4, 11, 11, dtype=torch.float64)
        for i in range(keys):
            unit = torch.zeros(2, 2, keys, 1, dtype=torch.float64)
            unit[:, :, i] = 1
            A[..., i] = follower_attention(state, unit)[..., 0]
        torch.testing.assert_close(A.sum(-1), torch.ones_like(A[..., 0]))
        assert torch.equal(A, A.tril())
        places.append(kwargs["handover"])

    for layer in FOLLOWERS:
        student.model.layers[layer].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        student(some_ids(2, 11))
    assert [leader for leader, _ in seen] == [1, 3, 3]
    assert seen[1][1] is seen[2][1]
    assert all(vars(place) == {"_states": {}} for place in places), "a state outlives its group"


TEXT: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "beam", "static", "chunked prefill"],
)
def test_text_with_a_cache_is_that_without(full: Any, options: dict[str, Any]) -> None:
    student, ids = shared(full), some_ids(2, 7)
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    cached = student.generate(ids, use_cache=True, **TEXT, **options)
    assert torch.equal(cached, student.generate(ids, use_cache=False, **TEXT, **beams))
    assert len(cached[0].unique()) > 4, "a text that repeats one token shows nothing"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_does_not_change_the_text(
    family: str, implementation: str, use_cache: bool
) -> None:
    student = shared(full_model(family))
    student.set_attn_implementation(implementation)
    ids = some_ids(2, 9)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :4] = 0
    together = student.generate(ids, attention_mask=attention_mask, use_cache=use_cache, **TEXT)
    assert torch.equal(together[0, 4:], student.generate(ids[:1, 4:], **TEXT)[0])
    assert torch.equal(together[1], student.generate(ids[1:], **TEXT)[0])


@torch.no_grad()
def test_the_cache_holds_no_keys_of_followers(full: Any) -> None:
    held = []
    for model in (full, shared(full)):
        cache = DynamicCache(config=model.config)
        model(some_ids(2, 3), past_key_values=cache)  # shorter than the window
        held.append(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)))
        assert cache.get_seq_length() == 3
    assert held[1] / held[0] == 1 - len(FOLLOWERS) / (2 * 6)


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_layers_may_be_wrapped_one_by_one() -> None:
    """FSDP2 rebuilds what goes into a layer: a leader must not write into a copy."""
    student, ids = shared(full_model("llama")), some_ids(2, 11)
    wanted = student(ids, labels=ids)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for block in student.model.layers:
        fully_shard(block, mesh=mesh)
    found = fully_shard(student, mesh=mesh)(ids, labels=ids)
    torch.testing.assert_close(found.logits, wanted.logits)
    found.loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_folder_loads_again(full: Any, tmp_path: Path) -> None:
    student = shared(full)
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_leaders"] == LEADERS
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(again) is type(student)
    ids = some_ids(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=1e-5, atol=1e-6)


ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("stillhouse"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM

folder, ids = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
text = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 1}
torch.save([model(ids).logits, model.generate(ids, **text)], sys.argv[3])
"""


def test_a_folder_loads_where_this_project_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, ids = shared(full_model("qwen3")), some_ids(2, 11)
    student.save_pretrained(tmp_path / "student")
    torch.save(ids, tmp_path / "ids.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    files = [str(tmp_path / name) for name in ("student", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], check=True, cwd=tmp_path)
    logits, text = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(logits, student(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(text, student.generate(ids, **TEXT))


# d (d + d_kv) weights a follower.
@pytest.mark.parametrize(("percent", "removed"), [(23, 23.6e6), (41, 42.5e6), (77, 80.2e6)])
def test_parameters_removed_from_tinyllama(percent: int, removed: float) -> None:
    followers = OmegaConf.load(ROOT / f"conf/sharing/tinyllama_{percent}.yaml").followers
    shape = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ).to_dict()
    leaders = list(sharing_of(followers, 22, key="f").leaders)
    del shape["model_type"]
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in SharedAttentionLlamaForCausalLM(config).parameters())
            for config in (
                SharedAttentionLlamaConfig(**shape),
                SharedAttentionLlamaConfig(**shape, attention_leaders=leaders),
            )
        ]
    assert counts[0] == 1_100_048_384
    assert counts[0] - counts[1] == len(followers) * 4_718_592
    assert round(counts[0] - counts[1], -5) == removed


def test_checkpoints_around_single_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="does not support"):
        shared(full_model("llama")).activation_checkpointing_enable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_leaders": [0, 0, 2]},
            "attention_leaders=[0, 0, 2] names 3 layers, num_hidden_layers=6",
        ),
        (
            {"attention_dropout": 0.1},
            "attention_dropout=0.1: layers that share attention have none; expected 0",
        ),
        (
            {"attention_leaders": [0, 1, 2, 2, 4, 5]},
            "layer 3 (sliding_attention) follows layer 2 (full_attention); layers of a group must "
            "see the same keys",
        ),
    ],
)
def test_a_config_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    settings = copy.deepcopy(CONFIGS["qwen2"].to_dict())
    del settings["model_type"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SharedAttentionQwen2Config(**settings | changes)
