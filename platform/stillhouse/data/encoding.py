"""From documents of any kind to tokens, with a mask of what is learnt."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from stillhouse.data.conversations import conversation_as_tokens
from stillhouse.data.documents import Conversation, Document, TokenDocument


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, end_token: int
) -> list[TokenDocument]:
    """Return documents as tokens, in their order; texts are tokenised together, which is faster."""
    texts = [d for d in documents if isinstance(d, str)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    rows = iter(ids)
    return [_as_tokens(d, tokenizer, end_token, rows) for d in documents]


def text_as_tokens(tokens: Sequence[int], end_token: int) -> TokenDocument:
    """Close a text with the end token; all of it is learnt."""
    return TokenDocument([*tokens, end_token], [True] * (len(tokens) + 1), follows_end=True)


def _as_tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    end_token: int,
    texts: Iterator[Sequence[int]],
) -> TokenDocument:
    if isinstance(document, TokenDocument):
        return document
    if isinstance(document, Conversation):
        return conversation_as_tokens(document, tokenizer)
    return text_as_tokens(next(texts), end_token)
