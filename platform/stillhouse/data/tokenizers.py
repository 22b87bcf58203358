"""The stage that trains a byte-level BPE tokenizer on the training part of a corpus."""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.errors import UserError
from stillhouse.stages.stage import StageContext, StageResult

END_TOKEN = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Learn merges from the training documents and hand on a `transformers` tokenizer folder.

    Every byte has a token, so no text is unknown. One special token ends a document and, standing
    before it, starts the next; a second one pads.

    Attributes:
        corpus: node of a function that returns a `Corpus`; only its training part is read.
        vocab_size: tokens in all, the 256 bytes and the special tokens included.
    """

    corpus: dict[str, Any]
    vocab_size: int

    def __call__(self, context: StageContext) -> StageResult:
        """Train the tokenizer and save it."""
        if self.vocab_size < 258:
            raise UserError(
                f"stages.{context.name}.vocab_size={self.vocab_size}: expected at least 258, "
                "256 bytes and two special tokens"
            )
        corpus: Corpus = instantiate(self.corpus)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_TOKEN, "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        documents = corpus.documents("train")
        tokenizer.train_from_iterator(documents, trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_TOKEN,
            eos_token=END_TOKEN,
            pad_token="<|pad|>",
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(context.output)
        tokens = sum(len(e) for e in tokenizer.encode_batch(documents))
        size = sum(len(document.encode()) for document in documents)
        return StageResult(metrics={"vocab_size": len(fast), "bytes_per_token": size / tokens})
