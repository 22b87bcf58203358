"""A tiny chat model, exercises, and a decoder that writes what a test has it write."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chats import CHATML, END, chat_tokenizer
from transformers import AutoTokenizer

from stillhouse.data.tasks.checking import says_integer
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.data.tasks.rewriting import asked_to_rewrite
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


def save_hub_model(cache: Path, id: str, commit: str, make: Callable[..., Any]) -> None:
    """Save a random Llama where a cache of the hub keeps it."""
    home = cache / f"models--{id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    save_chat_model(home / "snapshots" / commit, make)


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


def save_trained_model(folder: Path, make: Callable[..., Any], *, count: int) -> Path:
    """Save a Llama that says `It is 4.` to the first sums, alone and with the label in its view."""
    exercises = sums(count=count).splits["train"]
    asked = [*exercises, *(asked_to_rewrite(e, PROMPT) for e in exercises)]
    plain = chat_tokenizer(CHATML)
    questions: list[Any] = [
        plain.apply_chat_template(list(e.question()), tokenize=False, add_generation_prompt=True)
        for e in asked
    ]
    answers = [f"It is {n + 1}.{END}" for n in range(count)] * 2
    tokenizer = chat_tokenizer(CHATML, tuple(map("".join, zip(questions, answers, strict=True))))
    tokenizer.save_pretrained(folder)
    prompts, ends = tokenizer(questions)["input_ids"], tokenizer(answers)["input_ids"]
    width = max(map(len, prompts)) + max(map(len, ends))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    learnt = torch.full_like(ids, -100)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        ids[row, : len(prompt) + len(end)] = torch.tensor([*prompt, *end])
        learnt[row, len(prompt) : len(prompt) + len(end)] = torch.tensor(end)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3}
    model = make(**shape, initializer_range=0.1).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(input_ids=ids, labels=learnt).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    model.save_pretrained(folder)
    return folder


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
        "system": None,
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
