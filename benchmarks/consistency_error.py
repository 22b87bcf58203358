"""Where along the teacher's path a few-step student errs: `error` against the path's end, by time.

    python benchmarks/consistency_error.py run=<directory> [samples=500]

The teacher, integrated in a hundred steps from noise under the conditions of the test split, passes
every time t once; from there the student jumps. `error` is the root mean square of the jump's
difference to where the teacher arrives, in deviations of the data; `frechet` is the distance of
the jumps' features to the training data's, in the features that the run was evaluated with.
"""

import sys
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.solvers import all_at, ddim, uniform_grid
from stillhouse.diffusion.trigflow import denoised
from stillhouse.evaluation.distances import frechet_distance
from stillhouse.jobs.finished_run import read_run
from stillhouse.students.denoiser_folders import load_denoiser, pipeline_index

STEPS, SHOWN = 100, 10


def main(*words: str) -> None:
    """Print the table."""
    settings = {"samples": "500"} | dict(word.split("=", 1) for word in words)
    count = int(settings["samples"])
    run = read_run(OmegaConf.create({"run": str(Path(settings["run"]))}))
    data = instantiate(run.located(run.config["data"]), _recursive_=False)(0)
    features = instantiate(run.located(run.config["evaluation"]["features"]))
    student = load_denoiser(run.model("student"), key="run").eval()
    teacher = load_denoiser(run.model("teacher"), key="run").eval()
    scale = float(pipeline_index(run.model("student"), key="run")["guidance_scale"])
    condition = data.collate(range(len(data.samples("test"))), "test").condition.first(count)
    noise = torch.randn(
        min(count, len(data.samples("test"))),
        *data.image_shape,
        generator=torch.Generator().manual_seed(0),
    )
    scales = torch.full((len(noise),), scale, dtype=torch.double)
    known = features(data.restored(data.normalised(data.samples("train").values))).features
    passed: list[tuple[Tensor, float]] = []
    with torch.no_grad():
        end = ddim(
            lambda x, t: guided(teacher, x, t, condition, scales),
            noise,
            uniform_grid(STEPS),
            lambda x, t, _: passed.append((x, t)),
        )
        print("| t | error | frechet |\n|---|---|---|")
        for x_t, t in passed[::SHOWN]:
            times = all_at(x_t, t)
            x_0 = denoised(x_t, student(x_t, times, condition, scales), times)
            error = float((x_0 - end).square().mean().sqrt())
            distance = float(frechet_distance(features(data.restored(x_0)).features, known))
            print(f"| {t:.2f} | {error:.3f} | {distance:.2f} |")
        distance = float(frechet_distance(features(data.restored(end)).features, known))
    print(f"| teacher | | {distance:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
