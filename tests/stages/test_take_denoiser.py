"""Networks of the hub: taken over, called as they were trained to be, distilled and handed on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SanaSprintPipeline, SCMScheduler
from generators import EMOJI, shaken
from hub_pipelines import PIPELINES, TOKENS, sana, stable_diffusion
from stage_runs import metrics_of
from torch import Tensor

from stillhouse.data.latents import LatentData, of_autoencoder
from stillhouse.diffusion.solvers import ddim, few_step, uniform_grid
from stillhouse.diffusion.tangents import check_network
from stillhouse.diffusion.trigflow import denoised
from stillhouse.errors import UserError
from stillhouse.records.diffusion import Condition
from stillhouse.stages.embed_captions import EmbedCaptions
from stillhouse.stages.encode_latents import EncodeLatents
from stillhouse.stages.take_denoiser import TakeDenoiser
from stillhouse.students.denoiser_folders import load_denoiser, load_pipeline, pretrained
from stillhouse.students.denoisers import Denoiser

PICTURES = EMOJI | {"image_size": 16}


def data_node(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "_target_": "stillhouse.data.latents.LatentData",
        "_partial_": True,
        "source": PICTURES,
        "latents_path": str(folder / "latents"),
        "captions_path": str(folder / "captions"),
        "statistics": {"_target_": "stillhouse.data.latents.of_autoencoder", "_partial_": True},
        "batch_size": 4,
        "evaluation_batch_size": 5,
    } | changes


def take(folder: Path, to: Path, **changes: Any) -> dict[str, Any]:
    settings = {"path": str(folder), "data": data_node(folder), "guidance_scale": 2.0} | changes
    return metrics_of(TakeDenoiser(**settings), "teacher", to)


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns a pipeline's folder, beside its captions, latents and `taken`."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder = tmp_path_factory.mktemp(kind)
            PIPELINES[kind](folder)
            path, source = str(folder), PICTURES
            parts = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
            captions = EmbedCaptions(
                source=source, path=path, max_tokens=TOKENS, batch_size=8, **parts
            )
            metrics_of(captions, "captions", folder / "captions")
            latents = EncodeLatents(source=source, path=path, subfolder="vae", batch_size=8)
            metrics_of(latents, "latents", folder / "latents")
            take(folder, folder / "taken")
        return made[kind]

    return of


def data_of(folder: Path) -> LatentData:
    node = data_node(folder)
    return LatentData(0, **{k: v for k, v in node.items() if not k.startswith("_")})


def captioned(folder: Path, count: int = 3) -> tuple[Tensor, Condition]:
    batch = data_of(folder).collate(list(range(count)))
    return batch.x_0, batch.condition


def stored(folder: Path) -> tuple[Denoiser, Any]:
    """Return the network that was taken over, and the same as diffusers loads it."""
    denoiser = load_denoiser(str(folder / "taken"), key="teacher.path").eval()
    return denoiser, denoiser.model


def test_a_unet_is_asked_at_its_levels(taken: Callable[[str], Path]) -> None:
    folder = taken("stable_diffusion")
    denoiser, unet = stored(folder)
    x, condition = captioned(folder)
    levels = torch.tensor([0, 417, 999])
    kept = denoiser.scheduler.alphas_cumprod[levels].double()
    t = torch.acos(kept.sqrt())
    with torch.no_grad():
        F = denoiser(x, t, condition)
        noise = unet(x, levels, encoder_hidden_states=condition.embeddings).sample
    alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in (kept.sqrt(), (1 - kept).sqrt()))
    expected = (x - sigma * noise) / alpha
    torch.testing.assert_close(denoised(x, F, t), expected, rtol=1e-4, atol=1e-4)


def test_captions_of_clip_are_full_of_padding_that_is_read(taken: Callable[[str], Path]) -> None:
    _, condition = captioned(taken("stable_diffusion"))
    assert condition.mask is not None
    assert condition.mask.shape[1] == TOKENS
    assert condition.mask.all()


def test_a_unet_of_v(tmp_path: Path, taken: Callable[[str], Path]) -> None:
    """v of Stable Diffusion is F at the same angle."""
    folder = taken("stable_diffusion")
    stable_diffusion(tmp_path, prediction_type="v_prediction")
    take(folder, tmp_path / "taken", path=str(tmp_path))
    denoiser = load_denoiser(str(tmp_path / "taken"), key="teacher.path").eval()
    x, condition = captioned(folder)
    levels = torch.tensor([3, 417, 999])
    t = torch.acos(denoiser.scheduler.alphas_cumprod[levels].double().sqrt())
    with torch.no_grad():
        said = denoiser.model(x, levels, encoder_hidden_states=condition.embeddings).sample
        torch.testing.assert_close(denoiser(x, t, condition), said, rtol=1e-4, atol=1e-4)


def test_a_flow_of_films_sees_a_picture_as_one(taken: Callable[[str], Path]) -> None:
    folder = taken("wan")
    denoiser, wan = stored(folder)
    x, condition = captioned(folder)
    assert condition.embeddings is not None
    assert condition.mask is not None
    s = torch.tensor([0.2, 0.5, 0.9], dtype=torch.double)
    t = torch.atan2(s, 1 - s)
    states = torch.zeros(3, 512, condition.embeddings.shape[2])
    states[:, : condition.embeddings.shape[1]] = condition.embeddings
    length = torch.hypot(s, 1 - s).view(-1, 1, 1, 1).float()
    x_s = length * x
    with torch.no_grad():
        v = wan(x_s[:, :, None], 1000 * s, states).sample[:, :, 0]
        F = denoiser(x, t, condition)
    clean = x_s - s.view(-1, 1, 1, 1).float() * v
    torch.testing.assert_close(denoised(x, F, t), clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_nothing_said_is_the_empty_caption(taken: Callable[[str], Path], kind: str) -> None:
    folder = taken(kind)
    denoiser, _ = stored(folder)
    x, condition = captioned(folder)
    t = torch.full((3,), 0.9, dtype=torch.double)
    captions = data_of(folder).captions
    assert captions is not None
    empty = Condition(None, *captions.embedded([""] * 3))
    some = condition.dropped(torch.tensor([False, True, False]))
    with torch.no_grad():
        none = denoiser(x, t, empty)
        for said in (Condition(), condition.none()):
            torch.testing.assert_close(denoiser(x, t, said), none, rtol=1e-5, atol=1e-5)
        both = denoiser(x, t, some)
        torch.testing.assert_close(both[1], none[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both[0], denoiser(x, t, condition)[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(both[0], none[0])


@pytest.mark.parametrize("kind", PIPELINES)
def test_its_latents_are_scaled_as_it_expects(taken: Callable[[str], Path], kind: str) -> None:
    data = data_of(taken(kind))
    values = data.latents.values["train"][:2]
    settings: Any = data.latents.autoencoder.config
    found = data.collate([0, 1]).x_0
    if kind == "wan":
        mean, std = (torch.tensor(settings[f"latents_{name}"]) for name in ("mean", "std"))
        expected = (values - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    else:
        expected = settings["scaling_factor"] * values
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(data.restored(found), data.restored(data.normalised(values)))


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_pipeline_is_the_same_sampler(taken: Callable[[str], Path], kind: str) -> None:
    """By the folder's own code, from prompts, guided and in few steps, against the solvers."""
    folder = taken(kind)
    denoiser, _ = stored(folder)
    noise, condition = captioned(folder)
    data = data_of(folder)
    said = data.splits["train"].captions
    assert said is not None
    pipeline: Any = DiffusionPipeline.from_pretrained(folder / "taken", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    sampled = {"prompt": list(said[:3]), "latents": noise, "output_type": "pt"}

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        none = denoiser(x, t, condition.none())
        return torch.lerp(none, denoiser(x, t, condition), 2.0)

    with torch.no_grad():
        expected = data.restored(ddim(velocity, noise, uniform_grid(3)))
    found = pipeline(num_inference_steps=3, **sampled).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)

    times = [1.5, 0.9]
    denoiser.save(folder / "jumps", data, times={"2": times}, guidance_scale=2.0)
    jumps = load_pipeline(str(folder / "jumps"), key="models.student")
    jumps.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    with torch.no_grad():
        clean = few_step(lambda x, t: denoiser(x, t, condition), noise, times, seeds[0])
    found = jumps(num_inference_steps=2, generator=seeds[1], **sampled).images
    torch.testing.assert_close(found, data.restored(clean), rtol=0, atol=1e-2)


def test_a_student_of_sana_begins_as_its_teacher(taken: Callable[[str], Path]) -> None:
    folder = taken("sana")
    teacher, _ = stored(folder)
    path = str(folder / "taken")
    student = pretrained(data_of(folder), path=path, guidance_embeds=True).eval()
    x, condition = captioned(folder)
    t = torch.tensor([0.3, 0.9, 1.5], dtype=torch.double)
    with torch.no_grad():
        expected = teacher(x, t, condition)
        for scale in (1.0, 4.5):
            scales = torch.full((3,), scale, dtype=torch.double)
            torch.testing.assert_close(student(x, t, condition, scales), expected)
    shaken(student)
    scales = torch.full((3,), 4.5, dtype=torch.double)
    check_network(student, lambda x, t: student(x, t, condition, scales), x, t)


def test_a_student_of_sana_samples_in_the_pipeline_of_sana_sprint(
    taken: Callable[[str], Path],
) -> None:
    """diffusers' own pipeline, given the student's network, draws what ours draws."""
    folder = taken("sana")
    student = pretrained(data_of(folder), path=str(folder / "taken"), guidance_embeds=True)
    shaken(student)
    noise, condition = captioned(folder)
    theirs = SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=student.model,
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        prompt=None,
        prompt_embeds=condition.embeddings,
        prompt_attention_mask=condition.mask,
        num_inference_steps=1,
        intermediate_timesteps=None,
        max_timesteps=math.pi / 2,
        guidance_scale=4.5,
        latents=noise,
        height=8 * 32,
        width=8 * 32,
        output_type="latent",
        use_resolution_binning=False,
    ).images
    scales = torch.full((3,), 4.5, dtype=torch.double)
    with torch.no_grad():
        expected = few_step(
            lambda x, t: student(x, t, condition, scales),
            noise,
            [math.pi / 2],
            torch.Generator(),
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as refusal:
        take(folder, folder / f"refused {len(list(folder.iterdir()))}", **changes)
    return str(refusal.value)


def test_what_cannot_be_taken_over(tmp_path: Path, taken: Callable[[str], Path]) -> None:
    folder = taken("sana")
    assert refused(folder, path=str(tmp_path)).startswith(
        f"stages.teacher.path={tmp_path}: cannot be loaded: "
    )
    assert refused(folder, path=str(folder / "taken")) == (
        f"stages.teacher.path={folder / 'taken'}: it has been taken over; expected teacher.path="
        f"{folder / 'taken'}"
    )
    assert refused(folder, data=data_node(folder, captions_path=None)) == (
        "stages.teacher.data: the networks of pipelines are told captions; expected "
        "data.captions_path, of a stage of conf/stage/embed_captions.yaml"
    )
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer"]}'
    )
    assert refused(folder, path=str(tmp_path)) == (
        f"stages.teacher.path={tmp_path}: the pipeline has FluxTransformer; expected one of "
        "UNet2DConditionModel, SanaTransformer2DModel, WanTransformer3DModel"
    )
    stable_diffusion(tmp_path, prediction_type="sample")
    assert refused(folder, path=str(tmp_path)) == (
        f"stages.teacher.path={tmp_path}: its scheduler says prediction_type=sample; expected one "
        "of epsilon, v_prediction"
    )


def test_a_sana_that_is_told_other_times_has_no_input_for_guidance(
    tmp_path: Path, taken: Callable[[str], Path]
) -> None:
    folder = taken("sana")
    sana(tmp_path, timestep_scale=1.0)
    take(folder, tmp_path / "taken", path=str(tmp_path))
    path = str(tmp_path / "taken")
    with pytest.raises(UserError) as refusal:
        pretrained(data_of(folder), path=path, guidance_embeds=True)
    assert str(refusal.value) == (
        f"student.path={path}: guidance_embeds=true needs a SANA that is told times from 0 to 1, "
        "as the teachers of SANA-Sprint are; this one is told 1000 times that; expected null, and "
        "one guidance scale"
    )


def test_an_autoencoder_that_says_no_scale(tmp_path: Path, taken: Callable[[str], Path]) -> None:
    folder = taken("stable_diffusion")
    data = data_of(folder)
    latents = type(data.latents)(tmp_path, data.latents.values, data.latents.pictures)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no scaling_factor; expected of_training$"):
        of_autoencoder(latents)
    assert isinstance(data.latents.autoencoder, AutoencoderKL)
