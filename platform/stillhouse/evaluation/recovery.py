"""What a pruned and repaired language model has kept of the seed, the model that it was cut from.

The recovery report of "Self-Data Distillation for Recovering Quality in Pruned Large Language
Models" (Thangarasa et al., arXiv 2410.09982): recovery = 100 · score / score of the seed.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from stillhouse.data.documents import TokenDocument
from stillhouse.data.language import LanguageData
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.data.windows import batch_of_documents
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluation.exercises import accuracy_by_task, questions_of
from stillhouse.evaluation.language import held_out_quality
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.evaluation.positions import KEY, check_positions
from stillhouse.evaluation.speed import size_and_speed, some_tokens
from stillhouse.ranges import Count
from stillhouse.records.language import SequenceBatch
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.teachers.decoding import sampled
from stillhouse.teachers.sharded_decoding import BatchDecoder, batches_by_length

NAMES = {"test_nll": "seed_text_nll", "kl_to_teacher": "kl_to_seed"}


def recovery(
    models: Mapping[str, str],
    data: LanguageData,
    *,
    reference: str,
    exercises: Exercises,
    exercises_per_task: Count,
    max_new_tokens: Count,
    batch_size: Count,
    seed: int,
    speed_context: Count,
    speed_new_tokens: Count,
    speed_repeats: Count,
    dtype: str,
    attn_implementation: str,
) -> Evaluated:
    """Measure every model on the test exercises, and on what the seed itself answers to them.

    Args:
        models: role -> path of its model.
        data: the labels that were trained on; its tokenizer serves every model.
        reference: role of the seed.
        exercises: the tasks; their test part is asked.
        exercises_per_task: the first so many of every task.
        max_new_tokens: longest answer.
        batch_size: questions a batch.
        seed: of the seed model's own answers, drawn at temperature 1.
        speed_context, speed_new_tokens, speed_repeats: how speed is measured.
        dtype: torch dtype of the weights while evaluating.
        attn_implementation: attention of `transformers`.

    Returns:
        By role: where answers can be checked `accuracy_<task>`, their mean `accuracy`, and
        `recovery` (see `recovered`), left out where the seed can do none of the tasks; `test_nll`,
        nats a token of the labels' held-out answers; on the seed's own answers `seed_text_nll`,
        nats a token, and `kl_to_seed`, `next_token_accuracy`, `top1_agreement` and
        `expected_acceptance` as `held_out_quality`; `flops_per_token` of a prompt; and the numbers
        of `size_and_speed`.

    Raises:
        UserError: for a reference that is no role, and for more tokens than a model has positions.
    """
    _check(models, reference)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = first_of_every_task(exercises.splits["test"], exercises_per_task)
    longest = max(len(q.tokens) for q in questions_of(chosen, data.tokenizer))

    def load(role: str) -> PreTrainedModel:
        model: Any = load_causal_lm(
            models[role], dtype=dtype, attn_implementation=attn_implementation, key=f"models.{role}"
        )
        check_positions(model, role, longest, max_new_tokens)
        check_positions(
            model,
            role,
            speed_context,
            speed_new_tokens,
            key="speed_new_tokens",
            of_the_prompt=f"{KEY}.speed_context",
        )
        return model.to(device).eval()

    def answered_rightly(model: PreTrainedModel, asked: Sequence[Exercise]) -> dict[str, float]:
        """Return the accuracy of every task and their mean; nothing where none can be checked."""
        if all(exercise.check is None for exercise in asked):
            return {}
        shares = dict(
            accuracy_by_task(
                model, data.tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
        )
        del shares["accuracy"]
        return {"accuracy": sum(shares.values()) / len(shares), **shares}

    seed_model = load(reference)
    own_answers = list(
        answers_of_the_seed(
            seed_model,
            data,
            chosen,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )
    )
    labels = [batch.to(device) for batch in data.evaluation_batches("test")]
    numbers: dict[str, dict[str, float | int]] = {}
    for role in [reference, *(r for r in models if r != reference)]:
        model = seed_model if role == reference else load(role)
        by_task = answered_rightly(model, chosen)
        quality = held_out_quality(model, seed_model, own_answers, text_bytes=None)
        held_out = held_out_quality(model, None, labels, text_bytes=None)
        numbers[role] = {
            **by_task,
            "test_nll": held_out["test_nll"],
            **{NAMES.get(name, name): value for name, value in quality.items()},
            "flops_per_token": flops_per_token(model, speed_context),
            **size_and_speed(
                model, context=speed_context, new_tokens=speed_new_tokens, repeats=speed_repeats
            ),
        }
        kept = recovered(by_task, {name: numbers[reference][name] for name in by_task})
        numbers[role] |= {} if kept is None else {"recovery": kept}
        del model
        gc.collect()
    return Evaluated(models={role: numbers[role] for role in models})


def recovered(ours: Mapping[str, float], seeds: Mapping[str, float]) -> float | None:
    """Return the mean over tasks of 100 · accuracy / accuracy of the seed.

    A task of which the seed answers nothing rightly has no recovery and is left out; None where
    that leaves no task.

    Args:
        ours: `accuracy_<task>` of a model; other names do not count.
        seeds: the same of the seed.
    """
    known = [name for name in seeds if name.startswith("accuracy_") and seeds[name] > 0]
    return sum(100 * ours[name] / seeds[name] for name in known) / len(known) if known else None


def first_of_every_task(exercises: Sequence[Exercise], number: int) -> list[Exercise]:
    """Return the first exercises of every task, in their order."""
    taken: dict[str, int] = {}
    chosen: list[Exercise] = []
    for exercise in exercises:
        if taken.get(exercise.task, 0) < number:
            taken[exercise.task] = taken.get(exercise.task, 0) + 1
            chosen.append(exercise)
    return chosen


def answers_of_the_seed(
    model: PreTrainedModel,
    data: LanguageData,
    exercises: Sequence[Exercise],
    *,
    max_new_tokens: Count,
    batch_size: Count,
    seed: int,
) -> Iterator[SequenceBatch]:
    """Yield what the seed answers, drawn from its own distribution; only the answers count.

    Args:
        model: the seed, in eval mode.
        data: its tokenizer is the seed's.
        exercises: what is asked.
        max_new_tokens: longest answer.
        batch_size: questions a batch.
        seed: of the draws.
    """
    questions = questions_of(exercises, data.tokenizer)
    decode = partial(sampled, max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0)
    decoder = BatchDecoder(model, decode, data.end_token, data.pad_token)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for indices in batches_by_length(questions, batch_size):
            batch = [questions[i] for i in indices]
            documents = [
                TokenDocument(
                    [*question.tokens, *answer],
                    [False] * len(question.tokens) + [True] * len(answer),
                    follows_end=False,
                )
                for question, answer in zip(batch, decoder(batch), strict=True)
            ]
            yield batch_of_documents(
                documents, end_token=data.end_token, pad_token=data.pad_token
            ).to(model.device)


@torch.no_grad()
def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Return the floating-point operations of a prompt's forward pass, by torch's own count.

    Args:
        model: the model.
        context: tokens of the prompt; the mean over them is returned, the head at each of them, and
            of attention all N x N products.
    """
    prompt = some_tokens(model, context)
    # The counter does not know a CPU's fused attention; its plain products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(prompt, use_cache=False)
    return counter.get_total_flops() / context


def _check(models: Mapping[str, str], reference: str) -> None:
    if reference not in models:
        raise UserError(
            f"{KEY}.reference={reference}: there is no such model; expected "
            f"{', '.join(models)}{did_you_mean(reference, models)}"
        )
