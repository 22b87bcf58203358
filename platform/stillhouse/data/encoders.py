"""Text for encoders as a LightningDataModule: a corpus or labelled text, a tokenizer, batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerBase

from stillhouse.data.corpora.corpus import Corpus, Split
from stillhouse.data.encoder_rows import (
    EncodedRow,
    PackedRows,
    Rows,
    collate_rows,
    encode_examples,
    encode_pieces,
)
from stillhouse.data.labelled.few_labels import few_labels
from stillhouse.data.labelled.task import Example, LabelledText, Task
from stillhouse.data.language import KeptBatches
from stillhouse.data.stream import BatchStream
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError
from stillhouse.ranges import Count, CountFrom0
from stillhouse.records.encoders import EncoderBatch


class EncoderData(pl.LightningDataModule):
    """Batches for encoders: pieces of a corpus, or texts and pairs with their labels.

    Documents of a corpus are cut into pieces of `sequence_length` tokens, the special ones
    included, and nothing is lost. A labelled text is one row: it is truncated or refused.
    """

    def __init__(
        self,
        seed: int,
        *,
        corpus: dict[str, Any],
        tokenizer_path: str,
        sequence_length: Count,
        batch_size: Count,
        evaluation_batch_size: Count,
        truncate: bool = True,
        train_labels: Count | None = None,
        subset_seed: int = 0,
        max_train_documents: Count | None = None,
        max_evaluation_rows: Count | None = None,
        distinct_train_batches: Count | None = None,
        num_workers: CountFrom0 = 0,
        pin_memory: bool = False,
    ) -> None:
        """Describe the data; nothing is read before it is asked for.

        Args:
            seed: of the order of training.
            corpus: node of a function that returns a `Corpus` or a `LabelledText`.
            tokenizer_path: folder or hub id of a tokenizer with a pad token.
            sequence_length: most tokens of a row, special ones included.
            batch_size: rows a training batch and device.
            evaluation_batch_size: rows a validation or test batch.
            truncate: whether a longer labelled text is cut, of a pair the longer text first, and
                counted; else it is refused.
            train_labels: train on n examples only, balanced and nested; null takes all.
            subset_seed: which examples they are.
            max_train_documents: train on the first n documents of a corpus, or examples; null takes
                all.
            max_evaluation_rows: validate and test on n rows, spread evenly; null takes all.
            distinct_train_batches: train on n batches over and over; null takes all.
            num_workers, pin_memory: as in `torch.utils.data.DataLoader`.
        """
        super().__init__()
        self.seed = seed
        self.corpus_node = corpus
        self.tokenizer_path = tokenizer_path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.truncate = truncate
        self.train_labels = train_labels
        self.subset_seed = subset_seed
        self.max_train_documents = max_train_documents
        self.max_evaluation_rows = max_evaluation_rows
        self.distinct_train_batches = distinct_train_batches
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._examples: dict[Split, Sequence[Example]] = {}
        self._rows: dict[Split, PackedRows] = {}

    @cached_property
    def corpus(self) -> Corpus | LabelledText:
        """The texts, by split."""
        return instantiate(self.corpus_node)

    @property
    def task(self) -> Task | None:
        """What the labels say; None for text without labels."""
        return self.corpus.task if isinstance(self.corpus, LabelledText) else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: when there is none, it has no pad token, or `sequence_length` is no length
                that it and its model take.
        """
        key = "data.tokenizer_path"
        tokenizer = load_tokenizer(self.tokenizer_path, key=key)
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"{key}={self.tokenizer_path}: the tokenizer has no pad token; expected an "
                "encoder's, such as BERT's"
            )
        fewest, most = (
            tokenizer.num_special_tokens_to_add(pair=True) + 1,
            tokenizer.model_max_length,
        )
        if self.sequence_length < fewest:
            raise UserError(
                f"data.sequence_length={self.sequence_length}: expected {fewest} or more, a token "
                "of text beside the special ones of a pair"
            )
        if self.sequence_length > most:
            raise UserError(
                f"data.sequence_length={self.sequence_length}: expected {most} or less, as many "
                f"positions as the model of {key}={self.tokenizer_path} has"
            )
        return tokenizer

    @property
    def collate(self) -> Callable[[Sequence[EncodedRow]], EncoderBatch]:
        """Make a batch of rows; it travels to the loader's workers without the corpus."""
        tokenizer: Any = self.tokenizer
        return partial(
            collate_rows,
            pad_token=int(tokenizer.pad_token_id),
            pad_left=tokenizer.padding_side == "left",
            task=self.task,
        )

    def examples(self, split: Split) -> Sequence[Example]:
        """Return the texts of a split that are used, in the order of its rows.

        Training examples of a labelled text stand in a balanced order that `train_labels` does not
        change: row i is the same example at 50 labels and at all. A document of a corpus is an
        example without a label.

        Raises:
            UserError: for labels to choose from where there are none, or too few or many of them.
        """
        if split not in self._examples:
            self._examples[split] = self._read(split)
        return self._examples[split]

    def _read(self, split: Split) -> Sequence[Example]:
        corpus, training = self.corpus, split == "train"
        limit = self.max_train_documents if training else None
        if isinstance(corpus, LabelledText):
            examples = corpus.splits[split]
            if not training:
                return examples
            ordered = few_labels(
                examples,
                corpus.task,
                count=self.train_labels,
                seed=self.subset_seed,
                key="data.train_labels",
            )
            return ordered[:limit]
        if self.train_labels is not None:
            raise UserError(
                f"data.train_labels={self.train_labels}: {corpus.name} has no labels; set it to "
                "null, or name labelled text as data.corpus"
            )
        documents = corpus.documents(split)[:limit]
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) < len(documents):
            raise UserError(
                f"data.corpus: {corpus.name} holds conversations or tokens; encoders read plain "
                "text; name a corpus of it"
            )
        return [Example(text) for text in texts]

    def rows(self, split: Split) -> PackedRows:
        """Return the rows of a split, tokenised once.

        Raises:
            UserError: for a text that is too long, where it is not to be truncated.
        """
        if split not in self._rows:
            examples, length = self.examples(split), self.sequence_length
            if self.task is None:
                rows = encode_pieces(examples, self.tokenizer, length)
            else:
                rows = encode_examples(examples, self.tokenizer, length)
                self._check_lengths(rows, split)
            self._rows[split] = rows
        return self._rows[split]

    def truncated(self, split: Split) -> int:
        """Return how many rows of a split were cut; none of a corpus is."""
        return len(self.rows(split).cut)

    def prepare_data(self) -> None:
        """Tokenise what a fit reads."""
        for split in ("train", "validation"):
            self.rows(split)

    def report(self) -> Mapping[str, int]:
        """Return how many labelled texts were cut, of every split that has been tokenised."""
        read = {} if self.task is None else self._rows
        return {f"truncated_{split}_texts": self.truncated(split) for split in read}

    def remarks(self) -> Sequence[str]:
        """Say of which splits labelled texts were cut, if any were."""
        return [
            f"{cut} of {len(rows)} {'training' if split == 'train' else split} texts are longer "
            f"than data.sequence_length={self.sequence_length} and were cut"
            for split, rows in self._rows.items()
            if (cut := self.truncated(split))
        ]

    def _check_lengths(self, rows: PackedRows, split: Split) -> None:
        if rows.cut and not self.truncate:
            text = self.examples(split)[rows.cut[0]].text
            raise UserError(
                f"data.sequence_length={self.sequence_length}: {len(rows.cut)} of {len(rows)} "
                f"texts of {split} are longer, the first begins {text[:40]!r}; set a greater "
                "length, or data.truncate=true to cut them"
            )

    def train_dataloader(self) -> BatchStream:
        """Return the stream of the whole training; Lightning's trainer says how long it is."""
        trainer = self.trainer
        assert trainer is not None
        rows: Sequence[EncodedRow] = self.rows("train")
        if self.distinct_train_batches is not None:
            rows = rows[: self.distinct_train_batches * self.batch_size]
        return BatchStream(
            Rows(rows),
            batch_size=self.batch_size,
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=self.seed,
            collate=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> KeptBatches[EncoderBatch]:
        """Return the validation batches."""
        return KeptBatches(list(self.evaluation_batches("validation")))

    def evaluation_batches(self, split: Split) -> Iterator[EncoderBatch]:
        """Yield the rows of a split in their order; of `train`, all of them."""
        rows: Sequence[EncodedRow] = self.rows(split)
        most = self.max_evaluation_rows
        if split != "train" and most is not None and len(rows) > most:
            rows = [rows[i * len(rows) // most] for i in range(most)]
        size = self.evaluation_batch_size
        for start in range(0, len(rows), size):
            yield self.collate(rows[start : start + size])
