"""Students that learn low-rank adapters: LoRA through `peft`, merged into plain weights at export.

Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.students.causal_lm import pretrained


def lora(
    data: LanguageData,
    *,
    path: str,
    rank: int,
    alpha: int,
    dropout: float,
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
        UserError: as `students.causal_lm.pretrained`, for a rank below 1, and for names that no
            layer has.
    """
    if rank < 1:
        raise UserError(f"student.rank={rank}: expected 1 or more")
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
            # peft's own use of transformers.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)})
        raise UserError(
            f"student.target_modules={target_modules}: the model has no such layers; it has "
            f"{', '.join(linear)}; all-linear takes all of them but the head"
        ) from error
    return adapted


def _is_linear(module: Any) -> bool:
    return type(module).__name__ == "Linear"
