"""The job `sample`: read what a finished run's model writes, as it writes, or see what it draws."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.jobs.finished_run import FinishedRun, as_texts, read_run
from stillhouse.jobs.places import output_folder
from stillhouse.jobs.sample_images import sample_images
from stillhouse.tracking.compare import publish

PIPELINE = "model_index.json"
EXAMPLE = "In the beginning,And God said"
# A model may write any byte. What a terminal would take for a command is shown, not obeyed.
COMMANDS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def sample_run(config: DictConfig, folder: Path) -> None:
    """Continue the prompts and write `samples.json`, in the form of the run's own; of a generator,
    draw its classes.

    Args:
        config: a `schema.Sampling`.
        folder: unused; the job leaves no run directory.

    Raises:
        UserError: when the run, the role, a value or the folder `to` cannot be used.
    """
    _check_numbers(config)
    to = output_folder(config.to)
    run = read_run(config)
    role = run.role(config.role)
    path = run.model(role)
    if (Path(path) / PIPELINE).is_file():
        sample_images(config, role, path, to)
        return
    prompts = _prompts(run, config)

    import torch

    from stillhouse.data.vocabulary import load_tokenizer
    from stillhouse.evaluation.samples import as_message, continuation, prompt_tokens
    from stillhouse.stages.runner import quiet_libraries
    from stillhouse.students.causal_lm import load_causal_lm

    quiet_libraries()
    tokenizer = load_tokenizer(path, key=f"models.{role}")
    if config.chat and tokenizer.chat_template is None:
        raise UserError(
            f"chat=true: the tokenizer of {role} ({path}) has no chat template; set chat=false"
        )
    model: Any = load_causal_lm(
        path, dtype="auto", attn_implementation="sdpa", key=f"models.{role}"
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    asked = [as_message(tokenizer, prompt) if config.chat else prompt for prompt in prompts]
    for text in asked:
        prompt_tokens(model, tokenizer, text, config.max_new_tokens)

    console = Console(highlight=False, soft_wrap=True)
    rows: list[tuple[str, str, str]] = []
    for prompt, text in zip(prompts, asked, strict=True):
        console.print(Text(prompt.translate(COMMANDS), "bold"), end="\n" if config.chat else "")
        written = continuation(
            model,
            tokenizer,
            text,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            show=_show,
        )
        console.print("\n")
        rows.append((role, prompt, written))
    names = publish(lambda target: write_json(target / "samples.json", rows), to)
    console.print(Text(f"{to}: {', '.join(names)}"))


def _check_numbers(config: DictConfig) -> None:
    if config.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens}: expected 1 or more")
    if config.temperature < 0:
        raise UserError(
            f"temperature={config.temperature}: expected 0, the likeliest token, or more"
        )


def _prompts(run: FinishedRun, config: DictConfig) -> Sequence[str]:
    """Return the job's prompts, or those of the run's own evaluation."""
    if config.prompts is not None:
        return as_texts(config.prompts, key="prompts", example=EXAMPLE)
    own = (run.config.get("evaluation") or {}).get("prompts")
    if not own:
        raise UserError(
            f"prompts: the run's own evaluation has none; give some: 'prompts=[{EXAMPLE}]'"
        )
    return own


def _show(piece: str) -> None:
    sys.stdout.write(piece.translate(COMMANDS))
    sys.stdout.flush()
