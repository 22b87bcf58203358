"""The teacher of encoders: frozen, in eval mode, never with a head that it was not given."""

from pathlib import Path

import pytest
import torch
from encoders import CLASSES, FakeData, make, make_batch, make_tokenizer, save

from stillhouse.data.labelled.task import Task
from stillhouse.errors import UserError
from stillhouse.students.encoders import read_encoder
from stillhouse.teachers.encoders import live_encoder


@pytest.fixture
def path(tmp_path: Path) -> str:
    return save(make("bert"), tmp_path)


def test_it_stays_in_eval_mode_and_takes_no_gradient(path) -> None:
    teacher = live_encoder(FakeData(), path=path)
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    batch = make_batch()
    output = teacher(batch, hidden_layers=[1, 3], attention_layers=[2])
    assert not output.logits.requires_grad
    assert torch.equal(output.logits, teacher(batch).logits), "dropout is off"


@torch.no_grad()
def test_it_says_what_its_model_says(path) -> None:
    teacher = live_encoder(FakeData(), path=path, dtype="float64", attn_implementation="eager")
    batch = make_batch()
    found = teacher(batch, hidden_layers=[0, 3], attention_layers=[2])
    expected = read_encoder(make("bert"), batch, hidden_layers=[0, 3], attention_layers=[2])
    torch.testing.assert_close(found.logits, expected.logits)
    assert list(found.hidden_states) == [0, 3]
    for layer in (0, 3):
        torch.testing.assert_close(found.hidden_states[layer], expected.hidden_states[layer])
    for part in ("queries", "keys", "values"):
        ours, theirs = (getattr(said.attention[2], part) for said in (found, expected))
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_it_has_logits_where_task_and_head_are_there(path, tmp_path) -> None:
    batch = make_batch()
    assert live_encoder(FakeData(), path=path)(batch).logits is not None
    assert live_encoder(FakeData(None), path=path)(batch).logits is None
    body = save(make("bert", None), tmp_path / "body")
    assert live_encoder(FakeData(), path=body)(batch).logits is None


def test_bad_input(path, tmp_path: Path) -> None:
    def refusal(data: FakeData, path: str = path) -> str:
        with pytest.raises(UserError) as refused:
            live_encoder(data, path=path)
        return str(refused.value)

    ending = "; take a model without a head, or one that was fine-tuned on this task"
    assert refusal(FakeData(Task("classification", ("a", "b", "c")))) == (
        f"teacher.path={path}: its head is made for no, yes, the data for the classification of "
        f"a, b, c{ending}"
    )
    assert refusal(FakeData(CLASSES, sequence_length=40)) == (
        f"data.sequence_length=40: teacher.path={path} has 20 positions; expected 20 or less"
    )
    deberta = save(make("deberta"), tmp_path / "deberta")
    assert refusal(FakeData(), deberta) == (
        f"teacher.path={deberta}: a model of the type deberta has no attention sdpa; set "
        "attn_implementation=eager, beside the path"
    )
    make_tokenizer(22).save_pretrained(path)
    assert refusal(FakeData()).startswith(
        f"teacher.path={path}: its tokenizer has 22 tokens, the data's 23, and 1 of them differ"
    )
