"""The features in which generators of pictures are measured: a group within the evaluation's."""

import shutil
from pathlib import Path

import pytest
from commands import ROOT, run_here
from omegaconf import DictConfig, OmegaConf

from stillhouse.config import preflight, signatures
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import Workspace, register_resolvers

CONF = ROOT / "conf"
NETWORK = "evaluation/features=efficientnet_lite0"


def compose(*overrides: str, conf: Path = CONF) -> DictConfig:
    """Compose and bind, as before the first stage."""
    register_schemas()
    register_resolvers()
    config = preflight.compose_job([*overrides], conf)
    signatures.check(config, [name for name, node in config.stages.items() if node is not None])
    return config


def needs(*overrides: str) -> set[str]:
    """Return the stages that the evaluation of scm on emoji needs, its models' own left out."""
    config = compose("experiment=scm", "data=emoji", *overrides)
    named = Workspace(Path("run"), Path("cache"), config).needs("evaluate")
    return named - {"teacher", "distil", "fetch_emoji_font", "fetch_emoji_names"}


@pytest.mark.parametrize("recipe", ["scm", "tbcm", "instaflow"])
def test_any_pictures_are_measured_in_the_features_of_imagenet(recipe: str) -> None:
    evaluation = compose(f"experiment={recipe}", NETWORK).evaluation
    own = compose(f"experiment={recipe}").evaluation
    assert evaluation.features._target_.endswith(".efficientnet_lite0")
    assert own.features == own.classifier == evaluation.classifier


def test_only_what_is_looked_with_is_fetched_or_trained() -> None:
    assert needs() == {"classifier"}
    assert needs(NETWORK) == {"classifier", "fetch_efficientnet_lite0"}
    assert needs(NETWORK, "evaluation.classifier=null") == {"fetch_efficientnet_lite0"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["evaluation/features=null"],
            "evaluation/features=null: a group takes the name of an option; expected classifier, "
            "efficientnet_lite0",
        ),
        (
            ["evaluation/features=efficientnet"],
            "evaluation/features=efficientnet: the group evaluation/features has no such option; "
            "expected classifier, efficientnet_lite0; did you mean 'efficientnet_lite0'?",
        ),
        (
            [NETWORK, "evaluation.features.imagesize=3"],
            "evaluation.features.imagesize: the config has no such key; did you mean "
            "'evaluation.features.image_size'?",
        ),
    ],
)
def test_a_mistake_in_the_group_is_told_with_its_options(
    capfd: pytest.CaptureFixture[str], here: Path, overrides: list[str], line: str
) -> None:
    done = run_here(capfd, "experiment=scm", *overrides)
    assert (done.code, done.err) == (2, f"error: {line}\n")


def test_values_go_with_their_option(tmp_path: Path) -> None:
    """A recipe's size of the network's input is not handed to a classifier that the user chose."""
    conf = shutil.copytree(CONF, tmp_path / "conf")
    recipe = (
        "# @package _global_\ndefaults:\n  - scm\n  - _self_\n"
        "  - override /evaluation/features: efficientnet_lite0\n"
        "recipe: mine\nevaluation:\n  features:\n    image_size: 96\n"
    )
    (conf / "experiment/mine.yaml").write_text(recipe)
    assert compose("experiment=mine", conf=conf).evaluation.features.image_size == 96
    chosen = compose("experiment=mine", "evaluation/features=classifier", conf=conf).evaluation
    option = OmegaConf.load(CONF / "evaluation/features/classifier.yaml")
    assert set(chosen.features) == set(map(str, option))
