"""Accuracy by task, of answers to the normal question."""

from functools import partial

import pytest
import torch
from chats import END
from exercise_cases import save_chat_model, sums
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.data.tasks.checking import says_exactly
from stillhouse.data.tasks.exercises import Exercise
from stillhouse.errors import UserError
from stillhouse.evaluation import exercises as module
from stillhouse.evaluation.exercises import accuracy_by_task


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama):
    path = save_chat_model(tmp_path_factory.mktemp("model"), tiny_llama)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def greedy_alone(model, tokenizer, instruction, steps):
    text = f"<|im_start|>user\n{instruction}{END}\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        token = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if int(token) == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_shares_are_those_of_answers_made_one_by_one(world):
    """Labels are the model's own greedy answers, made alone; a third of them is spoilt."""
    questions = ["a", "some more words", "b?", "a much longer question than these", "c", "dd"]
    exercises = []
    for i, question in enumerate(questions):
        said = greedy_alone(*world, question, 5)
        right = partial(says_exactly, expected=said.strip() if i % 3 else f"{said}x")
        task = "short" if len(question) < 5 else "long"
        exercises.append(Exercise(task, question, "label", f"question {i}", check=right))
    exercises.append(Exercise("short", "an open one", "label", "question 7"))
    found = accuracy_by_task(*world, exercises, max_new_tokens=5, batch_size=4)
    assert found == {"accuracy": 4 / 6, "accuracy_long": 1 / 2, "accuracy_short": 3 / 4}


def test_the_token_that_ends_an_answer_is_not_part_of_it(world, monkeypatch):
    model, tokenizer = world
    tokens = tokenizer(f"yes{END}")["input_ids"]
    monkeypatch.setattr(module, "greedy", lambda model, prompts, **_: [tokens])
    right = partial(says_exactly, expected="yes")
    exercise = Exercise("words", "say yes", "label", "question 0", check=right)
    found = accuracy_by_task(model, tokenizer, [exercise], max_new_tokens=5, batch_size=4)
    assert found == {"accuracy": 1.0, "accuracy_words": 1.0}


def test_exercises_that_cannot_be_checked_have_no_accuracy(world):
    open_ended = [e for e in sums(count=9).splits["train"] if e.check is None]
    with pytest.raises(UserError) as caught:
        accuracy_by_task(*world, open_ended, max_new_tokens=5, batch_size=4)
    assert str(caught.value) == (
        "data.corpus.exercises: none of 3 exercises has an answer that can be checked; expected "
        "some to measure an accuracy"
    )
