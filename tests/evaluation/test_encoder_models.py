"""The evaluator of encoders: scores over all texts together, times by turns, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import CLASSES, FakeData, make, make_batch, make_tokenizer, save

from stillhouse.data.labelled.task import Task
from stillhouse.errors import UserError
from stillhouse.evaluation import speed
from stillhouse.evaluation.classification import scores
from stillhouse.evaluation.encoders import encoder_models
from stillhouse.students.encoders import load_encoder, read_encoder

LABELS = torch.tensor([0, 1, 1, 0, 1])
# Three texts and two: the mean of two accuracies is not that of all.
BATCHES = (make_batch(labels=LABELS[:3]), make_batch((5, 3), seed=1, labels=LABELS[3:]))
DATA = FakeData(CLASSES, BATCHES)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A student before its teacher, and another family besides."""
    place = tmp_path_factory.mktemp("encoders")
    made = {
        "student": make("distilbert", seed=10),
        "teacher": make("bert", seed=4),
        "other": make("roberta", seed=2),
    }
    return {role: save(model, place / role) for role, model in made.items()}


def evaluate(models: dict[str, str], data: Any = DATA, **changes: Any) -> Any:
    settings = {
        "reference": "teacher",
        "score": None,
        "speed_tokens": 6,
        "speed_repeats": 1,
        "dtype": "float64",
        "attn_implementation": "sdpa",
    }
    return encoder_models(models, data, **(settings | changes)).models


@torch.no_grad()
def test_scores_are_those_of_all_texts_together(models) -> None:
    numbers = evaluate(models)
    assert list(numbers) == ["student", "teacher", "other"]
    for role, path in models.items():
        model = load_encoder(
            path, task=CLASSES, dtype="float64", attn_implementation="eager", key=role
        ).eval()
        logits = torch.cat([read_encoder(model, batch).logits for batch in BATCHES])
        for name, value in scores(logits, LABELS).items():
            assert numbers[role][name] == pytest.approx(value)
        assert numbers[role]["parameters"] == sum(p.numel() for p in model.parameters())
    teacher = numbers["teacher"]
    assert teacher["score_kept_percent"] == 100.0
    assert teacher["parameters_ratio"] == teacher["speedup_1"] == teacher["speedup_32"] == 1.0
    student = numbers["student"]
    assert student["parameters_ratio"] == teacher["parameters"] / student["parameters"]
    kept = 100 * student["accuracy"] / teacher["accuracy"]
    assert student["score_kept_percent"] == pytest.approx(kept)
    assert kept != 100.0
    of_f1 = evaluate(models, score="f1")["student"]["score_kept_percent"]
    assert of_f1 == pytest.approx(100 * student["f1"] / teacher["f1"])
    assert of_f1 != kept


def test_times_are_medians_by_turns(models, monkeypatch) -> None:
    """The first turn does not count; the model goes before the reference."""
    read: list[tuple[str, int, int]] = []
    times = iter([50.0, 70.0, 1.0, 8.0, 3.0, 4.0, 2.0, 6.0, *[64.0] * 8, *[0.5] * 4, *[8.0] * 4])

    def timed(work: Any, model: Any) -> float:
        handle = model.register_forward_pre_hook(
            lambda module, given, named: read.append(
                (module.config.model_type, *named["input_ids"].shape)
            ),
            with_kwargs=True,
        )
        work()
        handle.remove()
        return next(times)

    monkeypatch.setattr("stillhouse.evaluation.encoders.seconds", timed)
    both = {role: models[role] for role in ("student", "teacher")}
    numbers = evaluate(both, speed_repeats=3)
    turn = [("distilbert", 1, 6), ("bert", 1, 6)]
    assert read[:8] == turn * 4
    assert read[8:16] == [(family, 32, 6) for family, _, _ in turn] * 4
    assert read[16:] == [("bert", 1, 6)] * 4 + [("bert", 32, 6)] * 4
    student, teacher = numbers["student"], numbers["teacher"]
    assert student["latency_ms_1"] == 2000.0
    assert student["texts_per_s_1"] == 0.5
    assert student["speedup_1"] == 6.0 / 2.0
    assert student["texts_per_s_32"] == 0.5
    assert student["speedup_32"] == 1.0
    assert (teacher["latency_ms_1"], teacher["texts_per_s_32"]) == (500.0, 4.0)


def test_without_a_reference_nothing_is_compared(models) -> None:
    numbers = evaluate(models, reference=None)["student"]
    assert set(numbers) == {
        *("accuracy", "f1", "matthews", "parameters"),
        *("latency_ms_1", "latency_ms_32", "texts_per_s_1", "texts_per_s_32"),
    }


def test_a_regression_whose_teacher_knows_nothing_has_no_share(tmp_path) -> None:
    task = Task("regression", ("score",))
    path = save(make("bert", task), tmp_path)
    model = load_encoder(path, task=task, dtype="float64", attn_implementation="sdpa", key="m")
    with torch.no_grad():
        said = read_encoder(model.eval(), make_batch()).logits.squeeze(-1)
    against = FakeData(task, [make_batch(labels=-said.float())])
    numbers = evaluate({"teacher": path}, against)["teacher"]
    assert numbers["pearson"] == pytest.approx(-1.0)
    assert "score_kept_percent" not in numbers


def test_bad_input(models, tmp_path: Path) -> None:
    def refusal(roles: dict[str, str] = models, data: Any = DATA, **changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            evaluate(roles, data, **changes)
        return str(refused.value)

    assert refusal(reference="teachr") == (
        "evaluation.reference=teachr: there is no such model; expected student, teacher, other; "
        "did you mean 'teacher'?"
    )
    assert refusal(speed_tokens=19) == (
        "evaluation.speed_tokens=19: models.other has 18 positions; expected 18 or less"
    )
    assert refusal(score="mathews") == (
        "evaluation.score=mathews: the task has accuracy, f1, matthews; did you mean 'matthews'?"
    )
    assert refusal(data=FakeData(None)) == (
        "data: text without labels has no scores; expected labelled text"
    )
    assert refusal(data=FakeData(CLASSES, [make_batch()])) == (
        "data: there are texts without labels in test; expected a label for each"
    )
    body = save(make("bert", None), tmp_path / "body")
    assert refusal({"teacher": body}) == (
        f"models.teacher.path={body}: it has no head, so it says nothing of the task; expected a "
        "model that was fine-tuned or distilled on it"
    )
    other = save(make("bert"), tmp_path / "other")
    make_tokenizer(22).save_pretrained(other)
    assert refusal({"teacher": other}).startswith(
        f"models.teacher.path={other}: its tokenizer has 22 tokens, the data's 23, and 1 of them"
    )
    assert speed.medians_by_turns([iter([9.0, 1.0, 4.0, 2.0]).__next__], 3) == [2.0]
