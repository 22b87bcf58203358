"""How many exercises a language model answers rightly, and how likely given answers are to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.conversations import conversation_as_tokens
from stillhouse.data.documents import Conversation
from stillhouse.data.tasks.exercises import Exercise
from stillhouse.data.tasks.questions import end_and_pad, question_tokens
from stillhouse.data.windows import batch_of_documents
from stillhouse.errors import UserError
from stillhouse.evaluation.language import held_out_quality
from stillhouse.teachers.decoding import Tokens, greedy
from stillhouse.teachers.sharded_decoding import BatchDecoder, batches_by_length


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        tokens: the question, up to where its answer begins.
        reference: empty, since no way of decoding is to see the label.
    """

    tokens: Tokens
    reference: Tokens


def accuracy_by_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exercises: Sequence[Exercise],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Mapping[str, float]:
    """Let a model answer greedily and check its answers.

    An answer that hits the limit is judged by what stands in it. Open-ended exercises are left out.

    Args:
        model: the model, in eval mode.
        tokenizer: its own, with a chat template.
        exercises: what is asked.
        max_new_tokens: longest answer.
        batch_size: questions a batch.

    Returns:
        `accuracy`, the share of all exercises that is answered rightly, and `accuracy_<task>`.

    Raises:
        UserError: when nothing can be checked, or the tokenizer cannot ask.
    """
    checked = [(e, e.check) for e in exercises if e.check is not None]
    if not checked:
        raise UserError(
            f"data.corpus.exercises: none of {len(exercises)} exercises has an answer that can be "
            "checked; expected some to measure an accuracy"
        )
    end_token, pad_token = end_and_pad(tokenizer, place="evaluation")
    questions = questions_of([exercise for exercise, _ in checked], tokenizer)
    decode = partial(greedy, max_new_tokens=max_new_tokens)
    decoder = BatchDecoder(model, decode, end_token, pad_token)
    right: dict[str, list[bool]] = {}
    for indices in batches_by_length(questions, batch_size):
        answers = decoder([questions[i] for i in indices])
        for i, tokens in zip(indices, answers, strict=True):
            exercise, check = checked[i]
            text = tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            right.setdefault(exercise.task, []).append(check(str(text)))
    means = {f"accuracy_{task}": sum(r) / len(r) for task, r in sorted(right.items())}
    return {"accuracy": sum(map(sum, right.values())) / len(checked), **means}


def questions_of(
    exercises: Sequence[Exercise], tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """Return exercises as a model is asked them, in their order."""
    return [
        Question(question_tokens(e.question(), tokenizer, opening="", place=e.place), [])
        for e in exercises
    ]


def nll_of_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[Conversation],
    *,
    batch_size: int,
) -> float:
    """Return the nats a token of given answers, their end tokens included.

    Args:
        model: the model, in eval mode.
        tokenizer: its own, with a chat template.
        answered: questions with an answer; one at least.
        batch_size: answers a batch.
    """
    end_token, pad_token = end_and_pad(tokenizer, place="evaluation")
    documents = sorted(
        (conversation_as_tokens(conversation, tokenizer) for conversation in answered),
        key=lambda document: len(document.tokens),
    )
    batches = (
        batch_of_documents(
            documents[start : start + batch_size], end_token=end_token, pad_token=pad_token
        ).to(model.device)
        for start in range(0, len(documents), batch_size)
    )
    return held_out_quality(model, None, batches, text_bytes=None)["test_nll"]
