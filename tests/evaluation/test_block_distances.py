"""Scores of blocks: against the stream itself, identity blocks, invariance, padding, memory."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CONFIGS, V, make, silence
from memory import peak_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from stillhouse.errors import UserError
from stillhouse.evaluation import block_distances as module
from stillhouse.evaluation.block_distances import block_scores, by_run, cosines_between
from stillhouse.records.block_scores import BlockScores, read_block_scores, write_block_scores
from stillhouse.records.language import SequenceBatch
from stillhouse.students.block_choices import least_distant
from stillhouse.students.blocks import blocks_of, without_other_blocks

WHERE = "stages.score_blocks.path=a/model"
# Beyond the windows of the families that have one.
LENGTHS = [5, 9, 12, 1]


def samples(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, V, (length,), generator=generator) for length in LENGTHS]


def padded(side: str, sequences: list[Tensor]) -> SequenceBatch:
    """Pad with tokens that would be noticed.

    For models in float32: in float64 the library's eager attention makes NaN of a padded position
    that sees nothing.
    """
    longest = max(map(len, sequences))
    ids = torch.randint(2, V, (len(sequences), longest), generator=torch.Generator().manual_seed(9))
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, place], real[row, place] = tokens, True
    return SequenceBatch(ids, ids, real, real)


def alone(tokens: Tensor) -> SequenceBatch:
    ids = tokens.unsqueeze(0)
    return SequenceBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool))


def score(model: Any, batches: list[SequenceBatch]) -> BlockScores:
    return block_scores(model, batches, where=WHERE)


@torch.no_grad()
def stream_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the residual stream at the last token, by the library's own means."""
    last: list[Tensor] = []
    norm = next(
        m for n, m in model.base_model.named_children() if n in ("norm", "ln_f") or "final" in n
    )
    handle = norm.register_forward_pre_hook(lambda module, given: last.append(given[0]))
    states = model(tokens.unsqueeze(0), output_hidden_states=True).hidden_states
    handle.remove()
    return [state[0, -1].double() for state in (*states[:-1], *last)]


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle over pi by halves of a rhombus: exact where arccos is not."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm())) / math.pi


@pytest.mark.parametrize("family", CONFIGS)
def test_every_run_and_block_is_scored_by_the_stream_before_the_final_norm(family):
    model = make(family)
    scores = score(model, [alone(tokens) for tokens in samples()])
    streams = [stream_of(model, tokens) for tokens in samples()]
    for start in range(6):
        for length in range(7 - start):
            angles = [angle(stream[start], stream[start + length]) for stream in streams]
            found = float(scores.distances[start, length])
            assert found == pytest.approx(sum(angles) / len(angles), abs=1e-7)
        assert scores.distances[start, 7 - start :].isnan().all()
        cosines = [math.cos(math.pi * angle(s[start], s[start + 1])) for s in streams]
        assert scores.influences[start] == pytest.approx(1 - sum(cosines) / len(cosines))
        weights = torch.cat([p.detach().flatten() for p in blocks_of(model)[start].parameters()])
        assert scores.magnitudes[start] == pytest.approx(float(weights.square().mean().sqrt()))
    assert (scores.samples, scores.tokens) == (4, sum(LENGTHS))


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_that_add_nothing_are_found_and_cut_without_a_trace(family, start):
    model = make(family).float()
    silence(model, range(start, start + 2))
    scores = score(model, [padded("right", samples())])
    assert scores.distances[start, 2] < 1e-7
    assert least_distant(scores, n=2) == [start, start + 1]
    others = [d for first, d in enumerate(scores.of_length(2)) if first != start]
    assert min(others) > 1e-3
    assert max(scores.influences[start : start + 2]) < 1e-12
    cut = without_other_blocks(model, [b for b in range(6) if b not in (start, start + 1)]).eval()
    ids = samples()[2].unsqueeze(0)
    torch.testing.assert_close(cut(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_on_either_side_changes_nothing(family):
    model = make(family).float()
    plain = score(model, [alone(tokens) for tokens in samples()])
    for side in ("right", "left"):
        scores = score(model, [padded(side, samples())])
        torch.testing.assert_close(
            scores.distances, plain.distances, rtol=0, atol=1e-5, equal_nan=True
        )
        assert scores.influences == pytest.approx(plain.influences, abs=1e-5)
        assert (scores.samples, scores.tokens) == (plain.samples, plain.tokens)


def test_batches_are_as_good_as_one():
    model = make("llama")
    halves = score(model, [padded("right", samples()[:3]), padded("right", samples()[3:])])
    whole = score(model, [padded("right", samples())])
    torch.testing.assert_close(halves.distances, whole.distances, equal_nan=True)
    assert halves.influences == pytest.approx(whole.influences)


def test_weights_of_half_precision_are_scored_in_float64():
    """A cosine in bfloat16 would tell apart no angles below a twentieth of a turn."""
    model = make("llama").bfloat16()
    scores = score(model, [alone(tokens) for tokens in samples()])
    streams = [stream_of(model, tokens) for tokens in samples()]
    for start in range(6):
        expected = sum(angle(s[start], s[start + 1]) for s in streams) / len(streams)
        assert float(scores.distances[start, 1]) == pytest.approx(expected, abs=1e-7)


def test_lengths_of_the_stream_have_no_part_in_the_angle():
    states = torch.randn(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1e-3, 2.0, 7.0, 1e4, 0.5], dtype=torch.float64)
    scaled = cosines_between(states * factors.view(-1, 1, 1))
    torch.testing.assert_close(scaled, cosines_between(states))


def test_equal_orthogonal_and_opposite_directions():
    e, f = torch.eye(2, dtype=torch.float64)
    states = torch.stack([e, 3 * e, f, -e]).unsqueeze(1)
    distances = by_run(cosines_between(states)[0].arccos() / math.pi)
    half, whole, out = 0.5, 1.0, math.nan
    expected = [[0.0, 0.0, half, whole], [0.0, half, whole, out], [0.0, half, out, out]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-15, equal_nan=True)


def test_distances_lie_between_0_and_1_and_no_block_has_none():
    distances = score(make("qwen3").float(), [padded("left", samples())]).distances
    assert torch.equal(distances[:, 0], torch.zeros(6, dtype=torch.float64))
    known = distances[~distances.isnan()]
    assert len(known) == sum(range(2, 8))
    assert ((known >= 0) & (known <= 1)).all()


def test_the_mean_of_many_half_turns_is_no_more_than_one(monkeypatch):
    """Their sum over their number is rounded past it, which a reader would refuse."""
    turns = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    states = turns.view(-1, 1, 1).expand(-1, 16, 1)
    monkeypatch.setattr(module, "last_token_states", lambda *args, **kwargs: states)
    distances = score(make("llama"), [padded("right", samples() * 4)]).distances
    assert distances[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_memory_does_not_grow_with_the_samples():
    model = make("llama")
    few, many = (
        peak_bytes(lambda n=n: score(model, [padded("right", samples())] * n)) for n in (2, 12)
    )
    assert many < 1.05 * few


def test_the_model_is_left_as_it_was():
    model = make("gpt2").float()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    score(model, [padded("left", samples())])
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("block", "what"), [(2, "block 3 is given"), (5, "the last block hands on")]
)
def test_a_stream_that_is_not_finite(block, what):
    model = make("llama").float()
    blocks_of(model)[block].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(UserError) as refused:
        score(model, [padded("right", samples())])
    assert str(refused.value) == (
        f"{WHERE}: what {what} is not finite in float32; take dtype=float32, or a model that is "
        "not damaged"
    )


def test_a_model_whose_blocks_are_not_known():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=V, hidden_size=16, n_layer=2))
    with pytest.raises(UserError, match=f"^{WHERE}: a model of the type bloom; blocks can be "):
        score(model, [alone(samples()[0])])


@pytest.fixture
def written(tmp_path: Path) -> BlockScores:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    scores = score(AutoModelForCausalLM.from_config(config).eval(), [padded("right", samples())])
    write_block_scores(scores, tmp_path)
    return scores


def test_scores_are_read_as_they_were_written(written, tmp_path):
    again = read_block_scores(str(tmp_path), key="path")
    torch.testing.assert_close(again.distances, written.distances, rtol=0, atol=0, equal_nan=True)
    assert (again.influences, again.magnitudes) == (written.influences, written.magnitudes)
    assert (again.blocks, again.samples, again.tokens) == (3, 4, sum(LENGTHS))
    content = json.loads((tmp_path / "block_scores.json").read_text())
    assert [len(row) for row in content["distances"]] == [4, 3, 2]


UNREADABLE = (
    "no scores of blocks can be read from block_scores.json; expected what the stage "
    "`score_blocks` wrote"
)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"distances": None}, UNREADABLE),
        ({"distances": [[0.0, "far"]]}, UNREADABLE),
        ({"influences": 3}, UNREADABLE),
        ({"samples": None}, UNREADABLE),
        (
            {"distances": [[0.0, 0.1], [0.0, 0.2]]},
            "block_scores.json holds [2, 2] distances; expected one of every run from every block, "
            "no block to all that follow; run the stage `score_blocks` anew",
        ),
        (
            {"distances": []},
            "block_scores.json holds [] distances; expected one of every run from every block, no "
            "block to all that follow; run the stage `score_blocks` anew",
        ),
        (
            {"influences": [0.1, 0.2]},
            "block_scores.json holds 2 influences and 3 magnitudes of 3 blocks; run the stage "
            "`score_blocks` anew",
        ),
        (
            {"distances": [[0.0, 0.1, 0.2, 1.5], [0.0, 0.1, 0.2], [0.0, 0.1]]},
            "block_scores.json holds distances outside [0, 1]; run the stage `score_blocks` anew",
        ),
        (
            {"distances": [[0.0, 0.1, 0.2, math.nan], [0.0, 0.1, 0.2], [0.0, 0.1]]},
            "block_scores.json holds distances outside [0, 1]; run the stage `score_blocks` anew",
        ),
    ],
)
def test_a_file_that_holds_something_else(written, tmp_path, changes, why):
    file = tmp_path / "block_scores.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError) as refused:
        read_block_scores(str(tmp_path), key="stages.prune.scores_path")
    assert str(refused.value) == f"stages.prune.scores_path={tmp_path}: {why}"


def test_no_file(tmp_path):
    with pytest.raises(UserError) as refused:
        read_block_scores(str(tmp_path), key="stages.prune.scores_path")
    assert str(refused.value) == f"stages.prune.scores_path={tmp_path}: {UNREADABLE}"
