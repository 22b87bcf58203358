"""The student before its training: what all arms begin with, whatever is left out between."""

from typing import Any

import pytest
import torch
from encoder_fits import ENCODER, EncoderWorld
from encoder_recipes import RECIPES, workspace_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.encoders import EncoderData
from stillhouse.stages.make_student import MakeStudent
from stillhouse.students.encoders import pretrained_encoder

LEFT_OUT = (
    (),
    ("general_enhanced",),
    ("general_enhanced", "task_adaptive"),
    ("general", "general_enhanced", "task_adaptive"),
)


@pytest.fixture
def world(tmp_path) -> EncoderWorld:
    return EncoderWorld.make(tmp_path)


@pytest.fixture
def made(world, stage_context, monkeypatch):
    """A function that makes a student of a seed, of text without labels; returns its folder."""
    monkeypatch.setattr(EncoderData, "corpus", Corpus("ours", "CC0", {}))

    def made(seed: int) -> Any:
        context = stage_context(f"seed {seed}")
        node = world.data(corpus={})
        metrics = MakeStudent(student=ENCODER, data=node, seed=seed)(context).metrics
        weights = load_file(context.output / "model.safetensors")
        assert metrics == {"student_parameters": sum(w.numel() for w in weights.values())}
        return context.output

    return made


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_alone_decides_how_a_student_begins(made) -> None:
    first = load_file(made(3) / "model.safetensors")
    torch.manual_seed(99)
    assert same(first, load_file(made(3) / "model.safetensors"))
    assert not same(first, load_file(made(4) / "model.safetensors"))
    assert not any("classifier" in name for name in first), "text without labels asks for no head"


def test_arms_begin_with_equal_parameters(made, world, monkeypatch) -> None:
    """One goes on with general text, one with the task's: the body is what was made."""
    folder = made(3)
    stored = load_file(folder / "model.safetensors")
    assert len(AutoTokenizer.from_pretrained(folder)) == 10
    arms = []
    for labelled in (False, True):
        if labelled:
            monkeypatch.undo()
        data = world.made()
        assert (data.task is not None) == labelled
        arms.append(pretrained_encoder(data, path=str(folder)))
    for student in arms:
        assert same(student.base_model.state_dict(), stored)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_student_is_the_same_whatever_is_left_out(recipe: str) -> None:
    prints = set()
    for left_out in LEFT_OUT:
        workspace = workspace_of(recipe, f"leave_out=[{','.join(left_out)}]")
        prints.add(workspace.fingerprint("untrained"))
        first = next(s for s in workspace.stages if s.startswith(("general", "task_")))
        for stage in (first, "finetuned"):
            assert "untrained" in workspace.needs(stage)
    assert len(prints) == 1
