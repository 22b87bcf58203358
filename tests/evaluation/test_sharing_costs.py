"""What sharing saves: counts by closed forms; of times only how they are taken."""

from pathlib import Path
from typing import Any

import pytest
from attention_sharers import CONFIGS, FOLLOWERS, full_model

from stillhouse.errors import UserError
from stillhouse.evaluation import sharing_costs as costs
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of

CONTEXTS = [6, 8]
WORKS = ("prefill", "decode", "training_step")
# Of a follower: a query and a key projection, biases (Qwen2), norms of queries and keys (Qwen3).
REMOVED = {
    "llama": 16 * 16 + 16 * 8,
    "mistral": 16 * 32 + 16 * 16,
    "qwen2": 16 * 16 + 16 * 8 + 16 + 8,
    "qwen3": 16 * 32 + 16 * 16 + 8 + 8,
}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A function that saves a teacher and its student and returns their roles."""

    def save(family: str) -> dict[str, str]:
        full = full_model(family).float()
        student = share_attention(full, sharing_of(FOLLOWERS, 6, key="f"), where="")
        for role, model in (("teacher", full), ("student", student)):
            model.save_pretrained(tmp_path / role)
        return {role: str(tmp_path / role) for role in ("student", "teacher")}

    return save


def evaluate(models: dict[str, str], **changes: Any) -> Any:
    settings = {
        "reference": "teacher",
        "timed": None,
        "contexts": CONTEXTS,
        "new_tokens": 2,
        "repeats": 1,
        "dtype": "float32",
    }
    unused: Any = None
    return costs.sharing_costs(models, unused, **(settings | changes)).models


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_parameters_removed(saved: Any, family: str) -> None:
    numbers = evaluate(saved(family), contexts=[3])
    assert numbers["student"]["parameters_removed"] == len(FOLLOWERS) * REMOVED[family]
    assert numbers["teacher"]["parameters_removed"] == 0
    assert numbers["student"]["shared_fraction"] == 0.5
    assert "shared_fraction" not in numbers["teacher"]


def test_cache_and_speedups(saved: Any) -> None:
    numbers = evaluate(saved("llama"))
    whole = 6 * 2 * 2 * 4 * 4
    saving = 1 - len(FOLLOWERS) / (2 * 6)
    assert numbers["teacher"]["kv_cache_bytes_per_token"] == whole
    assert numbers["student"]["kv_cache_bytes_per_token"] == pytest.approx(whole * saving)
    ratios = {f"{work}_speedup_n{context}" for work in WORKS for context in CONTEXTS}
    counts = {"parameters_removed", "kv_cache_bytes_per_token"}
    assert set(numbers["student"]) == counts | {"shared_fraction"} | ratios
    assert set(numbers["teacher"]) == counts
    assert all(numbers["student"][ratio] > 0 for ratio in ratios)
    assert list(numbers) == ["student", "teacher"]


def test_times_are_taken_of_the_roles_that_are_named(saved: Any) -> None:
    models = saved("llama")
    numbers = evaluate({**models, "other": models["student"]}, timed=["other"], contexts=[6])
    ratios = {f"{work}_speedup_n6" for work in WORKS}
    assert set(numbers["other"]) - set(numbers["student"]) == ratios
    assert not ratios & set(numbers["student"])


def test_a_window_counts_what_it_keeps_of_the_longest_context(saved: Any) -> None:
    """Blocks 3 to 5 keep 3 of 8 tokens; of the followers 2, 4 and 5 only the values."""
    numbers = evaluate(saved("qwen3"))
    a_tensor = 2 * 8 * 4
    kept = 2 * (8 + 8) + 8 + 2 * 3 + 3 + 3
    ours = numbers["student"]["kv_cache_bytes_per_token"]
    assert ours == pytest.approx(kept * a_tensor / 8)


def test_both_sides_take_turns_and_the_first_does_not_count() -> None:
    called: list[str] = []
    times = {"theirs": [99.0, 16.0, 2.0, 4.0], "ours": [77.0, 1.0, 9.0, 2.0]}

    def side(name: str) -> Any:
        def run() -> float:
            called.append(name)
            return times[name][called.count(name) - 1]

        return run

    assert costs.ratio_of_medians(side("theirs"), side("ours"), 3) == 4.0 / 2.0
    assert called == ["theirs", "ours"] * 4


def test_a_turn_does_the_work_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that the body sees, the cache before them, and what is left behind."""
    seen: list[tuple[int, int]] = []
    model = full_model("llama")

    def watch(body: Any, arguments: Any, keywords: Any) -> None:
        cache = keywords.get("past_key_values")
        held = 0 if cache is None else cache.get_seq_length()
        seen.append((keywords["input_ids"].shape[1], held))

    model.model.register_forward_pre_hook(watch, with_kwargs=True)
    backward: list[int] = []
    model.model.norm.weight.register_hook(lambda gradient: backward.append(len(seen)))
    tokens = costs.some_tokens(model, 8)
    side = costs._Side(model, tokens, 2, costs._filled(model, 6))
    seen.clear()
    for _ in range(2):
        side.prefill()
        side.decode()
        side.training_step()
    # A second turn meets the same cache as the first.
    assert seen == [(8, 0), (1, 6), (1, 7), (8, 0)] * 2
    assert backward == [4, 8]
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def refusal(models: dict[str, str], **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        evaluate(models, **changes)
    return str(refused.value)


def test_bad_input(saved: Any) -> None:
    models = saved("llama")
    assert refusal(models, reference="teachr") == (
        "reference=teachr: there is no such model; expected student, teacher; did you mean "
        "'teacher'?"
    )
    assert refusal(models, timed=["studnt"]) == (
        "timed=studnt: there is no such model; expected student, teacher; did you mean 'student'?"
    )
    for contexts in ([], [8, 2]):
        assert refusal(models, contexts=contexts) == (
            f"contexts={contexts}: expected one number or more, each above new_tokens=2"
        )
    assert refusal(models, contexts=[8, 4096]) == (
        "contexts=[8, 4096]: 4096 tokens are more than the 2048 positions of models.teacher; "
        "expected at most 2048"
    )
