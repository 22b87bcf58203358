"""The recovery report: the seed's own answers, recovery by hand, operations by counting."""

from typing import Any

import pytest
import torch
from chats import END
from exercise_cases import node, save_chat_model, sums

from stillhouse.data.language import LanguageData
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.errors import UserError
from stillhouse.evaluation import recovery as module
from stillhouse.evaluation.recovery import (
    answers_of_the_seed,
    first_of_every_task,
    flops_per_token,
    recovered,
    recovery,
)
from stillhouse.students.causal_lm import load_causal_lm


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama) -> dict[str, str]:
    """A seed and a model of other weights and fewer layers."""
    place = tmp_path_factory.mktemp("models")
    shapes = {"pruned": {"num_hidden_layers": 1}, "seed": {"num_hidden_layers": 2}}
    return {
        role: str(save_chat_model(place / role, tiny_llama, **shape))
        for role, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def data(models) -> LanguageData:
    corpus = {
        "_target_": "stillhouse.data.corpora.answered.answered",
        "exercises": node(count=12),
    }
    return LanguageData(
        0,
        corpus=corpus,
        tokenizer_path=models["seed"],
        sequence_length=64,
        batch_size=2,
        evaluation_batch_size=2,
        packing=False,
    )


def load(path: str) -> Any:
    return load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="m").eval()


def report(models: Any, data: LanguageData, exercises: Exercises, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "reference": "seed",
        "exercises": exercises,
        "exercises_per_task": 3,
        "max_new_tokens": 5,
        "batch_size": 2,
        "seed": 0,
        "speed_context": 8,
        "speed_new_tokens": 2,
        "speed_repeats": 1,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    return recovery(models, data, **(settings | changes)).models


def test_recovery_is_the_mean_over_the_tasks_that_the_seed_can_do():
    seeds = {"accuracy": 0.4, "accuracy_a": 0.8, "accuracy_b": 0.4, "accuracy_c": 0.0}
    ours = {"accuracy": 0.5, "accuracy_a": 0.4, "accuracy_b": 0.5, "accuracy_c": 0.6}
    assert recovered(ours, seeds) == pytest.approx((50 + 125) / 2)
    assert recovered(seeds, seeds) == 100
    assert recovered(ours, {"accuracy": 0.0, "accuracy_a": 0.0}) is None


def test_the_first_exercises_of_every_task_are_asked():
    tasks = "aabbabcab"
    exercises = [Exercise(task, str(i), "", "") for i, task in enumerate(tasks)]
    chosen = first_of_every_task(exercises, 2)
    assert [e.instruction for e in chosen] == ["0", "1", "2", "3", "6"]


@torch.no_grad()
def nll_by_hand(model: Any, batches: Any) -> float:
    total, count = 0.0, 0
    for batch in batches:
        whole = torch.ones_like(batch.mask)
        real_tokens = whole if batch.attention_mask is None else batch.attention_mask
        rows = zip(batch.input_ids, batch.labels, batch.mask, real_tokens, strict=True)
        for ids, labels, mask, real in rows:
            length = int(real.sum())
            log_q = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
            chosen = log_q.gather(-1, labels[:length, None])[:, 0]
            total -= chosen[mask[:length]].double().sum().item()
            count += int(mask.sum())
    return total / count


def test_what_the_seed_answers_counts_and_its_questions_do_not(models, data):
    model, asked = load(models["seed"]), sums(count=9).splits["train"]
    batches = list(answers_of_the_seed(model, data, asked, max_new_tokens=5, batch_size=4, seed=3))
    tokenizer: Any = data.tokenizer
    questions = []
    for batch in batches:
        for ids, mask, labels in zip(batch.input_ids, batch.mask, batch.labels, strict=True):
            start = int(mask.nonzero()[0])
            questions.append(tokenizer.decode(ids[: start + 1]))
            assert 1 <= int(mask.sum()) <= 5
            assert mask[start : start + int(mask.sum())].all(), "an answer is in one piece"
            ended = labels[mask] == data.end_token
            assert not ended[:-1].any(), "nothing counts behind the end token"
    rendered = [
        tokenizer.apply_chat_template(
            [dict(m) for m in e.question()], tokenize=False, add_generation_prompt=True
        )
        for e in asked
    ]
    assert sorted(questions) == sorted(rendered)
    again = answers_of_the_seed(model, data, asked, max_new_tokens=5, batch_size=4, seed=3)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, again, strict=True))
    other = answers_of_the_seed(model, data, asked, max_new_tokens=5, batch_size=4, seed=4)
    assert not all(
        a.labels.shape == b.labels.shape and torch.equal(a.labels, b.labels)
        for a, b in zip(batches, other, strict=True)
    )


def test_the_seed_answers_by_its_own_law(models, data):
    """One token each: nats a token are the law's entropy, up to four deviations."""
    model, asked = load(models["seed"]), sums(count=1).splits["train"]
    drawn = answers_of_the_seed(model, data, asked * 2000, max_new_tokens=1, batch_size=500, seed=0)
    tokens = torch.cat([batch.labels[batch.mask] for batch in drawn])
    question = data.tokenizer(
        f"<|im_start|>user\n{asked[0].instruction}{END}\n<|im_start|>assistant\n",
        return_tensors="pt",
    )
    with torch.no_grad():
        nats = -model(input_ids=question.input_ids).logits[0, -1].double().log_softmax(-1)
    entropy = (nats.exp() ** -1 * nats).sum()
    deviation = ((nats.exp() ** -1 * nats**2).sum() - entropy**2).sqrt()
    assert len(tokens) == 2000
    assert abs(nats[tokens].mean() - entropy) < 4 * deviation / 2000**0.5


def test_the_table_is_that_of_models_asked_one_by_one(models, data, monkeypatch):
    """The seed answers two of three rightly, the other model one: by the order of the calls."""
    shares = iter(
        [
            {"accuracy": 0.9, "accuracy_adding": 0.8, "accuracy_more": 0.4},
            {"accuracy": 0.1, "accuracy_adding": 0.2, "accuracy_more": 0.3},
        ]
    )
    monkeypatch.setattr(module, "accuracy_by_task", lambda *_, **__: next(shares))
    numbers = report(models, data, sums(count=12))
    assert list(numbers) == ["pruned", "seed"]
    assert numbers["seed"]["accuracy"] == pytest.approx(0.6), "the mean over tasks"
    assert numbers["seed"]["recovery"] == 100
    assert numbers["pruned"]["recovery"] == pytest.approx((25 + 75) / 2)
    assert numbers["seed"]["kl_to_seed"] == pytest.approx(0, abs=1e-6)
    assert numbers["pruned"]["kl_to_seed"] > 0.1
    assert numbers["pruned"]["parameters"] < numbers["seed"]["parameters"]
    asked = first_of_every_task(sums(count=12).splits["test"], 3)
    own = answers_of_the_seed(
        load(models["seed"]), data, asked, max_new_tokens=5, batch_size=2, seed=0
    )
    expected = nll_by_hand(load(models["pruned"]), own)
    assert numbers["pruned"]["seed_text_nll"] == pytest.approx(expected, rel=1e-5)
    labels = nll_by_hand(load(models["pruned"]), data.evaluation_batches("test"))
    assert numbers["pruned"]["test_nll"] == pytest.approx(labels, rel=1e-5)


def test_open_ended_tasks_have_no_accuracy_and_no_recovery(models, data):
    whole = sums(count=12)
    splits = {s: [e for e in part if e.check is None] for s, part in whole.splits.items()}
    splits["test"] = [Exercise("talking", "hello", "hi", "line 1")]
    numbers = report(models, data, Exercises("open", "CC0", splits))
    assert not {"accuracy", "recovery"} & numbers["pruned"].keys()
    assert numbers["pruned"]["kl_to_seed"] > 0.1


def test_operations_are_those_of_the_products(models):
    """Two a weight of a linear layer and token, and as many a product of attention."""
    model, N = load(models["seed"]), 12
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    config = model.config
    width = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    attention = config.num_hidden_layers * 2 * 2 * N * width
    assert flops_per_token(model, N) == pytest.approx(2 * weights + attention)


def test_a_reference_that_is_no_role(models, data):
    with pytest.raises(UserError) as refused:
        report(models, data, sums(count=3), reference="sead")
    assert str(refused.value) == (
        "stages.<stage>.evaluator.reference=sead: there is no such model; expected pruned, seed; "
        "did you mean 'seed'?"
    )


def test_answers_that_a_model_has_no_positions_for(models, data):
    asked = sums(count=3)
    limit = load(models["seed"]).config.max_position_embeddings
    longest = max(
        len(
            data.tokenizer(
                f"<|im_start|>user\n{e.instruction}{END}\n<|im_start|>assistant\n"
            ).input_ids
        )
        for e in asked.splits["test"]
    )
    room = limit - longest
    with pytest.raises(UserError) as refused:
        report(models, data, asked, max_new_tokens=room + 1)
    assert str(refused.value) == (
        f"stages.<stage>.evaluator.max_new_tokens={room + 1}: with the {longest} tokens of the "
        f"longest prompt this is more than the {limit} positions of models.seed; expected at most "
        f"{room}"
    )
    with pytest.raises(UserError) as refused:
        report(models, data, asked, speed_context=limit - 1, speed_new_tokens=2)
    assert str(refused.value) == (
        f"stages.<stage>.evaluator.speed_new_tokens=2: with the {limit - 1} tokens of "
        f"stages.<stage>.evaluator.speed_context this is more than the {limit} positions of "
        "models.seed; expected at most 1"
    )
