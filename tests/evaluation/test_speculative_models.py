"""The evaluator of drafts: its counts against a decoding without caches, its times by turns."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import get_object
from omegaconf import OmegaConf
from speculation import plainly
from transformers import AutoTokenizer

from stillhouse.config import preflight, signatures
from stillhouse.data.documents import TokenDocument
from stillhouse.errors import UserError
from stillhouse.evaluation import speculative_models as module
from stillhouse.evaluation.speculative_models import speculative_decoding
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers
from stillhouse.students.causal_lm import load_causal_lm

NEW, GAMMA, PROMPT = 9, 2, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory, language_world) -> dict[str, str]:
    """The target, a copy of it, and the target with noise on its weights."""
    place = tmp_path_factory.mktemp("drafts")
    for role in ("copy", "noisy"):
        shutil.copytree(language_world.model, place / role)
    torch.manual_seed(0)
    noisy = load(str(place / "noisy"))
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    noisy.save_pretrained(place / "noisy")
    roles = {"copy": str(place / "copy"), "teacher": str(language_world.model)}
    return {**roles, "noisy": str(place / "noisy")}


def load(path: str) -> Any:
    return load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="m").eval()


def evaluate(models: dict[str, str], world: Any, **changes: Any) -> Any:
    settings = {
        "reference": "teacher",
        "draft_tokens": GAMMA,
        "max_sequences": 4,
        "prompt_tokens": PROMPT,
        "max_new_tokens": NEW,
        "temperature": 0.0,
        "repeats": 1,
        "seed": 0,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    return speculative_decoding(models, world.data(), **(settings | changes)).models


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_are_those_of_decoding_without_caches(models, language_world, temperature) -> None:
    numbers = evaluate(models, language_world, temperature=temperature, seed=3)
    assert list(numbers) == ["copy", "teacher", "noisy"]
    assert numbers["teacher"] == {}, "it drafts for nobody and keeps its row"
    data = language_world.data()
    documents = data.documents("test")
    generator = torch.Generator().manual_seed(3)
    tokens = passes = tested = accepted = 0
    for i in range(4):
        text = data.tokenizer(documents[i * len(documents) // 4])["input_ids"]
        found = plainly(
            load(models["teacher"]),
            load(models["noisy"]),
            [data.end_token, *text][:PROMPT],
            draft_tokens=GAMMA,
            max_new_tokens=NEW,
            temperature=temperature,
            generator=generator,
            end_token=data.end_token,
        )
        tokens, passes = tokens + len(found[0]), passes + found[1]
        tested, accepted = tested + found[2], accepted + found[3]
    assert 0 < accepted < tested
    assert numbers["noisy"]["acceptance"] == accepted / tested
    assert numbers["noisy"]["block_efficiency"] == tokens / passes
    assert numbers["copy"]["acceptance"] == pytest.approx(1.0)
    assert set(numbers["noisy"]) == {"acceptance", "block_efficiency", "speculative_speedup"}


def test_a_copy_is_always_believed(models, language_world) -> None:
    numbers = evaluate(models, language_world)
    assert numbers["copy"]["acceptance"] == 1.0
    assert numbers["copy"]["block_efficiency"] == GAMMA + 1
    assert all(numbers[role]["speculative_speedup"] > 0 for role in ("copy", "noisy"))


def test_the_speedup_is_of_the_time_a_token_by_turns(models, language_world, monkeypatch) -> None:
    """The first turn does not count; the target alone goes first and proposes nothing."""
    times = iter([99.0, 77.0, 16.0, 1.0, 2.0, 9.0, 4.0, 2.0])
    asked: list[int] = []
    speculate = module.speculate

    def watch(target: Any, draft: Any, prompt: Any, **settings: Any) -> Any:
        asked.append(settings["draft_tokens"])
        return speculate(target, draft, prompt, **settings)

    def timed(work: Any, model: Any) -> float:
        work()
        return next(times)

    monkeypatch.setattr(module, "speculate", watch)
    monkeypatch.setattr(module, "seconds", timed)
    both = {role: models[role] for role in ("teacher", "noisy")}
    numbers = evaluate(both, language_world, max_sequences=2, repeats=3)
    assert asked == [0, 0, GAMMA, GAMMA] * 4
    assert numbers["noisy"]["speculative_speedup"] == pytest.approx(4.0 / 2.0)


def test_where_a_prompt_ends() -> None:
    text = TokenDocument([5, 6, 7, 0], [True] * 4, follows_end=True)
    assert module._beginning(text, 3, 0) == [0, 5, 6]
    assert module._beginning(text, 4, 0) == [], "nothing but the end token follows"
    chat = TokenDocument([5, 6, 7, 8], [False, False, True, True], follows_end=False)
    assert module._beginning(chat, 1, 0) == [5, 6]
    generated = TokenDocument([5, 6, 7], [False, True, True], follows_end=True)
    assert module._beginning(generated, 1, 0) == [0, 5]
    silent = TokenDocument([5, 6], [False, False], follows_end=False)
    assert module._beginning(silent, 1, 0) == []


def test_bad_input(models, language_world, tmp_path: Path) -> None:
    def refusal(roles: dict[str, str] = models, **changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            evaluate(roles, language_world, **changes)
        return str(refused.value)

    assert refusal(reference="teachr") == (
        "stages.<stage>.evaluator.reference=teachr: there is no such model; expected copy, "
        "teacher, noisy; did you mean 'teacher'?"
    )
    assert refusal(max_new_tokens=1) == (
        "stages.<stage>.evaluator.max_new_tokens=1: expected 2 or more; the last token is never "
        "proposed"
    )
    assert refusal(prompt_tokens=100_000) == (
        "stages.<stage>.evaluator.prompt_tokens=100000: none of 4 test documents is longer; "
        "expected fewer tokens, or data with longer documents"
    )
    assert refusal(max_new_tokens=4000) == (
        "stages.<stage>.evaluator.max_new_tokens=4000: with the 6 tokens of the longest prompt "
        "this is more than the 2048 positions of models.teacher; expected at most 2042"
    )
    other = shutil.copytree(models["copy"], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert refusal({**models, "other": str(other)}) == (
        f"models.other.path={other}: its tokenizer has 301 tokens, the data's 300, and 1 of them "
        "differ (the first: '<new>'); this family compares distributions over one vocabulary, so "
        "teacher, student and data need one tokenizer: take a teacher and a student of one family "
        "(teacher=hf teacher.path=…, which the data follow); student=llama is made for any"
    )


def test_the_yaml_file_binds_and_lists_every_parameter() -> None:
    register_schemas()
    register_resolvers()
    overrides = ["experiment=word_kd", "evaluation=speculative"]
    config = preflight.compose_job(overrides, ROOT / "conf")
    OmegaConf.to_container(config, resolve=True)
    signatures.check(config, ["evaluate"])
    node = dict(signatures.nodes_with_targets(config, ["evaluate"]))["evaluation"]
    assert not set(signatures.keywords_of(get_object(node._target_)) or {}) - set(node)
