"""Whether a model has positions for what it is to write."""

from transformers import PreTrainedModel

from stillhouse.errors import UserError

# Where the values of an evaluator stand.
KEY = "stages.<stage>.evaluator"


def check_positions(
    model: PreTrainedModel,
    role: str,
    prompt: int,
    new_tokens: int,
    *,
    key: str = "max_new_tokens",
    of_the_prompt: str = "the longest prompt",
) -> None:
    """Refuse a text that a model has no positions for.

    Args:
        model: the model.
        role: its role, for messages.
        prompt: tokens of the longest prompt.
        new_tokens: tokens that are written behind it at most.
        key: of the evaluator that says how many, for messages.
        of_the_prompt: what says how long it is, for messages.

    Raises:
        UserError: naming the model and how many tokens there is room for.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + new_tokens > limit:
        raise UserError(
            f"{KEY}.{key}={new_tokens}: with the {prompt} tokens of {of_the_prompt} this "
            f"is more than the {limit} positions of models.{role}; expected at most "
            f"{max(0, limit - prompt)}"
        )
