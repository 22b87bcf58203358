"""The model card of an exported model: front matter that a hub reads, and a page for people."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from stillhouse.jobs.finished_run import FinishedRun
from stillhouse.jobs.origins import Origins, Source
from stillhouse.tracking.report import format_number

# End of an architecture's name -> the hub's name of its task, and the class that loads it.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
    ),
}
UNITS = {
    "test_nll": "nats a token",
    "next_token_accuracy": "share of tokens",
    "bits_per_byte": "bits a byte of text",
    "kl_to_teacher": "nats a token",
    "top1_agreement": "share of tokens",
    "expected_acceptance": "share of tokens",
    "accuracy": "share of exercises, mean over tasks",
    "recovery": "% of the seed's accuracy, mean over tasks",
    "seed_text_nll": "nats a token",
    "kl_to_seed": "nats a token",
    "flops_per_token": "operations",
    "acceptance": "share of tested tokens",
    "block_efficiency": "tokens a pass of the target",
    "speculative_speedup": "times as fast as the target alone",
    "parameters": "count",
    "parameters_removed": "count",
    "shared_fraction": "share of layers",
    "kv_cache_bytes_per_token": "bytes a token",
}
# For names that carry their unit, by a part of theirs.
UNITS_BY_PART = {
    "tokens_per_s": "tokens a second",
    "_ms": "milliseconds",
    "_mb": "10⁶ bytes",
    "_speedup_n": "times as fast as the reference",
    "accuracy_": "share of exercises",
}


def model_card(
    run: FinishedRun,
    role: str,
    origins: Origins,
    *,
    architecture: Mapping[str, Any],
    licence: str | None,
) -> str:
    """Return the card as Markdown with YAML front matter.

    Args:
        run: the run that made the model.
        role: of the model.
        origins: what it was made from.
        architecture: its `config.json`, or the `model_index.json` of a pipeline.
        licence: the hub's name of the licence that its owner chose; None where nobody has.
    """
    head = yaml.safe_dump(
        front_matter(origins, architecture, licence), sort_keys=False, allow_unicode=True
    )
    blocks = [
        f"---\n{head}---",
        f"# {run.recipe}: {role}",
        f"The {role} of the recipe `{run.recipe}` ({run.config['summary']}), seed "
        f"{run.results['seed']}, made with Stillhouse.",
        *_loading(architecture),
        "## Numbers",
        _numbers(run.results["models"]),
        "Measured by the run itself on the test split of its data; speed and memory on the "
        "machine that it ran on. An empty cell was not measured.",
        "## Training",
        "\n".join(_training(run, origins)),
        "## Teacher",
        "\n".join(_teachers(run, origins)),
        "## Data",
        "\n".join(f"- {c.name}, licence: {c.licence}" for c in origins.corpora)
        or "- The stages behind this model name no corpus.",
        "## Licence",
        *_licence_note(origins, licence),
    ]
    return "\n\n".join(blocks) + "\n"


def front_matter(
    origins: Origins, architecture: Mapping[str, Any], licence: str | None
) -> dict[str, Any]:
    """Return the metadata that a model hub reads."""
    pipeline, _ = _task(architecture)
    base = [s.name for s in origins.outside if s.kind == "hub" and s.what != "tokenizer"]
    content = {
        "library_name": "transformers" if "architectures" in architecture else "diffusers",
        "pipeline_tag": pipeline,
        "license": licence if licence is not None else "other",
        "base_model": base,
        "tags": [*(["distillation"] if origins.teachers else []), "stillhouse"],
    }
    return {key: value for key, value in content.items() if value}


def _task(architecture: Mapping[str, Any]) -> tuple[str | None, str]:
    name = (architecture.get("architectures") or [""])[0]
    known = [task for end, task in TASKS.items() if name.endswith(end)]
    return known[0] if known else (None, "AutoModel")


def _loading(architecture: Mapping[str, Any]) -> list[str]:
    """Return how to load it with its library alone."""
    if "architectures" not in architecture:
        lines = ["from diffusers import DiffusionPipeline", ""]
        # A pipeline that names a file brings code of its own along.
        own_code = isinstance(architecture.get("_class_name"), list)
        trusted = ", trust_remote_code=True" if own_code else ""
        lines += [f'pipeline = DiffusionPipeline.from_pretrained("<this folder>"{trusted})']
        if own_code:
            told = "class_labels=[0, 1]" if architecture.get("classes") else "num_images=2"
            said = 'prompt=["a caption"]' if architecture.get("text_encoder") else told
            steps = next(iter(architecture.get("times") or {"50": None}))
            lines += [f"samples = pipeline({said}, num_inference_steps={steps}).images"]
    else:
        _, loader = _task(architecture)
        # A model with code of its own brings that along.
        own_code = ", trust_remote_code=True" if "auto_map" in architecture else ""
        lines = [f"from transformers import AutoTokenizer, {loader}", ""]
        lines += ['tokenizer = AutoTokenizer.from_pretrained("<this folder>")']
        lines += [f'model = {loader}.from_pretrained("<this folder>"{own_code})']
    return ["## Load", "\n".join(["```python", *lines, "```"])]


def _numbers(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the run's table: a row a metric, a column a role."""
    metrics = dict.fromkeys(m for numbers in models.values() for m in numbers)
    lines = [["metric", "unit", *models], ["---", "---", *("---:" for _ in models)]]
    for metric in metrics:
        numbers = (format_number(n.get(metric)) for n in models.values())
        lines.append([metric, _unit(metric), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unit(metric: str) -> str:
    by_part = (unit for part, unit in UNITS_BY_PART.items() if part in metric)
    return UNITS.get(metric) or next(by_part, "")


def _training(run: FinishedRun, origins: Origins) -> Iterator[str]:
    """Yield what the weights went through, and how each stage of it went about it."""
    yield f"- stages: {' → '.join(f'`{s}`' for s in origins.stages)}; `{origins.stage}` made it"
    trained = [stage for stage in origins.weights if run.stages[stage].get("method")]
    merges = [stage for stage in origins.weights if run.stages[stage].get("merging")]
    if len(trained) > 1:
        # Merged models were trained side by side.
        joint = ", " if merges else ", then "
        yield f"- its weights were trained by {joint.join(f'`{s}`' for s in trained)}"
    for stage in (stage for stage in origins.weights if stage in (*trained, *merges)):
        node = run.stages[stage]
        yield f"- `{stage}`"
        if stage in merges:
            yield f"    - models: {node['path']}, {node['other_path']}"
        for part in ("method", "student", "optimizer", "merging"):
            if node.get(part):
                yield f"    - {part}: {_described(node[part])}"
        metrics = run.results["stages"].get(stage, {}).get("metrics", {})
        for name, value in metrics.items():
            if name == "steps" or name.endswith("_seen"):
                yield f"    - {name.replace('_', ' ')}: {format_number(value)}"
    if origins.synthetic:
        names = ", ".join(f"`{s}`" for s in origins.synthetic)
        yield f"- for tests alone: random content stood in for what {names} would have fetched"
    git = run.results["git"]
    changed = " and changes that were not committed" if git and git.endswith("+") else ""
    yield (
        f"- code: git revision {git.rstrip('+')}{changed}"
        if git
        else ("- code: the git revision is not known, the code lay in no checkout")
    )
    yield f"- command: `{shlex.join(['python', 'run.py', *run.results['overrides']])}`"


def _described(node: Mapping[str, Any]) -> str:
    """Return a node's target and its settings in one line."""
    settings = [f"{k}={_value(v)}" for k, v in node.items() if not k.startswith("_")]
    return f"`{node['_target_']}`" + (f" with {', '.join(settings)}" if settings else "")


def _value(value: Any) -> str:
    """Return a setting; of a node, the name of its target and its own settings."""
    if not isinstance(value, Mapping) or "_target_" not in value:
        return str(value)
    settings = [f"{k}={_value(v)}" for k, v in value.items() if not k.startswith("_")]
    return f"{value['_target_'].rpartition('.')[2]}({', '.join(settings)})"


def _teachers(run: FinishedRun, origins: Origins) -> Iterator[str]:
    if not origins.teachers:
        yield "- None: this model was trained without a teacher."
    for teacher in origins.teachers:
        metrics = run.results["stages"].get(teacher.name, {}).get("metrics", {})
        size = metrics.get("student_parameters", metrics.get("parameters"))
        known = teacher.kind == "stage" and size is not None
        yield f"- {_named(teacher)}" + (f", {format_number(size)} parameters" if known else "")


def _named(source: Source) -> str:
    """Return what a source is, in words."""
    return {
        "stage": f"made by the run's own stage `{source.name}`",
        "hub": f"[{source.name}](https://huggingface.co/{source.name})",
        "folder": f"the model in the folder `{source.name}`",
        "package": f"`{source.name}`",
    }[source.kind]


def _licence_note(origins: Origins, licence: str | None) -> Iterator[str]:
    """Yield what is known to bind the model, and what has to be found out."""
    chosen = (
        f"Its owner gave this model the licence `{licence}`."
        if licence is not None
        else "Nobody has chosen a licence for this model yet, so the front matter says `other`."
    )
    yield f"{chosen} A student takes over the obligations of its teacher and of its data."
    # `unknown` is what corpora of a user's own say where no licence was given.
    named = [c for c in origins.corpora if c.licence != "unknown"]
    known = [f"- data: {c.name}, {c.licence}" for c in named]
    known += [
        f"- {source.what}: {_named(source)}, from what is listed here"
        for source in origins.sources
        if source.kind == "stage"
    ]
    known += [f"- licence text of what was fetched: [{n}]({n})" for n in origins.licences]
    yield "Known:"
    yield "\n".join(known) or "- Nothing."
    unknown = [
        f"- {source.what}: {_named(source)}. The run does not record its licence. Read it: some "
        "licences bind what is trained on a model's outputs, its name or its use."
        for source in origins.outside
    ]
    unknown += [
        f"- data: {c.name}. Its licence was not given. Find out whether it lets you share what is "
        "trained on it."
        for c in origins.corpora
        if c.licence == "unknown"
    ]
    unknown.append(
        "- data: whether a licence named above holds where you are, and for every part of the "
        "text; the run took it from the corpus and did not check it."
    )
    yield "To check before you share it:"
    yield "\n".join(unknown)
