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


def asked_to_rewrite(exercise: Exercise, prompt: str, system: str | None = None) -> Exercise:
    """Return an exercise whose instruction is the template, filled with the exercise's texts.

    Args:
        exercise: with its label.
        prompt: the template.
        system: what the system says, before the exercise's own context; None adds nothing.
    """
    instruction = prompt.format(instruction=exercise.instruction, reference=exercise.answer)
    context = exercise.context
    if system is not None:
        context = system if context is None else f"{system}\n\n{context}"
    return replace(exercise, instruction=instruction, context=context)
