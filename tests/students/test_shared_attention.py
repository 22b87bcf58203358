"""The student cut from a saved model: what it keeps, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_sharers import CONFIGS, full_model
from transformers import GPT2Config, GPT2LMHeadModel

from stillhouse.errors import UserError
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.students.shared_attention import share_attention, shared_attention
from stillhouse.students.sharing import sharing_of, write_sharing


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """The choice of the second of the two blocks of the tiny teacher."""
    write_sharing(sharing_of([1], 2, key="followers"), tmp_path)
    return tmp_path


def test_weights_are_those_of_the_saved_model(language_world: Any, chosen: Path) -> None:
    data, path = language_world.data(), str(language_world.model)
    student = shared_attention(data, path=path, sharing_path=str(chosen))
    full = load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="teacher")
    ours, theirs = student.state_dict(), full.state_dict()
    gone = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk"}
    assert theirs.keys() - ours.keys() == gone
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    assert student.config.model_type == "shared_attention_llama"


def test_a_student_is_loaded_as_a_model_like_any(
    language_world: Any, chosen: Path, tmp_path: Path
) -> None:
    student = shared_attention(
        language_world.data(), path=str(language_world.model), sharing_path=str(chosen)
    )
    student.save_pretrained(tmp_path / "student")
    path = str(tmp_path / "student")
    again = load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="student")
    assert type(again) is type(student)


def refusal(full: Any, followers: list[int], layers: int = 6) -> str:
    with pytest.raises(UserError) as refused:
        share_attention(full, sharing_of(followers, layers, key="f"), where="student.path=here")
    return str(refused.value)


def test_a_family_whose_attention_is_not_known() -> None:
    full = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9))
    assert refusal(full, [1], 2) == (
        "student.path=here: a model of the type gpt2; layers can share attention in those of the "
        "type llama, mistral, qwen2, qwen3"
    )


def test_a_student_is_not_cut_again() -> None:
    student = share_attention(
        full_model("llama"), sharing_of([2], 6, key="f"), where="student.path=here"
    )
    assert refusal(student, [1]) == (
        "student.path=here: a model of the type shared_attention_llama; layers can share attention "
        "in those of the type llama, mistral, qwen2, qwen3"
    )


def test_a_choice_for_another_depth() -> None:
    assert refusal(full_model("llama"), [2], 22) == (
        "student.path=here: the model has 6 layers, followers were chosen for one of 22; choose "
        "them anew with force=sharing"
    )


def test_attention_dropout() -> None:
    assert refusal(full_model("llama", attention_dropout=0.1), [2]) == (
        "student.path=here: the model has attention_dropout=0.1; layers that share attention have "
        "none: set it to 0 in the model's config.json"
    )


def test_a_window_grouped_with_full_attention() -> None:
    assert CONFIGS["qwen3"].layer_types[3] == "sliding_attention"
    assert refusal(full_model("qwen3"), [3]) == (
        "student.path=here: layer 3 (sliding_attention) follows layer 2 (full_attention); layers "
        "of a group must see the same keys; choose other followers"
    )


def test_every_follower_saves_its_projections() -> None:
    full, counts = full_model("llama"), []
    for followers in ([], [1], [1, 2, 3, 4, 5]):
        sharing = sharing_of(followers, 6, key="f")
        student = share_attention(full, sharing, where="student.path=here")
        counts.append(sum(p.numel() for p in student.parameters()))
    width, kv_width = 16, 8
    removed = width * width + width * kv_width
    assert counts == [counts[0], counts[0] - removed, counts[0] - 5 * removed]
