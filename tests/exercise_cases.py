"""A tiny chat model, exercises, and a decoder that writes what a test has it write."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from chats import CHATML, END, chat_tokenizer
from transformers import AutoTokenizer

from stillhouse.data.tasks.checking import says_integer
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.stages.rewrite import Rewrite

PROMPT = "{instruction} as {reference}"
FORBIDDEN = ["reference answer", "my response"]
GREEDY = {
    "_target_": "stillhouse.teachers.decoding.greedy",
    "_partial_": True,
    "max_new_tokens": 6,
}


def save_chat_model(folder: Path, make: Callable[..., Any], **changes: Any) -> Path:
    """Save a random Llama with a tokenizer of bytes and a chat template."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": len(tokenizer), "initializer_range": 0.5, **changes}
    make(**shape).float().save_pretrained(folder)
    return folder


def sums(*, count: int, context: str | None = None) -> Exercises:
    """Return sums n + 1 with labels of different lengths; every third is open-ended."""

    def exercise(n: int) -> Exercise:
        answer = "so " * (n % 5) + f"{n}+1={n + 1}"
        check = partial(says_integer, expected=n + 1) if n % 3 else None
        return Exercise(
            "adding" if check else "talking", f"{n}+1=?", answer, f"sum {n}", context, check
        )

    train = [exercise(n) for n in range(count)]
    held = {"validation": [exercise(1001)], "test": [exercise(1003), exercise(1004)]}
    return Exercises("sums", "CC0", {"train": train, **held})


def checked_sums(*, count: int) -> Exercises:
    """Return the sums that can be checked."""
    all_ = sums(count=count)
    parts = {s: [e for e in part if e.check is not None] for s, part in all_.splits.items()}
    return Exercises(all_.name, all_.licence, parts)


def scripted(
    model: Any,
    prompts: Any,
    *,
    answers: Mapping[str, str],
    otherwise: str,
    tokenizer_path: str,
    max_new_tokens: int,
) -> list[list[int]]:
    """Answer by the label that a prompt shows; an answer without the end token hit the limit."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    labels = [tokenizer.decode(reference) for reference in prompts.references]
    return [tokenizer(answers.get(label, otherwise))["input_ids"] for label in labels]


def script(path: Path, answers: Mapping[str, str], otherwise: str = f"nonsense{END}") -> dict:
    """Return the node of a decoder that answers labels so."""
    return {
        "_target_": "exercise_cases.scripted",
        "_partial_": True,
        "answers": dict(answers),
        "otherwise": otherwise,
        "tokenizer_path": str(path),
        "max_new_tokens": 12,
    }


def node(kind: str = "sums", **settings: Any) -> dict[str, Any]:
    """Return the node of exercises."""
    return {"_target_": f"exercise_cases.{kind}", **settings}


def stage(path: Path, decoding: dict[str, Any], **changes: Any) -> Rewrite:
    """Return a stage that rewrites twenty sums; keywords change it."""
    settings = {
        "path": str(path),
        "exercises": node(count=20),
        "prompt": PROMPT,
        "opening": "",
        "decoding": decoding,
        "forbidden": FORBIDDEN,
        "forbidden_start": "your turn",
        "max_exercises": None,
        "batch_size": 8,
        "seed": 0,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    return Rewrite(**(settings | changes))
