"""Text as a LightningDataModule: a corpus, a tokenizer, windows, batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerBase

from stillhouse.data.corpora.corpus import Corpus, Split
from stillhouse.data.documents import Conversation, Document
from stillhouse.data.encoding import encode
from stillhouse.data.stream import BatchStream
from stillhouse.data.vocabulary import load_tokenizer, tokenizer_identity
from stillhouse.data.windows import TokenWindows, Window, collate_windows
from stillhouse.errors import UserError
from stillhouse.ranges import Count, CountFrom0
from stillhouse.records.language import SequenceBatch

Batch = TypeVar("Batch")


class LanguageData(pl.LightningDataModule):
    """Batches of a corpus for language models.

    Training batches are a `BatchStream`; validation and test batches follow the text, cover every
    token once and are padded at the end.
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
        packing: bool = True,
        shift_windows: bool = False,
        max_train_documents: Count | None = None,
        max_evaluation_windows: Count | None = None,
        distinct_train_batches: Count | None = None,
        num_workers: CountFrom0 = 0,
        pin_memory: bool = False,
    ) -> None:
        """Describe the data; nothing is read before it is asked for.

        Args:
            seed: of order and shifts.
            corpus: node of a function that returns a `Corpus`.
            tokenizer_path: folder or hub id of a tokenizer.
            sequence_length: T, tokens a window.
            batch_size: windows a training batch and device.
            evaluation_batch_size: windows a validation or test batch.
            packing: whether windows run across documents; those of evaluation always do where the
                documents are plain text.
            shift_windows: whether training windows start at random offsets.
            max_train_documents: train on the first n documents only; null takes all.
            max_evaluation_windows: validate and test on n windows, spread evenly; null takes all.
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
        self.packing = packing
        self.shift_windows = shift_windows
        self.max_train_documents = max_train_documents
        self.max_evaluation_windows = max_evaluation_windows
        self.distinct_train_batches = distinct_train_batches
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._windows: dict[Split, TokenWindows] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The documents, by split."""
        return instantiate(self.corpus_node)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: when there is none, or it has no end token.
        """
        path = self.tokenizer_path
        if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
            raise UserError(f"data.tokenizer_path={path}: the folder holds no tokenizer")
        tokenizer = load_tokenizer(path, key="data.tokenizer_path")
        if tokenizer.eos_token_id is None:
            raise UserError(f"data.tokenizer_path={path}: the tokenizer has no end token")
        return tokenizer

    @property
    def collate(self) -> Callable[[Sequence[Window]], SequenceBatch]:
        """Make a batch of windows; it travels to the loader's workers without the corpus."""
        return partial(collate_windows, pad_token=self.pad_token)

    @property
    def end_token(self) -> int:
        """Id of the token that ends a document."""
        tokenizer: Any = self.tokenizer
        return int(tokenizer.eos_token_id)

    @property
    def pad_token(self) -> int:
        """Id that fills padded positions; the end token where the tokenizer has no pad token."""
        tokenizer: Any = self.tokenizer
        return self.end_token if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def windows(self, split: Split) -> TokenWindows:
        """Return the windows of a split, tokenised once."""
        if split not in self._windows:
            made_by = self.corpus.tokenizer
            if made_by is not None and made_by != tokenizer_identity(self.tokenizer):
                raise UserError(
                    f"data.tokenizer_path={self.tokenizer_path}: the corpus {self.corpus.name} was "
                    "made with another tokenizer; name that one, or make the corpus anew"
                )
            training, documents = split == "train", self.documents(split)
            chats = all(isinstance(document, Conversation) for document in documents)
            self._windows[split] = TokenWindows(
                encode(documents, self.tokenizer, self.end_token),
                length=self.sequence_length,
                end_token=self.end_token,
                # Text is evaluated alike however it is trained on; a model that never saw two
                # conversations in a window is not asked to read two.
                packing=self.packing or not (training or chats),
                shift_windows=self.shift_windows and training,
            )
        return self._windows[split]

    def documents(self, split: Split) -> Sequence[Document]:
        """Return the documents of a split that are used."""
        documents = self.corpus.documents(split)
        return documents[: self.max_train_documents] if split == "train" else documents

    def text_bytes(self, split: Split) -> int | None:
        """Return the UTF-8 bytes of the text behind `evaluation_batches`.

        None when the batches are not all of it, or it is not plain text.
        """
        documents = self.documents(split)
        texts = [d for d in documents if isinstance(d, str)]
        if self.max_evaluation_windows is not None or len(texts) < len(documents):
            return None
        return sum(len(text.encode()) for text in texts)

    def train_dataloader(self) -> BatchStream:
        """Return the stream of the whole training; Lightning's trainer says how long it is."""
        trainer = self.trainer
        assert trainer is not None
        windows = self.windows("train")
        if self.distinct_train_batches is not None:
            windows.spans = windows.spans[: self.distinct_train_batches * self.batch_size]
        return BatchStream(
            windows,
            batch_size=self.batch_size,
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=self.seed,
            collate=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def training_batches(self, windows: range) -> Iterator[SequenceBatch]:
        """Yield these training windows in order, in batches of the evaluation's size."""
        train, size = self.windows("train"), self.evaluation_batch_size
        for start in windows[::size]:
            span = range(start, min(start + size, windows.stop))
            yield self.collate(train.in_order(span))

    def val_dataloader(self) -> "KeptBatches[SequenceBatch]":
        """Return the validation batches."""
        return KeptBatches(list(self.evaluation_batches("validation")))

    def evaluation_batches(self, split: Split) -> Iterator[SequenceBatch]:
        """Yield the batches of a split in the order of the text."""
        windows = self.windows(split)
        wanted: Sequence[int] = range(len(windows))
        if self.max_evaluation_windows is not None and len(windows) > self.max_evaluation_windows:
            stride = len(windows) / self.max_evaluation_windows
            wanted = [int(i * stride) for i in range(self.max_evaluation_windows)]
        size = self.evaluation_batch_size
        for start in range(0, len(wanted), size):
            yield self.collate(windows.in_order(wanted[start : start + size]))


class KeptBatches(Generic[Batch]):
    """Batches kept in memory, as a loader: Lightning takes a bare list for several loaders."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
