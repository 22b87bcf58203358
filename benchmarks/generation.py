"""Answers decoded in batches sorted by length against `model.generate` called prompt by prompt.

    python benchmarks/generation.py run=<directory> [role=seed] [exercises=64] [batch_size=32]
        [max_new_tokens=64] [turns=3]

Reads a finished run of a recipe with exercises, such as `self_data`. Both sides answer the same
test exercises greedily, by turns in one process; printed are tokens a second of each, the ratio,
median and range over the turns, and how many answers are the same tokens.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stillhouse.data.language import LanguageData
from stillhouse.data.tasks.exercises import Exercises
from stillhouse.evaluation.exercises import Question, questions_of
from stillhouse.jobs.finished_run import read_run
from stillhouse.stages.runner import quiet_libraries
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.teachers.decoding import Tokens, greedy
from stillhouse.teachers.sharded_decoding import BatchDecoder, batches_by_length


def in_batches(
    decoder: BatchDecoder, questions: Sequence[Question], batch_size: int
) -> list[Tokens]:
    """Return an answer to every question, decoded as the stages do."""
    answers: list[Tokens] = [[] for _ in questions]
    for indices in batches_by_length(questions, batch_size):
        for i, answer in zip(indices, decoder([questions[i] for i in indices]), strict=True):
            answers[i] = answer
    return answers


@torch.no_grad()
def one_by_one(
    model: Any, questions: Sequence[Question], data: LanguageData, max_new_tokens: int
) -> list[Tokens]:
    """Return an answer to every question, each by a call of the library alone."""
    answers = []
    for question in questions:
        ids = torch.tensor([question.tokens])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=data.end_token,
            pad_token_id=data.pad_token,
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def timed(work: Callable[[], list[Tokens]]) -> tuple[list[Tokens], float]:
    """Return what a work gives, and its tokens a second."""
    began = time.perf_counter()
    answers = work()
    return answers, sum(map(len, answers)) / (time.perf_counter() - began)


def main() -> None:
    """Print a table."""
    quiet_libraries()
    settings = {"role": "seed", "exercises": "64", "batch_size": "32", "max_new_tokens": "64"}
    settings |= {"turns": "3"} | dict(a.split("=", 1) for a in sys.argv[1:])
    run = read_run(OmegaConf.create({"run": str(Path(settings["run"]))}))
    data: LanguageData = instantiate(run.located(run.config["data"]), _recursive_=False)(0)
    evaluation = run.located(run.config["evaluation"])
    exercises: Exercises = instantiate(evaluation["exercises"])
    test, wanted = exercises.splits["test"], int(settings["exercises"])
    asked = [test[i * len(test) // wanted] for i in range(min(wanted, len(test)))]
    path = run.model(settings["role"])
    model: Any = load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="run")
    model.eval()
    questions = questions_of(asked, data.tokenizer)
    limit = int(settings["max_new_tokens"])
    decoder = BatchDecoder(
        model, partial(greedy, max_new_tokens=limit), data.end_token, data.pad_token
    )
    ratios = []
    print("| turn | in batches, tokens/s | one by one, tokens/s | ratio | same answers |")
    print("|---|---:|---:|---:|---:|")
    for turn in range(int(settings["turns"])):
        ours, fast = timed(lambda: in_batches(decoder, questions, int(settings["batch_size"])))
        theirs, slow = timed(lambda: one_by_one(model, questions, data, limit))
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        ratios.append(fast / slow)
        print(
            f"| {turn} | {fast:.0f} | {slow:.0f} | {fast / slow:.2f} | {same} of {len(asked)} |",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"\nmedian {median:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
