"""The stage `rewrite`: a model rewrites the answers of exercises, each reference in its view.

The targets of "Self-Data Distillation for Recovering Quality in Pruned Large Language Models"
(Thangarasa, Venkatesh, Lasby, Sinnadurai, Lie, arXiv 2410.09982):

    ŷ ~ p(. | c, x, y),   target = ŷ if it is accepted, else y
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerBase

from stillhouse.data.conversations import conversation_as_tokens
from stillhouse.data.corpora.generated import PROVENANCE
from stillhouse.data.tasks.accepting import REASONS, TOO_LONG, Written, reason_against
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.data.tasks.questions import end_and_pad, question_tokens
from stillhouse.data.tasks.rewriting import asked_to_rewrite, check_prompt
from stillhouse.data.vocabulary import load_tokenizer, tokenizer_identity
from stillhouse.errors import UserError
from stillhouse.evaluation.exercises import nll_of_answers
from stillhouse.files import write_json
from stillhouse.ranges import Count
from stillhouse.stages.artifacts import Number
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.teachers.decoding import Tokens
from stillhouse.teachers.sharded_decoding import BatchDecoder, decode_in_shards
from stillhouse.teachers.signals import model_provenance
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True)
class Request:
    """An exercise as the model sees it.

    Attributes:
        exercise: with its label.
        tokens: what the model is given: the template, filled, and the opening.
        reference: the label.
    """

    exercise: Exercise
    tokens: Tokens
    reference: Tokens


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Write an Arrow data set of training exercises with the answers to learn, and its provenance.

    Where an answer is not accepted, the label is the target, unchanged; no exercise is dropped,
    which would leave the easy ones. `data.tasks.accepting` says what is accepted and
    `teachers.sharded_decoding` how a killed stage goes on.

    Attributes:
        path: the model, a folder or an id of the hub; its tokenizer has a chat template.
        dtype, attn_implementation: as in `teachers.live.live_teacher`.
        exercises: node of a function that returns `Exercises`.
        prompt: template of the question, with `{instruction}` and `{reference}`.
        system: what the system says before, in front of an exercise's own context; null adds
            nothing.
        opening: beginning of every answer that the model goes on from; may be empty.
        decoding: how answers are drawn, partial, called with (model, prompts).
        forbidden: phrases that no accepted answer holds, in any case.
        forbidden_start: what no accepted answer begins with, in any case, behind the opening too.
        max_exercises: rewrite so many, spread evenly; null takes all.
        batch_size: prompts a batch.
        seed: of the draws.
    """

    path: str
    exercises: dict[str, Any]
    prompt: str
    system: str | None
    opening: str
    decoding: dict[str, Any]
    forbidden: Sequence[str]
    forbidden_start: str
    max_exercises: Count | None
    batch_size: Count
    seed: int
    dtype: str
    attn_implementation: str

    def __call__(self, context: StageContext) -> StageResult:
        """Generate the batches that are missing, then write the data set."""
        key = f"stages.{context.name}"
        self._check(key)
        exercises: Exercises = instantiate(self.exercises)
        tokenizer = load_tokenizer(self.path, key=f"{key}.path")
        end_token, pad_token = end_and_pad(tokenizer, place=f"{key}.path={self.path}")
        requests = self._requests(exercises, tokenizer, f"{key}.path={self.path}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_causal_lm(
            self.path, dtype=self.dtype, attn_implementation=self.attn_implementation, key=key
        )
        model = model.to(device).eval()
        decode = instantiate(self.decoding)
        fits = [self._fits(r, model) for r in requests]
        fitting = [r for r, it_fits in zip(requests, fits, strict=True) if it_fits]
        with WorkProgress(context.name, len(fitting), "exercises", context.console) as progress:
            continuations, rate = decode_in_shards(
                BatchDecoder(model, decode, end_token, pad_token),
                fitting,
                batch_size=self.batch_size,
                seed=self.seed,
                folder=context.scratch / "shards",
                progress=progress,
            )
        reader = _Reader(tokenizer, self.opening)
        found = iter(continuations)
        rows = [
            self._row(r.exercise, reader(next(found)) if it_fits else None)
            for r, it_fits in zip(requests, fits, strict=True)
        ]
        self._write(context.output, rows, exercises, tokenizer)
        counts = _counts(rows)
        gap = self._gap([r.exercise for r in requests], rows, model, tokenizer)
        context.console.print(f"{context.name}: {_say(counts)}")
        if gap:
            context.console.print(
                f"{context.name}: accepted answers {gap['accepted_nll']:.3f} nats a token, their "
                f"labels {gap['replaced_nll']:.3f}"
            )
        for remark in _remarks(counts, gap, key):
            context.console.print(f"[yellow]warning:[/yellow] {context.name}: {remark}")
        tokens = sum(map(len, continuations))
        return StageResult(
            metrics={**counts, **gap, "generated_tokens": tokens, "tokens_per_s": rate}
        )

    def _check(self, key: str) -> None:
        check_prompt(self.prompt, key=f"{key}.prompt")
        if not all(self.forbidden):
            raise UserError(
                f"{key}.forbidden={list(self.forbidden)}: an empty phrase stands in every answer; "
                "drop it"
            )

    def _requests(
        self, exercises: Exercises, tokenizer: PreTrainedTokenizerBase, place: str
    ) -> list[Request]:
        """Return what the model is asked, in the order of the exercises."""
        train = exercises.splits["train"]
        wanted = min(self.max_exercises or len(train), len(train))
        chosen = [train[i * len(train) // wanted] for i in range(wanted)]
        labels: Any = tokenizer([e.answer for e in chosen], add_special_tokens=False, verbose=False)
        return [
            Request(
                exercise,
                question_tokens(
                    asked_to_rewrite(exercise, self.prompt, self.system).question(),
                    tokenizer,
                    opening=self.opening,
                    place=f"{place}, {exercise.place}",
                ),
                label,
            )
            for exercise, label in zip(chosen, labels["input_ids"], strict=True)
        ]

    def _fits(self, request: Request, model: Any) -> bool:
        """Whether the model has positions for a prompt and its answer."""
        limit = getattr(model.config, "max_position_embeddings", None)
        needed = len(request.tokens) + self.decoding.get("max_new_tokens", 0)
        return limit is None or needed <= limit

    def _row(self, exercise: Exercise, written: Written | None) -> dict[str, Any]:
        if written is None:
            reason, generated = TOO_LONG, None
        else:
            generated = written.text
            reason = reason_against(
                written,
                exercise,
                forbidden=self.forbidden,
                forbidden_start=self.forbidden_start,
            )
        return {
            "task": exercise.task,
            "instruction": exercise.instruction,
            "context": exercise.context,
            "reference": exercise.answer,
            "generated": generated,
            "target": generated if reason is None else exercise.answer,
            "accepted": reason is None,
            "reason": reason,
        }

    def _gap(
        self,
        exercises: Sequence[Exercise],
        rows: Sequence[dict[str, Any]],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Number]:
        """Return how likely accepted answers are to the model, and the labels that they replace.

        Nats a token as they are learnt: asked normally, the reference out of view. Answers that
        are no likelier than the labels tell of a prompt that the model does not understand. A pair
        with one that is longer than the model's positions is left out.
        """
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        columns = {"accepted_nll": "target", "replaced_nll": "reference"}
        pairs = [
            [exercise.answered(row[column]) for column in columns.values()]
            for exercise, row in zip(exercises, rows, strict=True)
            if row["accepted"]
        ]
        fitting = [
            pair
            for pair in pairs
            if all(len(conversation_as_tokens(one, tokenizer).tokens) <= limit for one in pair)
        ]
        return {
            name: nll_of_answers(model, tokenizer, answers, batch_size=self.batch_size)
            for name, answers in zip(columns, zip(*fitting, strict=True), strict=False)
        }

    def _write(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        exercises: Exercises,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        from datasets import Dataset, Features, Value, disable_progress_bars

        disable_progress_bars()
        # Said, not inferred: a column that is null everywhere has no type of its own.
        kinds = {name: Value("bool" if name == "accepted" else "string") for name in rows[0]}
        Dataset.from_list(rows, features=Features(kinds)).save_to_disk(folder)
        provenance = {
            **model_provenance(self.path),
            "tokenizer_sha256": tokenizer_identity(tokenizer),
            "exercises": exercises.name,
            "exercises_sha256": exercises.identity("train"),
            "max_exercises": self.max_exercises,
            "prompt": self.prompt,
            "system": self.system,
            "opening": self.opening,
            "decoding": self.decoding,
            "forbidden": list(self.forbidden),
            "forbidden_start": self.forbidden_start,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        write_json(folder / PROVENANCE, provenance)


class _Reader:
    """Reads continuations as text; nothing is cleaned away, since a student learns it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, opening: str) -> None:
        self.tokenizer, self.opening = tokenizer, opening
        self._before: Tokens = tokenizer(opening, add_special_tokens=False)["input_ids"]
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def __call__(self, tokens: Tokens) -> Written:
        """Return what a model wrote."""
        ended = bool(tokens) and tokens[-1] == self.tokenizer.eos_token_id
        body = tokens[:-1] if ended else tokens
        # Some decoders drop the space that a text begins with: behind an opening there is one.
        text = self._text([*self._before, *body])[len(self._text(self._before)) :]
        strange = not self.special.isdisjoint(body)
        return Written(self.opening, text, ended, has_special_token=strange)

    def _text(self, tokens: Tokens) -> str:
        text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Number]:
    """Return how many answers were accepted, and for what reasons labels were kept."""
    reasons = Counter(row["reason"] for row in rows if not row["accepted"])
    accepted = len(rows) - reasons.total()
    kept = {f"kept_label_{reason}": reasons[reason] for reason in REASONS}
    return {
        "exercises": len(rows),
        "accepted": accepted,
        "accepted_fraction": accepted / len(rows),
        **kept,
    }


def _remarks(counts: dict[str, Number], gap: dict[str, Number], key: str) -> list[str]:
    """Return what the user should read before training on the answers."""
    if not counts["accepted"]:
        return [
            "no answer was accepted, so all targets are labels, and to learn them is SFT; the "
            f"reasons stand above; change {key}.prompt or decoding, or take a stronger model"
        ]
    if gap and gap["accepted_nll"] > gap["replaced_nll"]:
        return [
            "the model's own answers are less likely to it than the labels that they replace; it "
            f"may not understand what it is asked; change {key}.prompt"
        ]
    return []


def _say(counts: dict[str, Number]) -> str:
    kept = {n.removeprefix("kept_label_"): c for n, c in counts.items() if n.startswith("kept_")}
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.items() if count) or "none"
    return f"{counts['accepted']} of {counts['exercises']} accepted; labels kept: {reasons}"
