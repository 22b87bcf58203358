"""Speculative decoding: the target's law whatever the draft, and caches that are rolled back."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_sharers import CONFIGS, FOLLOWERS, V, full_model, some_ids
from scipy import stats
from speculation import Table, law_behind, plainly, some_laws
from torch import Tensor
from transformers import Qwen3NextConfig

from stillhouse.errors import UserError
from stillhouse.evaluation.speculative import Speculation, residual, speculate
from stillhouse.objectives.divergences import total_variation
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of


def speculated(target: Any, draft: Any, prompt: Sequence[int], **changes: Any) -> Speculation:
    settings = {"draft_tokens": 4, "max_new_tokens": 500, "temperature": 1.0, "end_token": None}
    settings["generator"] = torch.Generator().manual_seed(changes.pop("seed", 0))
    return speculate(target, draft, torch.tensor([prompt]), **(settings | changes))


def many(target: Any, draft: Any, runs: int, **changes: Any) -> list[Speculation]:
    """Speculate so many times, each with a seed of its own."""
    return [speculated(target, draft, [0], seed=seed, **changes) for seed in range(runs)]


def p_value(counts: Tensor, law: Tensor) -> float:
    """Return how likely counts as far from a law are, by chi-square."""
    return float(stats.chisquare(counts.flatten(), counts.sum() * law.flatten()).pvalue)


# A token's own law, and a draft's.
P, Q = some_laws(6, seed=0), some_laws(6, seed=1)
BETA = float(torch.minimum(P, Q).sum())


@pytest.fixture(scope="module")
def runs() -> list[Speculation]:
    """8000 tokens whose laws do not depend on what stands before them."""
    return many(Table(P), Table(Q), 16)


def test_acceptance_is_what_the_laws_share(runs: list[Speculation]) -> None:
    assert pytest.approx(1 - float(total_variation(Q.log(), P.log())), abs=1e-12) == BETA
    tested = sum(run.tested for run in runs)
    accepted = sum(run.accepted for run in runs)
    assert tested > 6000
    assert abs(accepted / tested - BETA) < 3 * (BETA * (1 - BETA) / tested) ** 0.5


def test_the_law_of_a_token_is_the_target_s(runs: list[Speculation]) -> None:
    counts = torch.bincount(torch.tensor([v for run in runs for v in run.tokens]), minlength=6)
    assert counts.sum() == 8000
    assert p_value(counts, P) > 0.01
    assert p_value(counts, Q) < 1e-9


def test_the_joint_law_of_two_tokens_is_the_target_s() -> None:
    """The first two of three tokens with two proposals: within a block and across its end."""
    p, q = some_laws(6, 6, seed=2), some_laws(6, 6, seed=3)
    found = many(Table(p), Table(q), 1200, draft_tokens=2, max_new_tokens=3)
    counts = torch.zeros(6, 6)
    for run in found:
        counts[run.tokens[0], run.tokens[1]] += 1
    assert p_value(counts, p[0][:, None] * p) > 0.01
    assert p_value(counts, q[0][:, None] * q) < 1e-9
    blocks = {run.target_calls for run in found}
    assert blocks == {1, 2, 3}


def test_a_text_follows_the_target_s_chain() -> None:
    p, q = some_laws(6, 6, seed=4), some_laws(6, 6, seed=5)
    counts = torch.zeros(6, 6)
    for run in many(Table(p), Table(q), 8):
        for before, after in zip([0, *run.tokens], run.tokens, strict=False):
            counts[before, after] += 1
    expected = counts.sum(1, keepdim=True) * p
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert stats.chi2.sf(statistic, df=6 * 5) > 0.01


def test_the_temperature_is_of_both_laws() -> None:
    sharpened = P**2 / (P**2).sum()
    draft = Q**2 / (Q**2).sum()
    found = many(Table(P), Table(Q), 6, temperature=0.5)
    counts = torch.bincount(torch.tensor([v for run in found for v in run.tokens]), minlength=6)
    assert p_value(counts, sharpened) > 0.01
    rate = sum(run.accepted for run in found) / sum(run.tested for run in found)
    assert rate == pytest.approx(float(torch.minimum(sharpened, draft).sum()), abs=0.03)


@pytest.mark.parametrize(("of_target", "of_draft"), [(8, 6), (6, 8)])
def test_columns_that_one_model_has_more_are_masked(of_target: int, of_draft: int) -> None:
    p, q = some_laws(of_target, seed=6), some_laws(of_draft, seed=7)
    found = many(Table(p), Table(q), 5)
    counts = torch.bincount(torch.tensor([v for run in found for v in run.tokens]))
    assert len(counts) == 6
    assert p_value(counts, p[:6] / p[:6].sum()) > 0.01
    shared = torch.minimum(p[:6] / p[:6].sum(), q[:6] / q[:6].sum()).sum()
    rate = sum(run.accepted for run in found) / sum(run.tested for run in found)
    assert rate == pytest.approx(float(shared), abs=0.03)


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_a_draft_that_is_the_target_is_always_believed(gamma: int) -> None:
    run = speculated(Table(P), Table(P), [0], draft_tokens=gamma, max_new_tokens=8 * (gamma + 1))
    assert run.accepted == run.tested == 8 * gamma
    assert run.target_calls == 8


def test_a_draft_of_other_tokens_is_never_believed() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.3, 0.7])
    run = speculated(Table(p), Table(q), [0], max_new_tokens=50)
    assert run.accepted == 0
    assert run.tested == run.target_calls - 1 == 49
    assert set(run.tokens) == {0, 1}


def test_tokens_a_block_are_the_closed_form() -> None:
    """(1 - a^(γ+1)) / (1 - a), of arXiv:2211.17192 equation 1, for a = 0.7 and γ = 4."""
    found = many(Table([0.7, 0.3, 0.0]), Table([0.7, 0.0, 0.3]), 12)
    calls = sum(run.target_calls for run in found)
    # A block is 1 + a geometric number cut at 4; its deviation is below 1.7.
    assert abs(6000 / calls - (1 - 0.7**5) / (1 - 0.7)) < 3 * 1.7 / calls**0.5


def test_where_nothing_is_left_of_the_residual_the_target_s_law_is_drawn_from() -> None:
    assert torch.equal(residual(P, P), P)
    assert torch.equal(residual(P, P + torch.tensor([1e-17, 0, 0, 0, 0, -1e-17])), P)
    assert torch.allclose(residual(P, Q), torch.relu(P - Q))


def noisy(model: Any, size: float) -> Any:
    """Return a copy of a model with noise on its weights."""
    torch.manual_seed(1)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return changed


@pytest.fixture(scope="module")
def target() -> Any:
    return full_model("llama")


@pytest.fixture(scope="module")
def drafts(target: Any) -> dict[str, Any]:
    torch.manual_seed(7)
    other = type(target)(target.config).double().eval()
    return {"itself": target, "noisy": noisy(target, 0.02), "random": other}


@pytest.mark.parametrize("draft", ["itself", "noisy", "random"])
@pytest.mark.parametrize("gamma", [0, 1, 3, 6])
def test_greedy_is_the_target_s_own_text(target, drafts, draft: str, gamma: int) -> None:
    rates = set()
    for length, new in ((1, 1), (3, 9), (8, 14)):
        prompt = some_ids(length, seed=length).tolist()
        text = list(prompt)
        for _ in range(new):
            text.append(int(law_behind(target, text, 0).argmax()))
        changes = {"draft_tokens": gamma, "max_new_tokens": new, "temperature": 0.0}
        run = speculated(target, drafts[draft], prompt, **changes)
        assert run.tokens == text[length:]
        end = text[-1]
        ended = speculated(target, drafts[draft], prompt, end_token=end, **changes)
        assert ended.tokens == text[length : length + 1 + text[length:].index(end)]
        rates |= {run.accepted / run.tested} if run.tested else set()
    if gamma:
        assert (rates == {1.0}) == (draft == "itself")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", [*CONFIGS, "shared"])
def test_with_caches_equals_without(family: str, temperature: float) -> None:
    """Texts of 16 tokens; windows of 4 tokens in three of the families are left far behind."""
    target = full_model(family if family != "shared" else "llama")
    draft = noisy(target, 0.02)
    if family == "shared":
        draft = share_attention(target, sharing_of(FOLLOWERS, 6, key="f"), where="").double().eval()
    accepted = tested = 0
    for seed in range(3):
        settings: dict[str, Any] = {
            "draft_tokens": 3,
            "max_new_tokens": 12,
            "temperature": temperature,
            "end_token": V - 1,
        }
        prompt = some_ids(4, seed=seed).tolist()
        run = speculated(target, draft, prompt, seed=seed, **settings)
        generator = torch.Generator().manual_seed(seed)
        plain = plainly(target, draft, prompt, generator=generator, **settings)
        assert (run.tokens, run.target_calls, run.tested, run.accepted) == plain
        accepted, tested = accepted + run.accepted, tested + run.tested
    assert 0 < accepted < tested


def test_an_end_token_ends_a_text_wherever_it_comes_from() -> None:
    p = torch.tensor([0.6, 0.2, 0.2])
    found = many(Table(p), Table([0.5, 0.3, 0.2]), 600, end_token=1, max_new_tokens=50)
    assert all(run.tokens.count(1) == 1 and run.tokens[-1] == 1 for run in found)
    # The length is geometric.
    counts = torch.tensor([sum(len(run.tokens) == n for run in found) for n in range(1, 7)])
    rest = torch.tensor([len(found) - int(counts.sum())])
    law = torch.tensor([0.2 * 0.8 ** (n - 1) for n in range(1, 7)] + [0.8**6])
    assert p_value(torch.cat([counts, rest]), law.double()) > 0.01


def test_states_that_cannot_be_rolled_back() -> None:
    recurrent = Table(P)
    recurrent.config = Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(UserError) as refused:
        speculated(Table(P), recurrent, [0])
    assert str(refused.value) == (
        "speculative decoding: the cache of Table has layers of the kind LinearAttentionLayer, "
        "whose states cannot be rolled back behind a token that is not kept; expected a model with "
        "attention alone"
    )
