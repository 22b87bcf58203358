"""The stage that trains a byte-level BPE tokenizer on the training part of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.records import ROLES
from stillhouse.data.documents import Conversation, Document
from stillhouse.errors import UserError
from stillhouse.ranges import Count
from stillhouse.stages.stage import StageContext, StageResult

END_TOKEN = "<|end|>"
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
# As ChatML, save that a header is one token: a small vocabulary would spell out every "assistant".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Learn merges from the training documents and hand on a `transformers` tokenizer folder.

    Every byte has a token, so no text is unknown. One special token ends a document and, standing
    before it, starts the next; a second one pads. For a corpus with conversations, a special token
    for each role opens a turn, the end token closes it, and the tokenizer has a chat template.

    Attributes:
        corpus: node of a function that returns a `Corpus`; only its training part is learnt from.
        vocab_size: tokens in all, the 256 bytes and the special tokens included.
        max_train_documents: learn from the first n documents only; null takes all.
    """

    corpus: dict[str, Any]
    vocab_size: Count
    max_train_documents: Count | None = None

    def __call__(self, context: StageContext) -> StageResult:
        """Train the tokenizer and save it."""
        corpus: Corpus = instantiate(self.corpus)
        documents = corpus.documents("train")[: self.max_train_documents]
        parts = corpus.splits.values()
        has_chats = any(isinstance(d, Conversation) for part in parts for d in part)
        special_tokens = [END_TOKEN, "<|pad|>", *(ROLE_TOKENS if has_chats else ())]
        if self.vocab_size < 256 + len(special_tokens):
            raise UserError(
                f"stages.{context.name}.vocab_size={self.vocab_size}: expected at least "
                f"{256 + len(special_tokens)}, 256 bytes and {len(special_tokens)} special tokens"
            )
        texts = _texts_of(documents)
        if not texts:
            raise UserError(
                f"stages.{context.name}.corpus: the training part of {corpus.name} holds no plain "
                "text; a tokenizer is learnt from texts, so take a corpus of them"
            )
        tokenizer = byte_level_bpe(texts, vocab_size=self.vocab_size, special_tokens=special_tokens)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_TOKEN,
            eos_token=END_TOKEN,
            pad_token="<|pad|>",
            clean_up_tokenization_spaces=False,
        )
        if has_chats:
            fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(context.output)
        tokens = sum(len(e) for e in tokenizer.encode_batch(texts))
        size = sum(len(text.encode()) for text in texts)
        return StageResult(metrics={"vocab_size": len(fast), "bytes_per_token": size / tokens})


def byte_level_bpe(
    documents: Sequence[str], *, vocab_size: Count, special_tokens: Sequence[str]
) -> Tokenizer:
    """Learn merges until there are `vocab_size` tokens, or no pair is left to merge.

    The first tokens are the special ones, in their order, then the 256 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _texts_of(documents: Sequence[Document]) -> list[str]:
    """Return the texts of documents and of conversations' messages."""
    texts: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
        elif isinstance(document, Conversation):
            texts += [message["content"] for message in document.messages]
    return texts
