"""A recipe's values go with the options that it chose, not with those that a user chooses."""

import shutil
from pathlib import Path

import pytest
from commands import ROOT, TINY, Finished, run_here
from omegaconf import DictConfig, OmegaConf

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

CONF = ROOT / "conf"
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("self_data*.yaml"))
PRUNINGS = sorted(p.stem for p in (CONF / "pruning").glob("*.yaml"))
GIVEN = ("pruning=given", "pruning.blocks=[5]", "stages.random_run.choose.n=1")


def compose(*overrides: str, conf: Path = CONF) -> DictConfig:
    """Compose and bind, as before the first stage."""
    register_schemas()
    register_resolvers()
    config = preflight.compose_job([*overrides], conf)
    signatures.check(config, [name for name, node in config.stages.items() if node is not None])
    return config


def refusal(*overrides: str, conf: Path = CONF) -> str:
    with pytest.raises(UserError) as refused:
        compose(*overrides, conf=conf)
    return str(refused.value)


def keys_of(option: str) -> set[str]:
    return {str(key) for key in OmegaConf.load(CONF / f"{option}.yaml")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_are_chosen_in_any_way(recipe: str) -> None:
    own = OmegaConf.load(CONF / f"experiment/{recipe}.yaml").get("pruning", {"n": 2})
    for pruning in PRUNINGS:
        given = GIVEN if pruning == "given" else (f"pruning={pruning}",)
        node = compose(f"experiment={recipe}", *given).pruning
        assert set(node) == keys_of(f"pruning/{pruning}")
        assert pruning == "given" or node.n == own["n"], "what both take is the recipe's"


@pytest.mark.parametrize("recipe", RECIPES)
def test_repair_is_of_adapters_or_of_all_weights(recipe: str) -> None:
    config = compose(f"experiment={recipe}", "student=hf")
    assert set(config.student) == keys_of("student/hf")
    for stage in ("sft", "self_data"):
        assert config.stages[stage].student.path == "stages/prune"
        assert set(config.stages[stage].student) == keys_of("student/hf")


def test_an_option_may_be_chosen_at_any_place_and_hold_others() -> None:
    random_run = "pruning@stages.random_run.choose=given"
    chosen = compose("experiment=self_data", random_run, "stages.random_run.choose.blocks=[1]")
    assert set(chosen.stages.random_run.choose) == keys_of("pruning/given")
    # The skills of the recipe stand two targets below the option.
    config = preflight.compose_job(["experiment=self_data", "data=gsm8k"], CONF)
    assert set(config.data.corpus.exercises) == set(
        OmegaConf.load(CONF / "data/answered_hub.yaml").corpus.exercises
    )


def test_the_other_task_of_the_paper_is_alpaca_whatever_the_first_is() -> None:
    alpaca = compose("experiment=self_data_paper", "data=alpaca").data.corpus.exercises
    wanted = {**alpaca, "max_exercises": 10000}
    for data in ("gsm8k", "dolly", "reasoning_gym"):
        config = compose("experiment=self_data_paper", f"data={data}")
        assert config.stages.rewrite_alpaca.exercises == wanted
        assert config.stages.alpaca.data.corpus.exercises == wanted
        assert config.stages.rewrite.exercises == config.data.corpus.exercises != wanted


def test_what_the_user_writes_is_not_dropped() -> None:
    given = ("experiment=self_data_smollm2", *GIVEN)
    assert refusal(*given, "pruning.n=2") == "pruning.n: given takes no 'n'; it takes blocks"
    assert refusal(*given, "+pruning.blokcs=[2]") == (
        "pruning.blokcs: given takes no 'blokcs'; it takes blocks; did you mean 'blocks'?"
    )
    skills = "data.corpus.exercises.addition"
    assert refusal("experiment=self_data", "data=gsm8k", f"{skills}.train_exercises=9").startswith(
        f"{skills}: answered_hub takes no 'addition'; it takes id, config_name, "
    )


def test_values_that_other_stages_take_from_what_was_dropped_are_asked_for() -> None:
    sizes = "exercises.validation_exercises"
    assert refusal("experiment=self_data_smollm2", "data=gsm8k") == (
        f"stages.rewrite_products.{sizes} takes its value from data.corpus.{sizes}, which is not "
        f"there: set stages.rewrite_products.{sizes} by itself"
    )


@pytest.fixture
def own_conf(tmp_path: Path) -> Path:
    """The options, and a recipe of one's own with a value that no target takes."""
    conf = shutil.copytree(CONF, tmp_path / "conf")
    recipe = (conf / "experiment/self_data_smollm2.yaml").read_text()
    assert "pruning:\n  n: 3\n" in recipe
    misspelt = recipe.replace("pruning:\n  n: 3\n", "pruning:\n  n: 3\n  sead: 1\n")
    (conf / "experiment/mine.yaml").write_text(misspelt)
    option = "_target_: stillhouse.students.block_choices.given\n_partial_: true\nblocks: [1]\n"
    (conf / "pruning/mine.yaml").write_text(f"{option}n: 1\n")
    return conf


def test_mistakes_in_files_of_one_s_own_are_not_dropped(own_conf: Path) -> None:
    """A recipe's where the user names the option that it has anyway; an option's at any time."""
    line = "pruning.sead: least_distant takes no 'sead'; it takes n"
    assert refusal("experiment=mine", conf=own_conf) == line
    assert refusal("experiment=mine", "pruning=least_distant", conf=own_conf) == line
    chosen = ("experiment=self_data", "pruning=mine", "stages.random_run.choose.n=1")
    assert refusal(*chosen, conf=own_conf) == "pruning.n: given takes no 'n'; it takes blocks"


def test_the_command_line_says_so_too(capfd, here: Path) -> None:
    recipe = (*TINY, "experiment=self_data_smollm2")
    done = run_here(capfd, *recipe, *GIVEN, "plan=true")
    assert done.code == 0, done.err
    assert run_here(capfd, *recipe, *GIVEN[:2]) == Finished(
        2,
        "",
        "error: stages.random_run.choose.n=null: expected int; it is ${oc.select:pruning.n,null}, "
        "which has no value here: set stages.random_run.choose.n=<value>\n",
    )
    words = (*TINY, "experiment=self_data", "student=hf", "student.rank=4")
    assert run_here(capfd, *words) == Finished(
        2,
        "",
        "error: student.rank: pretrained takes no 'rank'; it takes path, dtype, "
        "attn_implementation\n",
    )
    assert not list(here.rglob("*.yaml")), "a run that never began left files"
