"""Lineage: what a stage was made from and what it made, as W&B Artifacts.

An artifact is named by its stage and fingerprint. By reference it has one entry, the address and
the checksum of the folder's manifest, which holds the checksum of every file: nothing of the folder
is sent, and weights of any size cost nothing to name. Whoever uses an artifact declares it alike;
W&B takes equal content under one name for one version, so that the edges of several runs meet.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.files import MANIFEST


@dataclass(frozen=True)
class StageArtifact:
    """A stage's finished artifact.

    Attributes:
        stage: name of the stage in the recipe.
        kind: class of the stage.
        fingerprint: hash of everything that decides the content.
        folder: where it really lies.
    """

    stage: str
    kind: str
    fingerprint: str
    folder: Path

    @property
    def name(self) -> str:
        """Name among W&B's artifacts."""
        return f"{self.stage}-{self.fingerprint[:20]}"


def as_wandb_artifact(made: StageArtifact, *, upload: bool) -> Any:
    """Return a `wandb.Artifact` that refers to the folder, or with `upload` holds its files."""
    import wandb

    manifest = json.loads((made.folder / MANIFEST).read_text())
    facts = {
        "fingerprint": made.fingerprint,
        "folder": str(made.folder),
        "files": len(manifest["files"]),
        "metrics": manifest["metrics"],
        "models": manifest["models"],
    }
    artifact = wandb.Artifact(made.name, made.kind, metadata=facts)
    if upload:
        # From where they lie: no second copy in W&B's own folders.
        artifact.add_dir(str(made.folder), policy="immutable", skip_cache=True)
    else:
        artifact.add_reference((made.folder / MANIFEST).resolve().as_uri(), MANIFEST)
    return artifact
