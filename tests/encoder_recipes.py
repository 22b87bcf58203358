"""The recipes of encoders as they compose, and what their stages are made of."""

from pathlib import Path

from commands import ROOT
from omegaconf import DictConfig

from stillhouse.config import preflight
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import Workspace, register_resolvers

STAGES = ("general", "general_enhanced", "task_adaptive", "task_specific")
RECIPES = ("ernie_tiny", "ernie_tiny_minilm", "ernie_tiny_paper")


def composed(recipe: str, *overrides: str) -> DictConfig:
    """Return a recipe's config as the command line composes it."""
    register_schemas()
    register_resolvers()
    return preflight.compose_job([f"experiment={recipe}", *overrides], ROOT / "conf")


def workspace_of(recipe: str, *overrides: str, folder: Path = Path()) -> Workspace:
    """Return the workspace of a run that has not begun."""
    return Workspace(folder / "run", folder / "cache", composed(recipe, *overrides))
