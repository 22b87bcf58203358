"""Continuations of fixed prompts, to read what numbers do not say."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Return one sampled continuation of every prompt, the prompt itself left out.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        prompts: texts to go on from.
        max_new_tokens: length of a continuation; it may end earlier at the end token.
        temperature: 0 takes the likeliest token.
        seed: of the draws, the same for every model, so that differences are the models'.
    """
    generator: Any = model
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"].to(model.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            output = generator.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature if temperature > 0 else None,
                top_k=0 if temperature > 0 else None,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
