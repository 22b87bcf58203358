"""The stage that trains an encoder's WordPiece tokenizer on the training part of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from tokenizers import Tokenizer, models, trainers
from transformers import BertTokenizer

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.labelled.task import LabelledText
from stillhouse.errors import UserError
from stillhouse.ranges import Count
from stillhouse.stages.stage import StageContext, StageResult

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class TrainEncoderTokenizer:
    """Learn pieces of words from the training texts and hand on BERT's tokenizer, as a folder.

    A text is read as `[CLS] text [SEP]`, a pair as `[CLS] text [SEP] pair [SEP]` with the type 1 in
    its second part. Every character of the training texts has a token, so that none of their words
    is unknown, save one of more than 100 characters. Of labelled text, all training texts are
    learnt from, however many labels a fit is to see.

    Attributes:
        corpus: node of a function that returns a `Corpus` or a `LabelledText`; only its training
            part is learnt from.
        vocab_size: most tokens in all, the special ones included; fewer where the texts have no
            more pieces.
        lowercase: whether capitals are read as small letters and accents are left out.
        model_max_length: positions of the encoders that it is for; no row may be longer.
    """

    corpus: dict[str, Any]
    vocab_size: Count
    lowercase: bool = True
    model_max_length: Count = 512

    def __call__(self, context: StageContext) -> StageResult:
        """Train the tokenizer and save it."""
        corpus: Corpus | LabelledText = instantiate(self.corpus)
        texts = _training_texts(corpus)
        alphabet = _alphabet(texts, lowercase=self.lowercase)
        if not alphabet:
            raise UserError(
                f"stages.{context.name}.corpus: the training part of {corpus.name} holds no plain "
                "text; a tokenizer is learnt from texts, so take a corpus of them"
            )
        fewest = len(SPECIAL_TOKENS) + len(alphabet)
        if self.vocab_size < fewest:
            raise UserError(
                f"stages.{context.name}.vocab_size={self.vocab_size}: expected at least {fewest}, "
                f"{len(SPECIAL_TOKENS)} special tokens, and {len(alphabet)} for the characters of "
                "the texts, at the beginning of a word and within one"
            )
        tokenizer = BertTokenizer(
            vocab=_word_pieces(texts, alphabet, self.vocab_size, lowercase=self.lowercase),
            do_lower_case=self.lowercase,
            model_max_length=self.model_max_length,
            padding_side="right",
            truncation_side="right",
        )
        tokenizer.save_pretrained(context.output)
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        size = sum(len(text.encode()) for text in texts)
        return StageResult(
            metrics={
                "vocab_size": len(tokenizer),
                "bytes_per_token": size / sum(len(ids) for ids in encoded),
            }
        )


def _training_texts(corpus: Corpus | LabelledText) -> list[str]:
    """Return the plain texts that are trained on, both of a pair."""
    if isinstance(corpus, LabelledText):
        pairs = [(e.text, e.pair) for e in corpus.splits["train"]]
        return [text for pair in pairs for text in pair if text is not None]
    return [document for document in corpus.documents("train") if isinstance(document, str)]


def _word_pieces(
    texts: Sequence[str], alphabet: Sequence[str], vocab_size: int, *, lowercase: bool
) -> dict[str, int]:
    """Return tokens and their ids: the special ones, the alphabet, and merges by frequency."""
    tokenizer = _tokenizer(lowercase=lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The library numbers the alphabet as a hash map yields it, anew in every process, and the
        # numbers decide between merges that are equally frequent. Tokens given here keep their
        # order.
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def _alphabet(texts: Sequence[str], *, lowercase: bool) -> list[str]:
    """Return the characters of words, and `##` with those that stand within one, sorted."""
    reader = _tokenizer(lowercase=lowercase)
    words = {
        word
        for text in texts
        for word, _ in reader.pre_tokenizer.pre_tokenize_str(reader.normalizer.normalize_str(text))
    }
    return [
        *sorted({c for w in words for c in w}),
        *sorted({f"##{c}" for w in words for c in w[1:]}),
    ]


def _tokenizer(*, lowercase: bool) -> Tokenizer:
    """Return a tokenizer without a vocabulary that cuts texts into words as BERT's does."""
    berts = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = berts.normalizer, berts.pre_tokenizer
    return tokenizer
