"""Masked language modelling: what is hidden, of which the loss is, and that it goes on alike."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import FakeData, V, make, make_batch, make_tokenizer
from lightning.pytorch import LightningDataModule
from torch import Tensor
from training import bare_trainer, plain_sgd
from transformers import AutoModel, BertConfig, BertForMaskedLM

from stillhouse.data.language import KeptBatches
from stillhouse.data.stream import BatchStream, generator_for
from stillhouse.errors import UserError
from stillhouse.families.optimizers import adamw
from stillhouse.pretraining.masked_language_model import (
    MaskedHead,
    MaskedLanguageModel,
    bert_masking,
    vocabulary_of,
)
from stillhouse.records.encoders import EncoderBatch

WORDS = vocabulary_of(make_tokenizer())
MASK = 3


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [generator_for(seed, row) for row in range(count)]


def test_shares_of_what_is_hidden() -> None:
    """Of 20 tokens 3 are chosen; 80 in a hundred become the mask, 10 any token, 10 stay."""
    batch = make_batch([20] * 2000)
    batch = batch._replace(input_ids=batch.input_ids.clamp_min(4))
    masked = bert_masking(batch, generators(2000), WORDS)
    assert (masked.chosen.sum(-1) == 3).all()
    same = masked.batch.input_ids == batch.input_ids
    assert same[~masked.chosen].all()
    by_place = masked.chosen.double().mean(0)
    assert (by_place - 0.15).abs().max() < 0.04, "no place is preferred"
    found, given = masked.batch.input_ids[masked.chosen], batch.input_ids[masked.chosen]
    # Tokens are drawn from all 23, so that a few of the drawn ones are the same or the mask.
    assert (found == MASK).double().mean() == pytest.approx(0.8 + 0.1 / V, abs=0.02)
    assert (found == given).double().mean() == pytest.approx(0.1 + 0.1 / V, abs=0.02)
    drawn = found[(found != MASK) & (found != given)]
    assert len(drawn.unique()) == V - 1


def test_special_tokens_and_padding_are_never_chosen() -> None:
    ids = torch.tensor([[2, 9, 2, 8, 1, 1], [2, 2, 2, 2, 2, 2]])
    batch = EncoderBatch(ids, torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool())
    masked = bert_masking(
        batch, generators(2), WORDS, probability=1.0, mask_share=1.0, random_share=0
    )
    assert masked.batch.input_ids.tolist() == [[2, MASK, 2, MASK, 1, 1], [2] * 6]
    few = bert_masking(batch, generators(2), WORDS, probability=0.01)
    assert few.chosen.sum(-1).tolist() == [1, 0], "one at least, where there is one"


def test_padding_and_neighbours_change_nothing() -> None:
    batch = make_batch([18, 11, 5])
    together = bert_masking(batch, generators(3), WORDS, probability=0.5)
    alone = EncoderBatch(batch.input_ids[1:2, :11], batch.attention_mask[1:2, :11])
    single = bert_masking(alone, generators(3)[1:2], WORDS, probability=0.5)
    assert torch.equal(together.batch.input_ids[1:2, :11], single.batch.input_ids)
    assert torch.equal(together.chosen[1:2, :11], single.chosen)
    left = EncoderBatch(batch.input_ids[1:2].flip(1), batch.attention_mask[1:2].flip(1))
    assert bert_masking(left, generators(3)[1:2], WORDS).chosen.sum() == 2
    assert not bert_masking(left, generators(3)[1:2], WORDS).chosen[:, :7].any()


@torch.no_grad()
def test_the_head_is_bert_s() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        layer_norm_eps=1e-5,
    )
    model = BertForMaskedLM(config).double().eval()
    theirs = model.cls.predictions
    theirs.bias.normal_()
    theirs.transform.dense.bias.normal_()
    head = MaskedHead(model.base_model)
    assert head.dense.weight.std() == pytest.approx(config.initializer_range, rel=0.4)
    head.dense.load_state_dict(theirs.transform.dense.state_dict())
    head.norm.load_state_dict(theirs.transform.LayerNorm.state_dict())
    head.bias.copy_(theirs.bias)
    states = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(head(states, model.base_model), theirs(states))
    assert MaskedHead(make("electra", None)).dense.out_features == 8, "as wide as the embeddings"


TEXTS = [make_batch([n], seed=n).input_ids[0] for n in (4, 9, 6, 12, 7)]


class Source:
    """Five texts of uneven lengths."""

    def __len__(self) -> int:
        return len(TEXTS)

    def sample(self, index: int, generator: torch.Generator) -> Tensor:
        return TEXTS[index]


def collate(rows: list[Tensor]) -> EncoderBatch:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    lengths = torch.tensor([[len(row)] for row in rows])
    return EncoderBatch(ids, torch.arange(ids.shape[1]) < lengths)


class Texts(LightningDataModule):
    """The data of a training: batches of two texts, so that an epoch ends within one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()

    def train_dataloader(self) -> BatchStream:
        trainer: Any = self.trainer
        steps = trainer.max_steps * trainer.accumulate_grad_batches
        return BatchStream(Source(), batch_size=2, num_batches=steps, seed=5, collate=collate)

    def val_dataloader(self) -> KeptBatches:
        return KeptBatches([collate(TEXTS[:2]), collate(TEXTS[2:])])


def model_of(seed: int = 0, **options: Any) -> MaskedLanguageModel:
    student = make("bert", None, seed=seed)
    torch.manual_seed(9)
    settings = {"optimizer": plain_sgd, "method": bert_masking} | options
    return MaskedLanguageModel(student, None, settings["method"], settings["optimizer"])


def expected_nll(module: MaskedLanguageModel, batches: range) -> Tensor:
    """Return the nats of every chosen token, text by text, without padding."""
    stream = BatchStream(Source(), batch_size=2, num_batches=9, seed=5, collate=collate)
    found = []
    for epoch, index in (key for n in batches for key in stream.keys(n)):
        ids = TEXTS[index][None]
        batch = EncoderBatch(ids, torch.ones_like(ids).bool())
        masked = bert_masking(batch, [generator_for(5, epoch, index)], WORDS)
        states = module.student(input_ids=masked.batch.input_ids).last_hidden_state
        logits = module.head(states[masked.chosen], module.student)
        found.append(F.cross_entropy(logits, ids[masked.chosen], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_the_gradient_of_the_mean_over_all_chosen_tokens(accumulate, tmp_path) -> None:
    module, reference = model_of(), model_of()
    options = {"max_steps": 2, "accumulate_grad_batches": accumulate}
    bare_trainer(tmp_path, **options).fit(module, datamodule=Texts())
    for step in range(2):
        nll = expected_nll(reference, range(step * accumulate, (step + 1) * accumulate))
        parameters = {n: p for n, p in reference.named_parameters() if "pooler" not in n}
        gradients = torch.autograd.grad(nll.mean(), list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= gradient
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), rtol=1e-6, atol=1e-8)
    assert module.summary()["masked_tokens_seen"] > 4
    assert module.summary()["train_loss"] == pytest.approx(nll.mean().item())


@torch.no_grad()
def test_validation_is_masked_alike_every_time(tmp_path) -> None:
    module = model_of()
    trainer = bare_trainer(tmp_path, max_steps=1)
    found = [trainer.validate(module, datamodule=Texts(), verbose=False)[0] for _ in range(2)]
    assert found[0] == found[1]
    nll = []
    for number, batch in enumerate(Texts().val_dataloader()):
        draws = [generator_for(number, row) for row in range(len(batch.input_ids))]
        masked = bert_masking(batch, draws, WORDS)
        inputs = {"input_ids": masked.batch.input_ids, "attention_mask": batch.attention_mask}
        states = module.student(**inputs).last_hidden_state
        logits = module.head(states[masked.chosen], module.student)
        nll.append(F.cross_entropy(logits, batch.input_ids[masked.chosen], reduction="none"))
    assert found[0]["val_masked_nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path) -> None:
    optimizer = partial(adamw, learning_rate=0.01)
    whole, began, resumed = (model_of(optimizer=optimizer) for _ in range(3))
    bare_trainer(tmp_path, max_steps=7).fit(whole, datamodule=Texts())
    first = bare_trainer(tmp_path, max_steps=7, limit_val_batches=0)
    began.on_train_batch_end = lambda *given: (
        first.save_checkpoint(tmp_path / "step.ckpt") if first.global_step == 4 else None
    )
    first.fit(began, datamodule=Texts())
    bare_trainer(tmp_path, max_steps=7).fit(
        resumed, datamodule=Texts(), ckpt_path=tmp_path / "step.ckpt", weights_only=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.units_seen == resumed.units_seen


def test_it_hands_on_an_encoder_without_the_head(tmp_path) -> None:
    module = model_of()
    data: Any = FakeData(None)
    module.export(tmp_path, data)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.state_dict(), module.student.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "tokenizer.json").is_file()


def test_it_learns_what_is_masked(tmp_path) -> None:
    """Of five texts that never change, hidden tokens can be told by what is left."""
    module = model_of(optimizer=partial(adamw, learning_rate=0.01, weight_decay=0.0))
    module.student.float()
    module.head.float()
    trainer = bare_trainer(tmp_path, max_steps=100)
    before = trainer.validate(module, datamodule=Texts(), verbose=False)[0]["val_masked_nll"]
    trainer.fit(module, datamodule=Texts())
    after = trainer.validate(module, datamodule=Texts(), verbose=False)[0]["val_masked_nll"]
    assert before > 3.0 > 2.7 > after, "ln 20 = 3.0 is to know nothing"


def test_bad_input(tmp_path: Path) -> None:
    def refusal(**shares: float) -> str:
        with pytest.raises(UserError) as refused:
            bert_masking(make_batch(), generators(3), WORDS, **shares)
        return str(refused.value)

    for probability in (0.0, 1.5):
        assert refusal(probability=probability) == (
            f"method.probability={probability}: expected above 0, and at most 1"
        )
    for mask, other in ((0.9, 0.2), (-0.1, 0.1)):
        assert refusal(mask_share=mask, random_share=other) == (
            f"method.mask_share={mask}, method.random_share={other}: expected shares of 0 or more "
            "that are at most 1 together"
        )
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UserError) as refused:
        vocabulary_of(tokenizer)
    assert str(refused.value) == (
        "data.tokenizer_path=: the tokenizer has no mask token; expected one made for masked "
        "language modelling, with [MASK] among its special tokens"
    )
    with pytest.raises(UserError) as refused:
        MaskedLanguageModel(make("bert", None), make("bert"), bert_masking, plain_sgd)
    assert str(refused.value) == "teacher: text alone is learnt from here; expected teacher=null"
