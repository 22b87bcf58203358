"""Latents: what the stage `encode_latents` writes, and what is learnt, decoded and handed on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from generators import DIGITS, EMOJI, POINTS, data_of, shaken, transformer
from stage_runs import metrics_of

from stillhouse.data.latents import LatentData
from stillhouse.diffusion.solvers import few_step
from stillhouse.errors import UserError
from stillhouse.stages.encode_latents import EncodeLatents
from stillhouse.students.denoiser_folders import load_pipeline

PICTURES = EMOJI | {"image_size": 16}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder with random weights, inside of a pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    return str(folder)


def encode(path: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run the stage; return its metrics."""
    settings = {"source": PICTURES, "path": path, "subfolder": "vae", "batch_size": 5} | changes
    return metrics_of(EncodeLatents(**settings), "latents", folder)


@pytest.fixture(scope="module")
def store(vae: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store") / "latents"
    metrics = encode(vae, folder)
    assert metrics == {"pictures": 64, "channels": 4, "height": 8, "width": 8}
    return str(folder)


def latents_of(store: str, source: dict[str, Any] = PICTURES, **changes: Any) -> LatentData:
    settings = {"batch_size": 4, "evaluation_batch_size": 5} | changes
    return LatentData(0, latents_path=store, source=source, **settings)


def test_what_is_learnt_are_the_latents_of_the_same_pictures(vae: str, store: str) -> None:
    data = latents_of(store)
    pixels = data.source.splits["test"].values[[3, 0]]
    own = AutoencoderKL.from_pretrained(vae, subfolder="vae")
    with torch.no_grad():
        expected = own.encode(2 * pixels - 1).latent_dist.mean
        batch = data.collate([3, 0], "test")
        torch.testing.assert_close(batch.x_0 * data.std + data.mean, expected)
        decoded = (own.decode(expected).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(data.restored(batch.x_0), decoded, rtol=0, atol=1e-5)
    labels = data.source.splits["test"].labels
    assert labels is not None
    assert torch.equal(batch.condition.labels, labels[[3, 0]])
    train = data.normalised(data.samples("train").values).double()
    assert float(train.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(data.pixels("test"), data.source.splits["test"].values)
    assert len(latents_of(store, max_evaluation_rows=3).pixels("test")) == 3


def test_the_pipeline_decodes(store: str, tmp_path: Path) -> None:
    data = latents_of(store)
    network = shaken(transformer(data, patch_size=2))
    network.save(tmp_path, data, times={"1": [1.5708]}, guidance_scale=1.0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = data.collate([0, 1], "test").condition
    with torch.no_grad():
        x_0 = few_step(lambda x, t: network(x, t, condition), noise, [1.5708], torch.Generator())
    given = {"class_labels": condition.labels, "latents": noise}
    theirs: Any = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for pipeline in (theirs, load_pipeline(str(tmp_path), key="models.student")):
        drawn = pipeline(**given, output_type="pt").images
        torch.testing.assert_close(drawn, data.restored(x_0), rtol=0, atol=1e-4)
    assert theirs(**given).images[0].size == (16, 16)


def test_an_autoencoder_without_a_distribution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    narrow = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny: Any = AutoencoderTiny(**narrow, **blocks)
    tiny.save_pretrained(tmp_path / "tiny")
    encode(str(tmp_path / "tiny"), tmp_path / "latents", subfolder=None)
    data = latents_of(str(tmp_path / "latents"))
    pixels = data.source.splits["test"].values[:2]
    with torch.no_grad():
        expected = tiny.eval().encode(2 * pixels - 1).latents
    torch.testing.assert_close(data.samples("test").values[:2], expected, rtol=0, atol=1e-5)


def test_latents_of_other_pictures(store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        latents_of(store, {"_target_": "generators.captioned_otherwise"}).collate([0])
    assert str(caught.value) == (
        f"data.latents_path={store}: its pictures for train are others than those of a folder; "
        "encode those of this source"
    )
    with pytest.raises(UserError) as caught:
        latents_of(str(tmp_path)).collate([0])
    assert str(caught.value) == (
        f"data.latents_path={tmp_path}: no latents can be read there; expected the artifact of a "
        "stage of conf/stage/encode_latents.yaml"
    )


@pytest.mark.parametrize(("source", "shape"), [(DIGITS, "1 x 8 x 8"), (POINTS, "2")])
def test_what_the_autoencoder_does_not_read(
    vae: str, tmp_path: Path, source: dict[str, Any], shape: str
) -> None:
    with pytest.raises(UserError) as caught:
        encode(vae, tmp_path / "latents", source=source)
    assert str(caught.value) == (
        f"stages.latents.source: its samples are {shape}; the autoencoder reads pictures of 3 "
        "channels; expected data.source.mode=rgb for 3"
    )


def test_what_is_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stages\.latents\.path=.*: no autoencoder can be loaded"):
        encode(str(tmp_path), tmp_path / "latents", subfolder=None)
    transformer(data_of(PICTURES)).model.save_pretrained(tmp_path / "dit")
    with pytest.raises(UserError, match=r"^stages\.latents\.path=.*autoencoder"):
        encode(str(tmp_path / "dit"), tmp_path / "again", subfolder=None)


def test_pictures_that_come_back_smaller_are_refused(vae: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        encode(vae, tmp_path / "latents", source=EMOJI | {"image_size": 9})
    assert str(caught.value) == (
        "stages.latents.source: pictures of 9 x 9 come back as 8 x 8; set data.source.image_size "
        "to a multiple of what the autoencoder shrinks by"
    )
