"""Students cut from an encoder: the right blocks and units, and the whole of it at full width."""

from typing import Any

import pytest
import torch
from encoders import CLASSES, CONFIGS, HEADS, LAYERS, WIDTH, FakeData, make, make_batch, save
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.students.encoder_layouts import blocks_of
from stillhouse.students.encoder_slices import SLICED, first, largest, layer_drop, width_slice
from stillhouse.students.encoders import read_encoder

FULL: dict[str, int] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": HEADS,
}
EXACT: dict[str, Any] = {"dtype": "float64", "attn_implementation": "eager"}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return read_encoder(model.eval(), make_batch()).logits


def drop(path: str, blocks: Any, **changes: Any) -> Any:
    return layer_drop(FakeData(), path=path, blocks=blocks, **(EXACT | changes))


def cut(path: str, choose: Any = first, blocks: Any = None, **widths: int) -> Any:
    return width_slice(
        FakeData(), path=path, choose=choose, blocks=blocks, **(FULL | widths), **EXACT
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_dropped_blocks_are_passed_over(family, tmp_path) -> None:
    model = make(family)
    student = drop(save(model, tmp_path), [0, 2])
    assert student.training
    assert student.config.num_hidden_layers == len(blocks_of(student)) == 2
    whole, hands_on_a_pair = logits_of(model), family.startswith("deberta")

    def handed_on(module, inputs, output):
        return (inputs[0], None) if hands_on_a_pair else inputs[0]

    blocks_of(model)[1].register_forward_hook(handed_on)
    expected = logits_of(model)
    assert (whole - expected).abs().max() > 0.01, "passing the block over changes nothing here"
    torch.testing.assert_close(logits_of(student), expected)


def test_a_fraction_of_the_blocks_without_a_head(tmp_path) -> None:
    model = make("bert", None)
    student = layer_drop(FakeData(None), path=save(model, tmp_path), blocks=0.67, **EXACT)
    assert len(blocks_of(student)) == 2
    for ours, theirs in ((0, 0), (1, 2)):
        kept, given = blocks_of(student)[ours], blocks_of(model)[theirs]
        torch.testing.assert_close(kept.state_dict(), given.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("choose", [first, largest])
@pytest.mark.parametrize("family", SLICED)
def test_at_full_width_it_is_the_model_itself(family, choose, tmp_path) -> None:
    model = make(family)
    student = cut(save(model, tmp_path), choose)
    ours, theirs = student.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits_of(student), logits_of(model))


@pytest.mark.parametrize("family", SLICED)
def test_units_of_the_feed_forward_network_that_nothing_reads_go_first(family, tmp_path) -> None:
    """Without them the model says the same."""
    model = make(family)
    with torch.no_grad():
        for block in blocks_of(model):
            last = block.ffn.lin2 if family == "distilbert" else block.output.dense
            last.weight[:, :8] = 0
    path = save(model, tmp_path)
    student = cut(path, largest, intermediate_size=16)
    torch.testing.assert_close(logits_of(student), logits_of(model))
    other = cut(path, first, intermediate_size=16)
    assert (logits_of(other) - logits_of(model)).abs().max() > 0.01


@torch.no_grad()
def doubled(model: Any) -> Any:
    """Return a model of twice the hidden width and the heads that says the same as `model`.

    Hidden units 8i + j and their twins carry equal numbers, so that LayerNorm sees the same mean
    and variance, and only the later twin is read; the first heads are noise that nothing reads.
    """
    config = CONFIGS["bert"].__class__.from_dict(model.config.to_dict())
    config.hidden_size, config.num_attention_heads = 2 * WIDTH, 2 * HEADS
    large = type(model)(config).double().eval()
    theirs = model.state_dict()
    for name, weight in large.state_dict().items():
        small = theirs[name]
        if weight.shape == small.shape:
            weight.copy_(small)
        elif ".self." in name:
            weight.normal_(std=0.3)
            if weight.ndim == 2:
                weight[:, :WIDTH] = 0
                weight[WIDTH:, WIDTH:] = small
            else:
                weight[WIDTH:] = small
        elif "intermediate" in name or name == "classifier.weight":
            weight.zero_()
            weight[:, WIDTH:] = small
        elif "attention.output.dense.weight" in name or "pooler.dense.weight" in name:
            weight.zero_()
            weight[:, WIDTH:] = torch.cat([small, small])
        elif "_embeddings" in name:
            weight.copy_(torch.cat([small, small], 1))
        else:
            weight.copy_(torch.cat([small, small], 0))
    return large


def test_the_small_model_inside_a_large_one_is_found_again(tmp_path) -> None:
    model = make("bert")
    large = doubled(model)
    torch.testing.assert_close(logits_of(large), logits_of(model))
    path = save(large, tmp_path)
    student = cut(path, largest)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (WIDTH, HEADS)
    torch.testing.assert_close(logits_of(student), logits_of(model))
    assert (logits_of(cut(path, first)) - logits_of(model)).abs().max() > 0.01


@torch.no_grad()
def test_units_inside_a_head_stay_with_their_partners(tmp_path) -> None:
    """Queries meet the keys of the same units; values go where their columns are."""
    model = make("bert")
    student = cut(save(model, tmp_path), largest, hidden_size=8)
    own, theirs = blocks_of(student)[1].attention, blocks_of(model)[1].attention
    readers = [
        layer.weight
        for block in blocks_of(model)
        for layer in (*list(block.attention.self.children())[:3], block.intermediate.dense)
    ]
    hidden = torch.cat(readers).square().sum(0).topk(8).indices.sort().values
    q, k = theirs.self.query.weight, theirs.self.key.weight
    worth = (q.square().sum(1) * k.square().sum(1)).view(HEADS, 8)
    kept = torch.cat([worth[h].topk(4).indices.sort().values + 8 * h for h in range(HEADS)])
    assert torch.equal(own.self.query.weight, q[kept][:, hidden])
    assert torch.equal(own.self.key.weight, k[kept][:, hidden])
    assert torch.equal(own.self.key.bias, theirs.self.key.bias[kept])
    v, out = theirs.self.value.weight, theirs.output.dense.weight
    worth = out.square().sum(0).view(HEADS, 8)
    kept = torch.cat([worth[h].topk(4).indices.sort().values + 8 * h for h in range(HEADS)])
    assert torch.equal(own.self.value.weight, v[kept][:, hidden])
    assert torch.equal(own.output.dense.weight, out[hidden][:, kept])


@pytest.mark.parametrize("family", SLICED)
def test_a_narrow_student_of_fewer_blocks_runs_and_is_saved(family, tmp_path) -> None:
    path = save(make(family), tmp_path / "full")
    widths = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 1}
    student = cut(path, largest, blocks=[0, 2], **widths)
    again = drop(save(student, tmp_path / "student"), [0, 1])
    assert torch.equal(logits_of(again), logits_of(student))
    assert len(blocks_of(student)) == 2
    tap = read_encoder(student, make_batch(), attention_layers=[2]).attention[2]
    assert tap.keys.shape == (3, 1, 9, 6)


def test_choices() -> None:
    worth = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0])
    assert first(worth, 3).tolist() == [0, 1, 2]
    assert largest(worth, 3).tolist() == [1, 2, 3]
    assert largest(worth, 1).tolist() == [1]


def test_bad_input(tmp_path) -> None:
    path = save(make("bert"), tmp_path / "bert")

    def refusal(work: Any, *given: Any, **changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            work(*given, **changes)
        return str(refused.value)

    assert refusal(drop, path, [0, LAYERS]) == (
        "student.blocks=[0, 3]: expected indices in rising order from 0 to 2, for the model has 3 "
        "blocks; a fraction spaces them evenly"
    )
    assert refusal(cut, path, hidden_size=17) == (
        "student.hidden_size=17: expected 1 to 16, as the model has"
    )
    assert refusal(cut, path, intermediate_size=0) == (
        "student.intermediate_size=0: expected 1 to 24, as the model has"
    )
    assert refusal(cut, path, num_attention_heads=3) == (
        "student.num_attention_heads=3: expected 1 to 2, as the model has"
    )
    of_heads = " that leaves heads of at most 8 units, as the model has"
    assert refusal(cut, path, num_attention_heads=1) == (
        f"student.num_attention_heads=1: expected a divisor of student.hidden_size=16{of_heads}"
    )
    assert refusal(cut, path, hidden_size=7) == (
        f"student.num_attention_heads=2: expected a divisor of student.hidden_size=7{of_heads}"
    )
    electra = save(make("electra", CLASSES), tmp_path / "electra")
    assert refusal(cut, electra) == (
        f"student.path={electra}: a model of the type electra; the width can be sliced of those of "
        "the type bert, ernie, roberta, xlm-roberta, camembert, distilbert"
    )
