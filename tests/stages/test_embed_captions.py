"""Captions: what the stage `embed_captions` writes, and what networks and pipelines are told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from generators import DIGITS, EMOJI, data_of, saved, shaken, transformer
from stage_runs import metrics_of
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from stillhouse.data.pictures.captions import read_captions
from stillhouse.errors import UserError
from stillhouse.stages.embed_captions import EmbedCaptions
from stillhouse.stages.take_encoder import character_tokenizer
from stillhouse.students.denoiser_folders import load_denoiser, load_pipeline, pretrained


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text encoder with random weights, and the tokenizer of characters."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 12, "intermediate_size": 16, "max_position_embeddings": 40}
    layers: Any = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 120}
    BertModel(BertConfig(**sizes, **layers)).eval().save_pretrained(folder)
    character_tokenizer(120, "encoder").save_pretrained(folder)
    return str(folder)


def embed(path: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run the stage; return its metrics."""
    settings = {"source": EMOJI, "path": path, "max_tokens": 32, "batch_size": 5} | changes
    return metrics_of(EmbedCaptions(**settings), "captions", folder)


@pytest.fixture(scope="module")
def store(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store") / "captions"
    embed(encoder, folder)
    return str(folder)


def test_a_caption_is_what_the_encoder_says_of_it_alone(encoder: str, store: str) -> None:
    """Whatever was beside it in a batch, and however long that was."""
    data = data_of(EMOJI, captions_path=store)
    batch = data.collate([3, 0, 7], "test")
    _, embeddings, mask = batch.condition
    texts = data.source.splits["test"].captions
    assert embeddings is not None
    assert mask is not None
    assert texts is not None
    model, tokenizer = (kind.from_pretrained(encoder) for kind in (AutoModel, AutoTokenizer))
    for row, place in enumerate([3, 0, 7]):
        alone = model(**tokenizer(texts[place], return_tensors="pt")).last_hidden_state[0]
        count = int(mask[row].sum())
        assert mask[row, :count].all()
        torch.testing.assert_close(embeddings[row, :count], alone, rtol=0, atol=1e-5)
    assert len({int(row.sum()) for row in mask}) > 1


def test_captions_are_embedded_once_each_and_cut(encoder: str, tmp_path: Path) -> None:
    metrics = embed(encoder, tmp_path / "cut", max_tokens=7)
    assert metrics == {"captions": 65, "longest": 7, "width": 12}
    whole = embed(encoder, tmp_path / "whole")
    assert whole["longest"] > 7
    cut = read_captions(str(tmp_path / "cut"), key="data.captions_path")
    assert list(cut.captions) == sorted(set(cut.captions))
    assert AutoTokenizer.from_pretrained(tmp_path / "cut" / "tokenizer").model_max_length == 7


def test_networks_are_told_captions_and_not_classes(store: str) -> None:
    """The caption changes what is said; the class does not, and no caption is a third thing."""
    data = data_of(EMOJI, captions_path=store)
    assert (data.caption_width, data.told_classes) == (12, ())
    assert data.classes == data_of(EMOJI).told_classes
    network = captioned(store)
    batch: Any = data.collate([0, 1], "test")
    t = torch.full((2,), 0.8, dtype=torch.double)
    other = batch.condition._replace(labels=1 - batch.condition.labels % 2)
    swapped = batch.condition._replace(
        embeddings=batch.condition.embeddings.flip(0), mask=batch.condition.mask.flip(0)
    )
    said = network(batch.x_0, t, batch.condition)
    assert torch.equal(network(batch.x_0, t, other), said)
    assert not torch.allclose(network(batch.x_0, t, swapped), said)
    none = network(batch.x_0, t, batch.condition.none())
    assert not torch.allclose(none, said)
    dropped = network(batch.x_0, t, batch.condition.dropped(torch.tensor([True, False])))
    torch.testing.assert_close(dropped[0], none[0])
    torch.testing.assert_close(dropped[1], said[1])


def captioned(store: str) -> Any:
    return shaken(transformer(data_of(EMOJI, captions_path=store)))


def test_a_pipeline_reads_prompts_as_training_did(store: str, tmp_path: Path) -> None:
    data = data_of(EMOJI, captions_path=store)
    captioned(store).save(tmp_path, data, times={"1": [1.5708]}, guidance_scale=1.0)
    prompts = list(data.source.splits["test"].captions or ())[:2]
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = data.collate([0, 1], "test").condition
    theirs: Any = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    given = {"latents": noise, "output_type": "pt"}
    expected = theirs(
        prompt_embeds=condition.embeddings, prompt_attention_mask=condition.mask, **given
    ).images
    for pipeline in (theirs, load_pipeline(str(tmp_path), key="models.student")):
        images = pipeline(prompts, **given).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(theirs(["another", "one"], **given).images, expected)


def test_prompts_are_for_networks_that_are_told_them(tmp_path: Path) -> None:
    network = transformer(data_of(DIGITS))
    pipeline = load_pipeline(saved(network, tmp_path / "digits", DIGITS), key="models.student")
    with pytest.raises(ValueError, match="the network is told classes; expected class_labels"):
        pipeline("seven")


def test_a_teacher_of_captions_is_not_for_data_without(store: str, tmp_path: Path) -> None:
    data = data_of(EMOJI, captions_path=store)
    captioned(store).save(tmp_path, data, times={}, guidance_scale=1.0)
    assert pretrained(data, path=str(tmp_path)).model.config["caption_width"] == 12
    with pytest.raises(UserError) as caught:
        pretrained(data_of(EMOJI), path=str(tmp_path))
    assert str(caught.value) == (
        f"student.path={tmp_path}: its captions are 12 wide, those of data 0; 0 is none; expected "
        "data.captions_path as it was trained with"
    )
    assert load_denoiser(str(tmp_path), key="student.path").model.config["num_classes"] == 0


def test_captions_that_are_not_there(store: str, encoder: str, tmp_path: Path) -> None:
    cases = [
        (
            EMOJI,
            str(tmp_path),
            f"data.captions_path={tmp_path}: no captions can be read there; expected the artifact "
            "of a stage of conf/stage/embed_captions.yaml",
        ),
        (
            DIGITS,
            store,
            f"data.captions_path={store}: the pictures of digits of 8 x 8 have no captions; "
            "expected null",
        ),
        (
            {"_target_": "generators.captioned_otherwise"},
            store,
            f"data.captions_path={store}: 6 captions for train are not in it, the first is 'a "
            "lighthouse'; embed those of this data",
        ),
    ]
    for source, path, message in cases:
        with pytest.raises(UserError) as caught:
            data_of(source, captions_path=path).prepare_data()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_tokens": 41},
            "stages.captions.max_tokens=41: the encoder of stages.captions.path={} reads 40 at "
            "most",
        ),
        (
            {"source": DIGITS},
            "stages.captions.source: the pictures of digits of 8 x 8 for train have no "
            "captions; expected data=emoji, or pictures with a caption each",
        ),
    ],
)
def test_what_cannot_be_embedded(
    encoder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        embed(encoder, tmp_path / "captions", **changes)
    assert str(caught.value) == message.format(encoder)
