"""The recipe `self_data_paper` as it runs: on files of one's own, a small model as the seed."""

import json
from pathlib import Path

import pytest
from commands import TINY, only_run, run_here
from datasets import Dataset
from exercise_cases import save_chat_model
from own_files import lines
from transformers import AutoModelForCausalLM

RECIPE = (
    *TINY,
    "experiment=self_data_paper",
    "teacher.path=./seed",
    "data=answered_files",
    "data.corpus.exercises.train_path=sums.jsonl",
    "stages.rewrite_alpaca.exercises.id=./alpaca",
)


@pytest.fixture
def world(here: Path, tiny_llama) -> Path:
    """A seed of four blocks, sums with worked answers, and a set with Alpaca's columns."""
    save_chat_model(here / "seed", tiny_llama, num_hidden_layers=4)
    sums = [
        {"instruction": f"{n}+1=?", "answer": f"{n}+1={n + 1}", "expected": str(n + 1)}
        for n in range(60)
    ]
    (here / "sums.jsonl").write_bytes(lines(*sums))
    asked = [
        {"instruction": f"Say {n}.", "input": "" if n % 2 else "Twice.", "output": f"{n} {n}"}
        for n in range(60)
    ]
    Dataset.from_list(asked).save_to_disk(here / "alpaca")
    return here


@pytest.mark.slow
def test_all_stages_run(capfd, world: Path) -> None:
    done = run_here(capfd, *RECIPE)
    assert done.code == 0, done.err
    folder = only_run(world / "outputs")
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "done"
    assert {s["status"] for s in results["stages"].values()} <= {"done", "cached"}
    numbers = results["models"]
    assert set(numbers) == {"seed", "pruned", "random_run", "sft", "self_data", "merged"}
    assert all("test_nll" in of and "kl_to_seed" in of for of in numbers.values())
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert student.config.num_hidden_layers == 3
    wording = json.loads((folder / "stages/rewrite/provenance.json").read_text())
    assert wording["system"].startswith("You are an expert in math.")
    assert wording["opening"] == "Great! Let's think step by step."
    # Four tokens are no answer.
    assert (
        "warning: rewrite_alpaca: no answer was accepted, so all targets are labels, and to learn "
        "them is SFT; the reasons stand above; change stages.rewrite_alpaca.prompt or decoding, or "
        "take a stronger model\n"
    ) in done.out


@pytest.mark.parametrize("key", ["pruning", "stages.random_run.choose"])
def test_a_number_of_blocks_that_cannot_go_is_named_as_it_was_set(capfd, world, key) -> None:
    done = run_here(capfd, *RECIPE, f"{key}.n=4")
    assert done.code == 2
    assert done.err == (
        f"error: {key}.n=4: expected a number of blocks from 1 to 3, for the model has 4 and one "
        "must stay\n"
    )


@pytest.mark.parametrize("key", ["evaluation", "stages.drafts.evaluator"])
def test_a_reference_that_is_no_role_is_refused_before_the_first_stage(capfd, world, key) -> None:
    left_out = ("stages.merge=null", "models.merged=null")
    done = run_here(capfd, *RECIPE, *left_out, f"{key}.reference=merged")
    assert done.code == 2
    assert done.err == (
        f"error: {key}.reference=merged: the recipe has no such model; its models are seed, "
        "pruned, random_run, sft, self_data; did you mean 'seed'?\n"
    )
    assert not list(world.rglob("*.yaml")), "a run that never began left files"
