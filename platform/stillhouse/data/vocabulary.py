"""Whether a model and the data speak of the same tokens."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stillhouse.errors import UserError


def check_same_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, *, key: str) -> None:
    """Compare the tokenizer in a model's folder with the one that made the data.

    Args:
        path: folder or hub id of a model with its tokenizer.
        tokenizer: the data's.
        key: where the path stands in the config, for the message.

    Raises:
        UserError: when there is no tokenizer, or its vocabulary differs from the data's.
    """
    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}.path={path}: its tokenizer cannot be loaded: {reason}") from error
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = [t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t)]
    raise UserError(
        f"{key}.path={path}: its tokenizer has {len(theirs)} tokens, the data's {len(ours)}, and "
        f"{len(differing)} of them differ (the first: {differing[0]!r}); this family compares "
        "distributions over one vocabulary, so teacher, student and data need one tokenizer: set "
        f"data.tokenizer_path={path}; student=llama is made for any"
    )
