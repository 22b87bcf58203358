"""Whether a model has positions for what it is to write."""

from transformers import PreTrainedModel

from stillhouse.errors import UserError


def check_positions(model: PreTrainedModel, role: str, prompt: int, max_new_tokens: int) -> None:
    """Refuse a text that a model has no positions for.

    Args:
        model: the model.
        role: its role, for messages.
        prompt: tokens of the longest prompt.
        max_new_tokens: tokens that are written behind it at most.

    Raises:
        UserError: naming the model and how many tokens there is room for.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens={max_new_tokens}: with the {prompt} tokens of the longest prompt this "
            f"is more than the {limit} positions of models.{role}; expected at most "
            f"{max(0, limit - prompt)}"
        )
