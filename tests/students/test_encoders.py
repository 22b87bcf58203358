"""Encoders: what is read of them is what they compute, and what is loaded is what was asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_outputs import scores
from encoders import (
    CLASSES,
    CONFIGS,
    HEADS,
    LAYERS,
    POSITIONS,
    WIDTH,
    FakeData,
    V,
    make,
    make_batch,
    make_tokenizer,
    save,
)
from torch import Tensor
from transformers import AutoConfig, BertConfig, MPNetConfig, MPNetModel

from stillhouse.data.labelled.task import Task
from stillhouse.errors import UserError
from stillhouse.records.encoders import AttentionTap, EncoderBatch
from stillhouse.students.encoders import (
    encoder,
    has_head,
    load_encoder,
    pretrained_encoder,
    read_encoder,
)

WITH_ATTENTION = [family for family in CONFIGS if not family.startswith("deberta")]
ALL, BLOCKS = range(LAYERS + 1), range(1, LAYERS + 1)
NUMBER, SEVERAL = Task("regression", ("score",)), Task("multi_label", ("a", "b", "c"))


def told(model: Any, batch: EncoderBatch) -> Any:
    """Run a model as `transformers` does it, with everything that it can tell of itself."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_type_ids
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def probabilities(tap: AttentionTap, batch: EncoderBatch) -> Tensor:
    of_pairs = scores(tap.queries, tap.keys)
    return of_pairs.masked_fill(~batch.attention_mask[:, None, None], -torch.inf).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_and_logits_are_those_that_the_model_tells(family) -> None:
    model, batch = make(family), make_batch()
    output, expected = read_encoder(model, batch, hidden_layers=ALL), told(model, batch)
    assert list(output.hidden_states) == list(ALL)
    assert output.attention == {}
    for layer in ALL:
        torch.testing.assert_close(output.hidden_states[layer], expected.hidden_states[layer])
    torch.testing.assert_close(output.logits, expected.logits)
    assert (output.hidden_states[1] - output.hidden_states[2]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_attention_is_the_softmax_of_the_scores_whatever_computes_it(family, attention) -> None:
    batch = make_batch()
    expected = told(make(family), batch)
    output = read_encoder(make(family, attention=attention), batch, attention_layers=BLOCKS)
    assert list(output.attention) == list(BLOCKS)
    for layer, tap in output.attention.items():
        assert tap.values.shape == (3, HEADS, 9, WIDTH // HEADS)
        found = probabilities(tap, batch)
        torch.testing.assert_close(found, expected.attentions[layer - 1])
        assert found.var() > 0.005, "the attention is uniform here, and shows nothing"


@torch.no_grad()
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_values_are_what_the_attention_mixes(family) -> None:
    """The mixture, through the layer behind it, is what the attention hands on."""
    model, batch = make(family), make_batch()
    block = next(m for n, m in model.named_modules() if n.endswith("layer.1"))
    name = "attention.out_lin" if family == "distilbert" else "attention.output.dense"
    given: list[Tensor] = []
    block.get_submodule(name).register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
    tap = read_encoder(model, batch, attention_layers=[2]).attention[2]
    mixed = probabilities(tap, batch) @ tap.values
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), given[0])


def test_gradients_flow_through_the_taps_as_through_the_model() -> None:
    batch, direction = make_batch(), torch.randn(3, HEADS, 9, 8, dtype=torch.float64)
    model = make("bert", attention="sdpa")
    output = read_encoder(model, batch, hidden_layers=[2], attention_layers=[3])
    tap = output.attention[3]
    parts = [(part * direction).sum() for part in (tap.queries, tap.keys, tap.values)]
    (sum(parts) + output.hidden_states[2].square().sum()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states = told(model, batch).hidden_states[2]
    own = model.bert.encoder.layer[2].attention.self
    made = [projection(states) for projection in (own.query, own.key, own.value)]
    # By head, as the model's own code cuts them.
    cut = [part.view(3, 9, HEADS, 8).transpose(1, 2) for part in made]
    expected = sum((part * direction).sum() for part in cut) + states.square().sum()
    expected.backward()
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_there_is_one_forward_and_nothing_stays_hooked(family) -> None:
    model, calls = make(family), []
    model.base_model.embeddings.register_forward_hook(lambda *given: calls.append(1))
    read_encoder(model, make_batch(), hidden_layers=ALL, attention_layers=BLOCKS)
    assert len(calls) == 1
    with pytest.raises(IndexError):
        read_encoder(model, make_batch()._replace(input_ids=torch.full((3, 9), V)))
    hooks = [m._forward_hooks | m._forward_pre_hooks for m in model.modules()]
    assert sum(map(len, hooks)) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padding_changes_no_real_position(family) -> None:
    model, batch = make(family, attention="sdpa"), make_batch()
    taps = {"hidden_layers": ALL, "attention_layers": BLOCKS}
    padded = read_encoder(model, batch, **taps)
    alone = EncoderBatch(*(None if f is None else f[1:2, :4] for f in batch[:3]))
    expected = read_encoder(model, alone, **taps)
    for layer in ALL:
        found = padded.hidden_states[layer][1:2, :4]
        torch.testing.assert_close(found, expected.hidden_states[layer])
    torch.testing.assert_close(padded.logits[1:2], expected.logits)


@torch.no_grad()
def test_types_of_tokens_count_where_the_model_knows_them() -> None:
    batch = make_batch()
    untyped = batch._replace(token_type_ids=None)
    for family, knows in (("bert", True), ("ernie", True), ("electra", True), ("roberta", False)):
        model = make(family)
        change = read_encoder(model, batch).logits - read_encoder(model, untyped).logits
        assert (change.abs().max() > 1e-3) == knows


def test_a_body_has_no_logits() -> None:
    assert read_encoder(make("bert", None), make_batch()).logits is None


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_attention_that_queries_and_keys_do_not_tell_is_refused(family) -> None:
    with pytest.raises(UserError) as refused:
        read_encoder(make(family), make_batch(), attention_layers=[1, 3])
    assert str(refused.value) == (
        f"attention of layers [1, 3]: a model of the type {family} adds relative positions to what "
        "queries and keys say, so its attention cannot be matched; take a model of the type bert, "
        "ernie, roberta, xlm-roberta, camembert, electra, distilbert"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "limit"), [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("distilbert", 20)]
)
def test_a_text_that_is_longer_than_the_table_of_positions(family, limit) -> None:
    model = make(family)
    assert read_encoder(model, make_batch([limit])).logits.isfinite().all()
    with pytest.raises(UserError) as refused:
        read_encoder(model, make_batch([limit + 1]))
    assert str(refused.value) == (
        f"data.sequence_length: there is a text of {limit + 1} tokens, and the {family} model has "
        f"{limit} positions; expected data.sequence_length={limit} or less"
    )


@torch.no_grad()
def test_a_model_without_a_table_takes_any_length() -> None:
    assert read_encoder(make("deberta-v2"), make_batch([40])).logits.isfinite().all()


SHAPE: dict[str, int] = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


@pytest.mark.parametrize("task", [None, CLASSES, NUMBER, SEVERAL])
def test_an_encoder_from_its_shape(task) -> None:
    torch.manual_seed(0)
    student: Any = encoder(FakeData(task), **SHAPE, max_position_embeddings=30)
    config = student.config
    assert student.training
    assert (config.model_type, config.vocab_size, config.pad_token_id) == ("bert", V, 1)
    assert config.max_position_embeddings == 30
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    output = read_encoder(student, make_batch(), hidden_layers=[2])
    assert output.hidden_states[2].shape == (3, 9, 12)
    if task is None:
        assert output.logits is None
        return
    assert output.logits.shape == (3, task.num_labels)
    assert [config.id2label[i] for i in range(task.num_labels)] == list(task.names)
    assert config.label2id == {name: i for i, name in enumerate(task.names)}


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (CLASSES, "single_label_classification"),
        (NUMBER, "regression"),
        (SEVERAL, "multi_label_classification"),
    ],
)
def test_a_folder_says_what_its_head_is_for(task, problem, tmp_path) -> None:
    path = save(encoder(FakeData(task), **SHAPE), tmp_path)
    assert AutoConfig.from_pretrained(path).problem_type == problem
    assert has_head(path, key="student")
    assert not has_head(save(encoder(FakeData(None), **SHAPE), tmp_path / "b"), key="student")


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(UserError) as refused:
        encoder(FakeData(), **SHAPE | {"hidden_size": 13})
    assert str(refused.value) == (
        "student.hidden_size=13: expected a multiple of student.num_attention_heads=3"
    )


def test_fewer_positions_than_the_data_have_tokens(tmp_path) -> None:
    path = save(make("roberta"), tmp_path)
    kept = pretrained_encoder(FakeData(sequence_length=POSITIONS - 2), path=path)
    assert kept.config.model_type == "roberta"
    data = FakeData(sequence_length=POSITIONS)
    with pytest.raises(UserError) as refused:
        pretrained_encoder(data, path=path)
    assert str(refused.value) == (
        f"data.sequence_length=20: student.path={path} has 18 positions; expected 18 or less"
    )
    with pytest.raises(UserError) as refused:
        encoder(data, **SHAPE, max_position_embeddings=19)
    assert str(refused.value) == (
        "data.sequence_length=20: student has 19 positions; expected 19 or less"
    )


def load(path: str, task: Task | None = CLASSES, **changes: str) -> Any:
    settings = {"dtype": "float64", "attn_implementation": "sdpa", "key": "student"}
    return load_encoder(path, task=task, **(settings | changes))


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_classifier_is_loaded_with_its_head(family, tmp_path) -> None:
    model, batch = make(family), make_batch()
    path = save(model, tmp_path)
    loaded = load(path, attn_implementation="eager")
    torch.testing.assert_close(
        read_encoder(loaded, batch).logits, read_encoder(model, batch).logits
    )
    body = read_encoder(load(path, None, attn_implementation="eager"), batch, hidden_layers=[3])
    assert body.logits is None
    expected = read_encoder(model, batch, hidden_layers=[3]).hidden_states[3]
    torch.testing.assert_close(body.hidden_states[3], expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_a_body_gets_a_head_that_the_seed_decides(family, tmp_path) -> None:
    body, batch = make(family, None), make_batch()
    path, logits = save(body, tmp_path), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        student = pretrained_encoder(FakeData(), path=path, dtype="float64")
        assert student.training
        output = read_encoder(student.eval(), batch, hidden_layers=[3])
        expected = read_encoder(body, batch, hidden_layers=[3]).hidden_states[3]
        torch.testing.assert_close(output.hidden_states[3], expected)
        logits.append(output.logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_bad_input(tmp_path: Path) -> None:
    def refusal(path: str, task: Task | None = CLASSES, **changes: str) -> str:
        with pytest.raises(UserError) as refused:
            load(path, task, **changes)
        return str(refused.value)

    path = save(make("bert"), tmp_path / "bert")
    ending = "; take a model without a head, or one that was fine-tuned on this task"
    head = f"student.path={path}: its head is made for no, yes, the data for "
    assert refusal(path, SEVERAL) == f"{head}the multi_label of a, b, c{ending}"
    number = save(encoder(FakeData(NUMBER), **SHAPE), tmp_path / "number")
    assert refusal(number, Task("multi_label", ("score",))) == (
        f"student.path={number}: its head is made for the regression of score, the data for the "
        f"multi_label of score{ending}"
    )
    other = Task("classification", ("yes", "no"))
    assert refusal(path, other) == f"{head}the classification of yes, no{ending}"
    assert load(path, Task("classification", ("bad", "good"))).config.id2label[1] == "good"
    assert refusal(path, dtype="float12") == (
        "student.dtype=float12: expected auto, float32, bfloat16 or float16"
    )
    nowhere = str(tmp_path / "nowhere")
    assert refusal(nowhere) == f"student.path={nowhere}: there is no such folder"
    mpnet = tmp_path / "mpnet"
    config = MPNetConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    MPNetModel(config).save_pretrained(mpnet)
    assert refusal(str(mpnet)) == (
        f"student.path={mpnet}: a model of the type mpnet; expected an encoder of the type "
        f"{', '.join(CONFIGS)}"
    )


def test_a_folder_whose_weights_are_another_model_s(tmp_path: Path) -> None:
    path = save(make("distilbert"), tmp_path)
    BertConfig(**CONFIGS["bert"].to_dict()).save_pretrained(path)
    with pytest.raises(UserError) as refused:
        load(path)
    message = str(refused.value)
    assert message.startswith(f"student.path={path}: 53 weights of the encoder are missing, the ")
    assert message.endswith(
        " first bert.embeddings.LayerNorm.bias; expected a model saved with save_pretrained"
    )


def test_a_model_with_another_tokenizer(tmp_path: Path) -> None:
    path = save(make("bert"), tmp_path)
    make_tokenizer(V - 1).save_pretrained(path)
    with pytest.raises(UserError) as refused:
        pretrained_encoder(FakeData(), path=path)
    assert str(refused.value) == (
        f"student.path={path}: its tokenizer has {V - 1} tokens, the data's {V}, and 1 of them "
        f"differ (the first: 'w{V - 1}'); teacher, student and data read the same token ids: set "
        "data.tokenizer_path to the model that the others follow, and take models of one family, "
        "or student=encoder, which is made for any"
    )
