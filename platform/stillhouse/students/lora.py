"""Students that learn low-rank adapters: LoRA through `peft`, merged into plain weights at export.

Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Share
from stillhouse.students.causal_lm import pretrained


def lora(
    data: LanguageData,
    *,
    path: str,
    rank: Count,
    alpha: Count,
    dropout: Share,
    target_modules: str | Sequence[str],
    dtype: str,
    attn_implementation: str,
) -> PeftModel:
    """Load a causal language model and freeze all of it but low-rank adapters W + (α/r) B A.

    Args:
        data: its tokenizer must be the model's own.
        path: model folder, or an id of the hub.
        rank: r.
        alpha: α.
        dropout: probability at the adapters' input.
        target_modules: names of the linear layers that get an adapter; `all-linear` means all but
            the head.
        dtype: torch dtype of the frozen weights; the adapters are float32.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: as `students.causal_lm.pretrained`, for names that no layer has, and for the
            head, or embeddings that are the head as well.
    """
    model = pretrained(data, path=path, dtype=dtype, attn_implementation=attn_implementation)
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft's own use of transformers, and what it does about GPT-2's transposed layers.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            # Refused below.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        head = model.get_output_embeddings()
        linear = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if _is_linear(module) and module is not head
            }
        )
        raise UserError(
            f"student.target_modules={target_modules}: the model has no such layers; it has "
            f"{', '.join(linear)}; all-linear takes all of them"
        ) from error
    _check_head(adapted, target_modules)
    return adapted


def _check_head(adapted: PeftModel, target_modules: str | Sequence[str]) -> None:
    """Refuse adapters of the head: losses read its weight, where an adapter is not seen."""
    model: Any = adapted.get_base_model()
    tied = model.config.get_text_config().tie_word_embeddings
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        reason = "the head gets no adapter"
    elif tied and isinstance(model.get_input_embeddings(), BaseTunerLayer):
        reason = "the embeddings are the head as well (tie_word_embeddings), which gets no adapter"
    else:
        return
    raise UserError(
        f"student.target_modules={target_modules}: {reason}; leave it out, or take all-linear, "
        "which is all linear layers but the head"
    )


def _is_linear(module: Any) -> bool:
    return type(module).__name__ == "Linear"
