"""Masked language modelling: an encoder learns from text alone, and can then be a teacher.

Jacob Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv:1810.04805, Sec. 3.1, without the prediction of the next sentence:

    L = -mean_{n in M} log q(x_n | x with M masked)     nats a token, M the chosen positions

The method of this module says what is masked: a function
`(batch, generators, vocabulary, *, …) -> MaskedBatch` with a generator for each row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.encoders import EncoderData
from stillhouse.data.stream import BatchStream, generator_for
from stillhouse.errors import UserError
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.window_means import WindowMeans
from stillhouse.ranges import Share
from stillhouse.records.encoders import EncoderBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.encoder_layouts import blocks_of, body_of
from stillhouse.students.encoders import read_encoder


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of the tokens.

    Attributes:
        size: V, number of tokens.
        mask_token: id that stands for a token that is hidden.
        special: [V]; True at tokens that are no text and never chosen.
    """

    size: int
    mask_token: int
    special: Bool[Tensor, "V"]


@dataclass(frozen=True)
class MaskedBatch:
    """Texts with some tokens hidden.

    Attributes:
        batch: what the encoder reads.
        chosen: [B, N]; True where it has to say which token was there.
    """

    batch: EncoderBatch
    chosen: Bool[Tensor, "B N"]


Masking = Callable[[EncoderBatch, Sequence[torch.Generator], Vocabulary], MaskedBatch]


def bert_masking(
    batch: EncoderBatch,
    generators: Sequence[torch.Generator],
    vocabulary: Vocabulary,
    *,
    probability: Share = 0.15,
    mask_share: Share = 0.8,
    random_share: Share = 0.1,
) -> MaskedBatch:
    """Choose tokens of every row, and hide most of them.

    Of a row's tokens `probability`, rounded, but at least one is chosen. A chosen one becomes the
    mask token with the probability `mask_share`, any token with `random_share`, and stays else.

    Args:
        batch: the texts.
        generators: of each row, on the CPU; they and the row's tokens decide, not the padding.
        vocabulary: of the tokenizer.
        probability: share of tokens that are chosen, above 0 and at most 1.
        mask_share, random_share: of the chosen ones; together at most 1.

    Raises:
        UserError: for shares outside their range.
    """
    if not 0 < probability <= 1:
        raise UserError(f"method.probability={probability}: expected above 0, and at most 1")
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1:
        raise UserError(
            f"method.mask_share={mask_share}, method.random_share={random_share}: expected shares "
            "of 0 or more that are at most 1 together"
        )
    ids, mask = batch.input_ids.cpu(), batch.attention_mask.cpu()
    hidden, chosen = ids.clone(), torch.zeros_like(mask)
    for row, generator in enumerate(generators):
        places = (mask[row] & ~vocabulary.special[ids[row]]).nonzero().squeeze(1)
        if not len(places):
            continue
        count = max(1, round(probability * len(places)))
        picked = places[torch.randperm(len(places), generator=generator)[:count]]
        fate = torch.rand(count, generator=generator)
        others = torch.randint(vocabulary.size, (count,), generator=generator)
        kept = torch.where(fate < mask_share + random_share, others, ids[row, picked])
        hidden[row, picked] = torch.where(fate < mask_share, vocabulary.mask_token, kept)
        chosen[row, picked] = True
    device = batch.input_ids.device
    return MaskedBatch(batch._replace(input_ids=hidden.to(device)), chosen.to(device))


class MaskedLanguageModel(Distiller):
    """An encoder and a head over its vocabulary, which is left behind when it is handed on.

    What is masked of a text is a pure function of (seed, epoch, index), in validation of its place.
    The gradient of an optimiser step is that of the mean over all chosen tokens of the step.

    Args:
        student: the encoder that learns.
        teacher: None.
        method: the masking.
        optimizer: called with (encoder and head, max_steps).

    Raises:
        UserError: for a teacher.
    """

    unit = "masked_tokens"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Masking,
        optimizer: OptimizerBuilder,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        if teacher is not None:
            raise UserError("teacher: text alone is learnt from here; expected teacher=null")
        self.head = MaskedHead(body_of(student))
        self._window = WindowMeans()
        self._validation: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Learn the data's vocabulary."""
        trainer: Any = self.trainer
        self._vocabulary = vocabulary_of(trainer.datamodule.tokenizer)

    def learning(self) -> list[nn.Module]:
        """Return the encoder and the head."""
        return [self.student, self.head]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over encoder and head."""
        # A list of its own: as an attribute it would be in every checkpoint a second time.
        return self._optimizer(nn.ModuleList([self.student, self.head]), self.trainer.max_steps)

    def training_step(self, batch: EncoderBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's chosen tokens, ready for accumulation."""
        stream = self.trainer.train_dataloader
        assert isinstance(stream, BatchStream)
        keys = stream.keys(batch_idx)
        nll, count = self._nll(batch, [generator_for(stream.seed, *key) for key in keys])
        self.stop_if_not_finite(nll.detach(), batch_idx)
        self._window.add(LossTerms(nll), count)
        # Lightning divides by the length of the window; the global count does it instead.
        return nll * count * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's chosen tokens; log it."""
        tokens, means = self._window.close(optimizer, self.trainer.world_size)
        self.log("train_loss", means["loss"], batch_size=1)
        self.units_seen += tokens

    def validation_step(self, batch: EncoderBatch, batch_idx: int) -> None:
        """Keep the loss of this rank's batches, masked alike every time."""
        if not self.is_called_on(batch_idx):
            return
        generators = [generator_for(batch_idx, row) for row in range(len(batch.input_ids))]
        nll, count = self._nll(batch, generators)
        if self.is_own(batch_idx):
            self._validation.append(((nll * count).cpu(), count.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log `val_masked_nll`, nats a token, over all chosen tokens."""
        found = [pair for of_rank in self._of_every_rank(self._validation) for pair in of_rank]
        self._validation = []
        total, count = (torch.stack(column).sum() for column in zip(*found, strict=True))
        self.log("val_masked_nll", total / count.clamp_min(1))

    def _nll(
        self, batch: EncoderBatch, generators: Sequence[torch.Generator]
    ) -> tuple[Float[Tensor, ""], Tensor]:
        """Return the mean negative log-likelihood of the chosen tokens, and their number."""
        masked: MaskedBatch = self.method(batch, generators, self._vocabulary)
        last = len(blocks_of(self.student))
        output = read_encoder(self.student, masked.batch, hidden_layers=[last])
        states = output.hidden_states[last][masked.chosen]
        logits = self.head(states, body_of(self.student))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = masked.chosen.sum()
        labels = batch.input_ids[masked.chosen]
        return F.cross_entropy(logits, labels, reduction="sum") / count.clamp_min(1), count

    def export(self, folder: Path, data: EncoderData) -> None:
        """Write encoder and tokenizer as an ordinary `transformers` folder, no head."""
        student: Any = self.student
        student.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)


class MaskedHead(nn.Module):
    """BERT's: a dense layer, GELU, LayerNorm, and the word embeddings as the last layer."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        config: Any = body.config
        words = _words_of(body)
        self.dense = nn.Linear(config.hidden_size, words.shape[1])
        self.norm = nn.LayerNorm(words.shape[1])
        self.bias = nn.Parameter(torch.zeros(len(words)))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.to(words.dtype)

    def forward(self, states: Float[Tensor, "M D"], body: PreTrainedModel) -> Float[Tensor, "M V"]:
        """Return logits of chosen positions; the embeddings are the body's own."""
        return F.linear(self.norm(F.gelu(self.dense(states))), _words_of(body), self.bias)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return what masking needs to know of a tokenizer.

    Raises:
        UserError: when it has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"data.tokenizer_path={tokenizer.name_or_path}: the tokenizer has no mask token; "
            "expected one made for masked language modelling, with [MASK] among its special tokens"
        )
    known: Any = tokenizer
    special = torch.zeros(len(known), dtype=torch.bool)
    special[known.all_special_ids] = True
    return Vocabulary(len(known), known.mask_token_id, special)


def _words_of(body: PreTrainedModel) -> Tensor:
    embeddings: Any = body.get_input_embeddings()
    return embeddings.weight
