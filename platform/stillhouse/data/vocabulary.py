"""Whether a model and the data speak of the same tokens."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stillhouse.errors import UserError
from stillhouse.files import hash_json

ONE_VOCABULARY = (
    "this family compares distributions over one vocabulary, so teacher, student and data need one "
    "tokenizer: take a teacher and a student of one family (teacher=hf teacher.path=…, which the "
    "data follow); student=llama is made for any"
)


def check_same_tokenizer(
    path: str, tokenizer: PreTrainedTokenizerBase, *, key: str, way_out: str = ONE_VOCABULARY
) -> None:
    """Compare the tokenizer in a model's folder with the one that made the data.

    Args:
        path: folder or hub id of a model with its tokenizer.
        tokenizer: the data's.
        key: where the path stands in the config, for the message.
        way_out: why the two must be one, and what mends it, for the message.

    Raises:
        UserError: when there is no tokenizer, or its vocabulary differs from the data's.
    """
    other = load_tokenizer(path, key=f"{key}.path")
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = [t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t)]
    raise UserError(
        f"{key}.path={path}: its tokenizer has {len(theirs)} tokens, the data's {len(ours)}, and "
        f"{len(differing)} of them differ (the first: {differing[0]!r}); {way_out}"
    )


def load_tokenizer(
    path: str, *, key: str, subfolder: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, of a folder or an id of the hub, or of a subfolder of either.

    Raises:
        UserError: when there is none that can be read; `key` is named.
    """
    try:
        return AutoTokenizer.from_pretrained(path, subfolder=subfolder or "", revision=revision)
    except Exception as error:  # the libraries below raise whatever a broken file makes them
        raise UserError(f"{key}={path}: no tokenizer can be loaded: {one_line(error)}") from error


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of a vocabulary: equal for tokenizers that speak of the same tokens."""
    return hash_json(tokenizer.get_vocab())


def one_line(error: Exception) -> str:
    """Return the beginning of an error's text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
