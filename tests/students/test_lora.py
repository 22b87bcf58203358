"""LoRA students: only the adapters learn and are kept; what goes home is a plain model."""

import pytest
import torch
from training import bare_trainer, plain_sgd
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stillhouse.data.language import KeptBatches
from stillhouse.errors import UserError
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.families.sequence.sft import sft
from stillhouse.students.causal_lm import merged, read_output
from stillhouse.students.lora import lora


@pytest.fixture
def adapted(language_world):
    """A function that makes the student; its B matrices, which start at 0, are set at random."""

    def adapted(**changes):
        settings = {
            "path": str(language_world.model),
            "rank": 4,
            "alpha": 8,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "dtype": "float32",
            "attn_implementation": "sdpa",
        }
        student = lora(language_world.data(), **(settings | changes))
        torch.manual_seed(0)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return student

    return adapted


def first_batch(world):
    return next(world.data().training_batches(range(4)))


def test_only_adapters_of_all_linear_layers_but_the_head_learn(adapted):
    names = [n for n, p in adapted().named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)
    assert len(names) == 2 * 2 * 7
    few = [n for n, p in adapted(target_modules=["q_proj"]).named_parameters() if p.requires_grad]
    assert len(few) == 2 * 2


def test_the_output_is_that_of_the_adapted_model_and_survives_merging(
    adapted, language_world, tmp_path
):
    student = adapted().eval()
    batch = first_batch(language_world)
    with torch.no_grad():
        before = read_output(student, batch).logits
        own = student(input_ids=batch.input_ids).logits
        plain = AutoModelForCausalLM.from_pretrained(language_world.model)(batch.input_ids).logits
        torch.testing.assert_close(before[batch.mask], own[batch.mask])
        assert (before - plain).abs().max() > 0.1
        model = merged(student)
        assert type(model) is LlamaForCausalLM
        model.save_pretrained(tmp_path)
        after = AutoModelForCausalLM.from_pretrained(tmp_path)(batch.input_ids).logits
    torch.testing.assert_close(after[batch.mask], before[batch.mask], rtol=1e-4, atol=1e-4)


def test_adapters_are_scaled_and_drop_their_input(adapted):
    """W x + (α/r) B A dropout(x), of a single layer."""
    student = adapted(rank=4, alpha=6, dropout=0.5)
    layer = student.get_base_model().model.layers[1].mlp.up_proj
    A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    x = torch.randn(50, A.shape[1])

    def added() -> torch.Tensor:
        torch.manual_seed(1)
        return layer(x) - layer.base_layer(x)

    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(added(), 6 / 4 * dropped @ A.T @ B.T)
    student.eval()
    torch.testing.assert_close(added(), 6 / 4 * x @ A.T @ B.T)


def test_a_model_without_adapters_is_merged_as_it_is(tiny_llama):
    model = tiny_llama()
    assert merged(model) is model


def test_a_step_moves_the_adapters_alone_and_a_checkpoint_holds_them_alone(
    adapted, language_world, fit_for_one_step
):
    student = adapted()
    frozen = {n: p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
    moved = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    distiller = SequenceDistiller(student, None, sft, plain_sgd)
    checkpoint = fit_for_one_step(distiller, [first_batch(language_world)])
    parameters = dict(student.named_parameters())
    assert all(torch.equal(parameters[n], before) for n, before in frozen.items())
    assert not any(torch.equal(parameters[n], before) for n, before in moved.items())
    kept = set(checkpoint["state_dict"])
    assert kept == {f"student.{n}" for n in moved}


@pytest.fixture
def fit_for_one_step(tmp_path):
    def fit(distiller, batches):
        trainer = bare_trainer(tmp_path, max_steps=1)
        distiller.train()
        trainer.fit(distiller, KeptBatches(batches), KeptBatches(batches))
        trainer.save_checkpoint(tmp_path / "step.ckpt")
        return torch.load(tmp_path / "step.ckpt", weights_only=True)

    return fit


def test_names_that_no_layer_has_are_refused(adapted):
    with pytest.raises(UserError) as caught:
        adapted(target_modules=["query"])
    assert str(caught.value) == (
        "student.target_modules=['query']: the model has no such layers; it has down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; all-linear takes all of them"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_that_a_loss_or_the_export_would_not_see_are_refused(
    adapted, language_world, tied, tmp_path
):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(language_world.model)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_world.model).save_pretrained(folder)

    def refusal(*names: str) -> str:
        with pytest.raises(UserError) as caught:
            adapted(path=str(folder), target_modules=list(names))
        return str(caught.value)

    way_out = "leave it out, or take all-linear, which is all linear layers but the head"
    assert refusal("q_proj", "lm_head") == (
        f"student.target_modules=['q_proj', 'lm_head']: the head gets no adapter; {way_out}"
    )
    if tied:
        assert refusal("embed_tokens") == (
            "student.target_modules=['embed_tokens']: the embeddings are the head as well "
            f"(tie_word_embeddings), which gets no adapter; {way_out}"
        )
    else:
        assert adapted(path=str(folder), target_modules=["embed_tokens"])
