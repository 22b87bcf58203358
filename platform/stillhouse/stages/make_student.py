"""The stage `make_student`: a student as it begins, before it has learnt anything."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate

from stillhouse.stages.stage import StageContext, StageResult


@dataclass(frozen=True, kw_only=True)
class MakeStudent:
    """Write a student as a model folder with the data's tokenizer.

    Arms that go on from this artifact begin with equal parameters, whatever stages are between.

    Attributes:
        student: partial, called with (data).
        data: of the stage that trains it first, partial, called with (seed).
        seed: decides the initialisation.
    """

    student: dict[str, Any]
    data: dict[str, Any]
    seed: int

    def __call__(self, context: StageContext) -> StageResult:
        """Build the student as `stages.fit.Fit` does, and write it."""
        pl.seed_everything(self.seed, verbose=False)
        data = instantiate(self.data, _recursive_=False)(self.seed)
        student = instantiate(self.student)(data)
        student.save_pretrained(context.output)
        data.tokenizer.save_pretrained(context.output)
        return StageResult(metrics={"student_parameters": student.num_parameters()})
