"""The live teacher: frozen, in eval mode, in the precision asked for or the stored one."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.students.causal_lm import read_output
from stillhouse.teachers.live import live_teacher


@pytest.fixture
def loss_and_gradient(language_world, tiny_llama):
    """A function from a teacher to loss and gradient of one student on one batch."""
    batch = next(language_world.data().training_batches(range(6)))

    def measured(teacher):
        student = tiny_llama(1, vocab_size=300).float()
        loss = word_kd(read_output(student, batch), teacher(batch), batch).total
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])

    return measured


def test_it_stays_in_eval_mode_and_takes_no_gradient(language_world):
    teacher = live_teacher(language_world.data(), path=str(language_world.model))
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_a_teacher_in_half_precision_says_nearly_the_same(
    language_world, loss_and_gradient, dtype, tolerance
):
    data, path = language_world.data(), str(language_world.model)
    half = live_teacher(data, path=path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {getattr(torch, dtype)}
    found, expected = loss_and_gradient(half), loss_and_gradient(live_teacher(data, path=path))
    assert found[0].dtype == found[1].dtype == torch.float32
    for f, e in zip(found, expected, strict=True):
        assert 0 < (f - e).norm() < tolerance * e.norm()


@pytest.mark.filterwarnings("ignore")  # what torchao says of torch is not ours
def test_a_teacher_whose_config_says_so_stays_quantised(
    language_world, loss_and_gradient, tmp_path
):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(language_world.model, quantization_config=config)
    model.save_pretrained(tmp_path)
    for file in language_world.model.glob("tokenizer*"):
        shutil.copy2(file, tmp_path)
    data = language_world.data()
    teacher = live_teacher(data, path=str(tmp_path), dtype="auto")
    weight = teacher.model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Int8Tensor"
    found = loss_and_gradient(teacher)
    expected = loss_and_gradient(live_teacher(data, path=str(language_world.model)))
    for f, e in zip(found, expected, strict=True):
        assert 0 < (f - e).norm() < 0.05 * e.norm()
