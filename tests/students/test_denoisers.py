"""Generators: built, saved as pipelines, loaded, and run without this project."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.data.images import ImageData
from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.solvers import ddim, few_step, uniform_grid
from stillhouse.diffusion.tangents import check_network, functional
from stillhouse.diffusion.times import uniform
from stillhouse.errors import UserError
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.pretraining.denoising import denoising, of_flow
from stillhouse.records.diffusion import Condition
from stillhouse.students.denoiser_folders import load_denoiser, pretrained
from stillhouse.students.denoisers import Denoiser, point_network, small_dit, unet
from stillhouse.students.modeling_few_step import SmallDiT

DIGITS = {"_target_": "stillhouse.data.pictures.digits.digits", "validation": 20, "test": 20}
TIMES = {"1": [1.5708], "2": [1.5708, 1.1]}


def digits() -> ImageData:
    return ImageData(0, source=DIGITS, batch_size=4, evaluation_batch_size=10)


def points() -> ImageData:
    mixture = {"_target_": "stillhouse.data.pictures.mixtures.ring"}
    source = {
        "_target_": "stillhouse.data.pictures.mixtures.drawn",
        "mixture": mixture,
        "train_points": 50,
        "held_out_points": 10,
    }
    return ImageData(0, source=source, batch_size=4, evaluation_batch_size=10)


def shaken(denoiser: Denoiser) -> Denoiser:
    """A network that begins with zeros says nothing: give every parameter a value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser.eval()


def dit(guidance_embeds: bool = False) -> Denoiser:
    build = partial(
        small_dit, patch_size=2, width=16, num_layers=2, num_attention_heads=2, mlp_ratio=2.0
    )
    return shaken(build(digits(), guidance_embeds=guidance_embeds))


BUILDERS = {
    "dit": (dit, digits),
    "unet": (
        lambda: shaken(unet(digits(), widths=[16, 16], layers_per_block=1, norm_num_groups=8)),
        digits,
    ),
    "points": (
        lambda: shaken(point_network(points(), width=16, num_layers=2, guidance_embeds=False)),
        points,
    ),
}


def inputs(data: ImageData, count: int = 5) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *data.image_shape, generator=generator)
    labels = torch.arange(count) % len(data.classes)
    return x, torch.linspace(0.2, 1.5, count).double(), Condition(labels=labels)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_network_is_the_same_network(name: str, tmp_path: Path) -> None:
    build, data = BUILDERS[name]
    denoiser = build()
    denoiser.save(tmp_path, data(), times={}, guidance_scale=1.0)
    loaded = load_denoiser(str(tmp_path), key="teacher.path").eval()
    for said in (inputs(data())[2], Condition()):
        x, t, _ = inputs(data())
        torch.testing.assert_close(loaded(x, t, said), denoiser(x, t, said))


@pytest.mark.parametrize("name", BUILDERS)
def test_it_has_a_tangent(name: str) -> None:
    build, data = BUILDERS[name]
    denoiser = build()
    x, t, condition = inputs(data())
    check_network(denoiser, lambda x, t: denoiser(x, t, condition), x, t)


@pytest.mark.parametrize("name", BUILDERS)
def test_labels_matter_and_none_is_a_class_of_its_own(name: str) -> None:
    build, data = BUILDERS[name]
    denoiser = build()
    x, t, condition = inputs(data())
    outputs = [
        denoiser(x, t, said)
        for said in (condition, condition.none(), Condition(labels=condition.labels.flip(0)))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[i] - outputs[j]).abs().max() > 1e-4


def test_a_guidance_input_begins_without_an_effect(tmp_path: Path) -> None:
    """The student begins as its teacher, whatever it is told."""
    teacher = dit()
    teacher.save(tmp_path, digits(), times={}, guidance_scale=1.0)
    student = pretrained(digits(), path=str(tmp_path), guidance_embeds=True).eval()
    x, t, condition = inputs(digits())
    for scale in (1.0, 4.0):
        said = student(x, t, condition, torch.full((5,), scale).double())
        torch.testing.assert_close(said, teacher(x, t, condition))
    with torch.no_grad():
        student.model.conditioning.guidance.weight.add_(0.1)
    scales = [torch.full((5,), scale).double() for scale in (1.0, 4.0)]
    first, second = (student(x, t, condition, scale) for scale in scales)
    assert (first - second).abs().max() > 1e-4


def test_captions_are_read_and_an_empty_one_is_none() -> None:
    torch.manual_seed(0)
    model = SmallDiT(sample_size=4, in_channels=3, width=16, num_layers=1, caption_width=6)
    denoiser = shaken(Denoiser(model))
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 1.2]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    said = Condition(embeddings=torch.randn(2, 3, 6), mask=mask)
    assert said.embeddings is not None
    hidden = said._replace(embeddings=said.embeddings.masked_fill(~mask[..., None], 9.0))
    torch.testing.assert_close(denoiser(x, t, said), denoiser(x, t, hidden))
    torch.testing.assert_close(denoiser(x, t, said.none()), denoiser(x, t, Condition()))
    assert (denoiser(x, t, said) - denoiser(x, t, Condition())).abs().max() > 1e-4


ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("stillhouse"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.load(folder + "/noise.pt", weights_only=True)
    generator = torch.Generator().manual_seed(7)
    asked = {"class_labels": [0, 1, 2, 3], "num_inference_steps": 2, "latents": noise}
    drawn = pipeline(**asked, generator=generator)
    if noise.ndim == 4:
        assert {(image.size, image.mode) for image in drawn.images} == {((8, 8), "L")}
        generator.manual_seed(7)
        drawn = pipeline(**asked, generator=generator, output_type="pt")
    torch.save(drawn.images, folder + "/out.pt")
"""


def test_they_run_without_the_project_and_draw_the_same(tmp_path: Path) -> None:
    """Flows with and without guidance, consistency models, of every kind of network."""
    expected: dict[str, Tensor] = {}
    for name, (build, data_of) in BUILDERS.items():
        for scale, times in ((1.0, {}), (3.0, {}), (1.0, TIMES)):
            folder = tmp_path / f"{name}-{scale}-{len(times)}"
            folder.mkdir()
            denoiser, data = build(), data_of()
            denoiser.save(folder, data, times=times, guidance_scale=scale)
            noise, _, condition = inputs(data, 4)
            torch.save(noise, folder / "noise.pt")
            scales = torch.full((4,), scale).double()

            def velocity(x: Tensor, t: Tensor, of=denoiser, said=condition, w=scales) -> Tensor:
                return guided(of, x, t, said, w)

            with torch.no_grad():
                if times:
                    generator = torch.Generator().manual_seed(7)
                    ours = few_step(velocity, noise, TIMES["2"], generator)
                else:
                    ours = ddim(velocity, noise, uniform_grid(2))
            expected[str(folder)] = data.restored(ours)
    subprocess.run([sys.executable, "-c", ALONE, *expected], check=True, cwd=tmp_path)
    for folder, ours in expected.items():
        theirs = torch.load(Path(folder) / "out.pt", weights_only=True)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5, msg=folder)


def test_the_wrapper_of_a_flow_is_inside_the_tangent() -> None:
    denoiser = dit().double()
    x, t, condition = inputs(digits())
    x = x.double()
    _, J = functional(lambda x, t: denoiser(x, t, condition), x, t, x, torch.ones_like(t))
    h = 1e-5
    with torch.no_grad():
        ahead = denoiser(x + h * x, t + h, condition)
        behind = denoiser(x - h * x, t - h, condition)
    torch.testing.assert_close(J, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "student.patch_size=3: expected a divisor of the side of square"),
        ({"width": 18}, "student.width=18, student.num_attention_heads=2: expected a multiple of"),
    ],
)
def test_shapes_that_do_not_divide(change, message: str) -> None:
    settings = {"patch_size": 2, "width": 16, "num_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError) as refusal:
        small_dit(digits(), **(settings | change), mlp_ratio=2.0, guidance_embeds=False)
    assert message in str(refusal.value)


def test_folders_that_hold_no_generator(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        load_denoiser(str(tmp_path), key="teacher.path")
    assert str(refusal.value) == (
        f"teacher.path={tmp_path}: no model_index.json can be read there; expected the model "
        "folder of a run of the family timestep"
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "Flux"]}))
    with pytest.raises(UserError) as refusal:
        load_denoiser(str(tmp_path), key="teacher.path")
    assert str(refusal.value) == (
        f"teacher.path={tmp_path}: its network is Flux; expected one of SmallDiT, PointNetwork, "
        "UNet2DModel, UNet2DConditionModel, SanaTransformer2DModel, WanTransformer3DModel"
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError) as refusal:
        load_denoiser(str(tmp_path), key="teacher.path")
    assert str(refusal.value) == (
        f"teacher.path={tmp_path}: a FluxPipeline of diffusers; take its network over with a stage "
        "of conf/stage/take_denoiser.yaml, and name teacher.path=${artifact:<stage>}"
    )


def test_a_generator_of_another_shape(tmp_path: Path) -> None:
    dit().save(tmp_path, digits(), times={}, guidance_scale=1.0)
    with pytest.raises(UserError) as refusal:
        pretrained(points(), path=str(tmp_path))
    assert str(refusal.value) == (
        f"student.path={tmp_path}: its samples are 1 x 8 x 8, those of data are 2"
    )


@pytest.mark.parametrize(("share", "unconditional"), [(0.0, True), (0.1, False)])
def test_samples_without_a_condition_are_trained_or_unknown(
    share: float, unconditional: bool
) -> None:
    student = small_dit(
        digits(),
        patch_size=2,
        width=16,
        num_layers=1,
        num_attention_heads=2,
        mlp_ratio=2.0,
        guidance_embeds=False,
        unconditional=unconditional,
    )
    assert student.model.conditioning.classes.num_embeddings == 10 + unconditional
    batch = next(digits().evaluation_batches("test"))
    networks, phase = Networks(student, None, None), Phase(0, 1)
    train = partial(denoising, networks, batch, phase, torch.Generator())
    with pytest.raises(UserError) as refusal:
        train(times=uniform, weighting=of_flow, condition_dropout=share)
    assert str(refusal.value) == (
        f"method.condition_dropout={share}, student.unconditional={str(unconditional).lower()}: "
        "samples without a condition are either trained, so that the network can be guided, or "
        "unknown; expected a share above 0 with true, or 0 with false"
    )
    other = 0.1 if unconditional else 0.0
    assert train(times=uniform, weighting=of_flow, condition_dropout=other).total > 0
