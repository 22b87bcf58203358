"""The job `sample` for a generator: pictures or points of the classes or captions asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from stillhouse.errors import UserError, did_you_mean
from stillhouse.tracking.compare import publish

PICTURE = "samples.png"
EXAMPLE = "red apple,grinning cat"


def sample_images(config: DictConfig, role: str, path: str, to: Path) -> None:
    """Draw a grid, a line a class or prompt, and write it to `samples.png`.

    Args:
        config: a `schema.Sampling`.
        role: of the model.
        path: its pipeline's folder.
        to: where the picture is written.

    Raises:
        UserError: for values that the model or the job cannot use.
    """
    for key in ("num_images", "num_inference_steps"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key}={config[key]}: expected 1 or more")

    import torch

    from stillhouse.jobs.finished_run import as_texts
    from stillhouse.stages.runner import quiet_libraries
    from stillhouse.students.denoiser_folders import load_pipeline
    from stillhouse.tracking.sample_pictures import draw_images, draw_points

    quiet_libraries()
    pipeline = load_pipeline(path, key=f"models.{role}")
    pipeline.set_progress_bar_config(disable=True)
    known: Sequence[str] = pipeline.config["classes"] or []
    captioned = pipeline.text_encoder is not None
    if captioned and (config.prompts is None or config.classes is not None):
        raise UserError(
            f"prompts: {role} is a generator that is told captions; expected "
            f"'prompts=[{EXAMPLE}]', and no classes"
        )
    if not captioned and config.prompts is not None:
        raise UserError(
            f"prompts: {role} is a generator that is told classes; expected 'classes=[…]'"
        )
    wanted = (
        as_texts(config.prompts, key="prompts", example=EXAMPLE)
        if captioned
        else _classes(config.classes, known, role)
    )
    generator = torch.Generator().manual_seed(config.seed)
    drawn: dict[str, Any] = {}
    for name in wanted or [role]:
        labels = None if captioned or not wanted else [known.index(name)] * config.num_images
        try:
            found: Any = pipeline(
                prompt=[name] * config.num_images if captioned else None,
                class_labels=labels,
                num_images=config.num_images,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=generator,
                output_type="pt",
            )
            drawn[name] = found.images.numpy()
        except ValueError as error:
            raise UserError(str(error)) from error

    def write(target: Path) -> None:
        points = next(iter(drawn.values())).ndim == 2
        if points:
            draw_points(drawn, target / PICTURE)
        else:
            draw_images(drawn, target / PICTURE)

    names = publish(write, to)
    said = f", {', '.join(wanted)}" if wanted else ""
    Console(highlight=False, soft_wrap=True).print(
        Text(f"{to}: {', '.join(names)}: {config.num_images} samples of {role} a line{said}")
    )


def _classes(given: Any, known: Sequence[str], role: str) -> list[str]:
    """Return the names of classes to draw; all where none are given."""
    if given is None:
        return list(known)
    wanted = [str(name) for name in (given if not isinstance(given, str) else given.split(","))]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"classes={name}: {role} has no such class; expected "
                f"{', '.join(known) or 'none at all'}{did_you_mean(name, known)}"
            )
    return wanted
