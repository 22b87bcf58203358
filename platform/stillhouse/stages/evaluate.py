"""The stage `evaluate`: measure the recipe's models side by side."""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from stillhouse.files import write_json
from stillhouse.stages.reports import heard
from stillhouse.stages.stage import StageContext, StageResult


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run one evaluator over all roles of the recipe.

    Attributes:
        models: role -> path of its model; null leaves a role out.
        data: LightningDataModule, partial, called with (seed).
        evaluator: partial, called with (models, data); it returns numbers by role, and samples.
        seed: of the data's order, where it has one.
    """

    models: dict[str, Any]
    data: dict[str, Any]
    evaluator: dict[str, Any]
    seed: int = 0

    def __call__(self, context: StageContext) -> StageResult:
        """Evaluate; write `models.json`, and samples and pictures, if any, beside it."""
        models = {role: path for role, path in self.models.items() if path is not None}
        data = instantiate(self.data, _recursive_=False)(self.seed)
        with context.console.status(f"{context.name}: {', '.join(models)}"):
            evaluated = instantiate(self.evaluator)(models, data)
        write_json(context.output / "models.json", evaluated.models)
        if evaluated.samples:
            write_json(context.output / "samples.json", evaluated.samples)
            columns = ["model", "prompt", "continuation"]
            context.tracker.table("samples", columns, evaluated.samples)
        for name, draw in evaluated.pictures.items():
            context.tracker.picture(name, draw(context.output / f"{name}.png"))
        return StageResult(metrics=heard(context, [data]), models=evaluated.models)
