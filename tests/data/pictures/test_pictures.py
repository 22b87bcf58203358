"""What sources share: splits by chance that never overlap, YAML files that list every parameter."""

import pytest
import torch
from commands import ROOT, TINY, run_here
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from stillhouse.config import signatures
from stillhouse.data.pictures.digits import digits
from stillhouse.data.pictures.pictures import Samples, held_out, held_out_places, mixed
from stillhouse.errors import UserError

SOURCES = ["digits", "emoji", "hub_pictures", "image_folder", "mnist"]
COUNTED = Samples(torch.arange(100).float()[:, None], torch.arange(100) // 10, None)


def test_every_sample_is_in_one_split():
    splits = held_out(COUNTED, validation=20, test=30)
    parts = {split: part.values.flatten().tolist() for split, part in splits.items()}
    assert sorted(place for part in parts.values() for place in part) == list(range(100))
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 50,
        "validation": 20,
        "test": 30,
    }
    assert parts["test"] != list(range(30))


def test_the_number_of_samples_alone_decides_and_a_limit_keeps_the_split():
    whole = held_out_places(100, validation=20, test=30)
    few = held_out_places(100, validation=20, test=30, most=5)
    for split, places in whole.items():
        assert torch.equal(few[split], places[:5])
        assert places.tolist() != sorted(places.tolist()), (
            "by chance, so that a few are of any kind"
        )


def test_the_first_of_mixed_samples_are_of_every_class():
    samples = mixed(COUNTED)
    assert torch.equal(samples.labels, samples.values.flatten().long() // 10)
    assert sorted(samples.values.flatten().tolist()) == list(range(100))
    assert len(set(samples.labels[:30].tolist())) == 10


@pytest.mark.parametrize(("validation", "test"), [(50, 50), (0, 100), (2000, 1)])
def test_nothing_left_for_training(validation, test):
    with pytest.raises(UserError) as refusal:
        held_out(COUNTED, validation=validation, test=test)
    assert str(refusal.value) == (
        f"data.source.validation={validation} and data.source.test={test}: of 100 pictures none is "
        "left for training; hold fewer out, or give more pictures"
    )


def test_digits_that_are_all_held_out():
    with pytest.raises(UserError) as refusal:
        digits(validation=1700, test=97)
    assert str(refusal.value) == (
        "data.source.validation=1700 and data.source.test=97: of 1797 pictures none is left for "
        "training; hold fewer out, or give more pictures"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_yaml_file_lists_every_parameter_and_fits(name):
    node = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")
    for part in (node, node.source):
        wanted = set(signatures.keywords_of(get_object(part._target_)) or {})
        assert set(part) - signatures.CONTROL_KEYS == wanted
    for key in ("id", "folder_path"):
        if key in node.source:
            node.source[key] = "x"
    for path, part in (("data", node), ("data.source", node.source)):
        signatures.check_node(path, part)


@pytest.mark.parametrize("name", ["hub_pictures", "image_folder"])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mode", "RGB", "grey or rgb"),
        ("mode", None, "grey or rgb"),
        ("image_size", 0, "1 or more, or null"),
        ("validation", 0, "1 or more"),
        ("max_pictures", -1, "1 or more, or null"),
    ],
)
def test_a_value_outside_of_its_range(name, key, value, expected):
    node = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml").source
    node[key] = value
    node["id" if name == "hub_pictures" else "folder_path"] = "x"
    with pytest.raises(UserError) as refusal:
        signatures.check_node("data.source", node)
    said = "null" if value is None else value
    assert str(refusal.value) == f"data.source.{key}={said}: expected {expected}"


@pytest.mark.parametrize("name", ["mnist", "emoji_font", "emoji_names"])
def test_a_stage_names_one_package(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        node = compose(f"stage/fetch_{name}").stage
    for path, part in (("stages.x", node), ("stages.x.package", node.package)):
        signatures.check_node(path, part)
        wanted = set(signatures.keywords_of(get_object(part._target_)) or {})
        assert wanted <= set(part)
    assert len(node.package.sha256) == 64


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=mnist", "data.source.package_path=unused"],
        ["data=emoji", "data.source.font_path=unused", "data.source.names_path=unused"],
    ],
    ids=["mnist", "emoji"],
)
def test_a_generator_learns_random_pictures_under_debug(capfd, here, overrides):
    done = run_here(capfd, *TINY, "experiment=scm", *overrides)
    assert done.code == 0, done.err
    assert list(here.glob("outputs/scm/*/student/model_index.json"))
