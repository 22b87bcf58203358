"""The question by which a model is asked to rewrite an answer: instruction and reference in view.

Section 3 of "Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning" (Yang et
al., arXiv 2402.13669).
"""

from dataclasses import replace
from string import Formatter

from stillhouse.data.tasks.exercises import Exercise
from stillhouse.errors import UserError

FIELDS = ("instruction", "reference")


def check_prompt(prompt: str, *, key: str) -> None:
    """Refuse a template that does not show instruction and reference, or asks for more.

    Raises:
        UserError: naming the key and the field.
    """
    subject = f"{key}={prompt!r}"
    wanted = "expected {instruction} and {reference}, where an exercise's texts go"
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise UserError(f"{subject}: {error}; {wanted}; write other braces twice") from error
    for name in FIELDS:
        if name not in fields:
            raise UserError(f"{subject}: the template has no {{{name}}}; {wanted}")
    if unknown := sorted(fields - set(FIELDS)):
        raise UserError(
            f"{subject}: the template asks for {{{unknown[0]}}}; {wanted}; write other braces twice"
        )


def asked_to_rewrite(exercise: Exercise, prompt: str) -> Exercise:
    """Return an exercise whose instruction is the template, filled with the exercise's texts."""
    instruction = prompt.format(instruction=exercise.instruction, reference=exercise.answer)
    return replace(exercise, instruction=instruction)
