"""How likely rewritten answers are to the models of a run, beside the labels they replace.

    python benchmarks/distribution_gap.py run=<directory> [stage=rewrite] [answers=64]

Reads a finished run of a recipe with a stage `rewrite`, such as `self_data`. Printed are nats a
token of accepted answers and of their labels, asked normally, under every model of the run. To the
seed and to the pruned model the answers have to be likelier.
"""

import sys
from pathlib import Path

from datasets import load_from_disk
from omegaconf import OmegaConf

from stillhouse.data.tasks.exercises import Exercise
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.evaluation.exercises import nll_of_answers
from stillhouse.jobs.finished_run import read_run
from stillhouse.stages.runner import quiet_libraries
from stillhouse.students.causal_lm import load_causal_lm


def main() -> None:
    """Print a table."""
    quiet_libraries()
    settings = {"stage": "rewrite", "answers": "64"} | dict(a.split("=", 1) for a in sys.argv[1:])
    run = read_run(OmegaConf.create({"run": str(Path(settings["run"]))}))
    rows = load_from_disk(str(run.folder / "stages" / settings["stage"])).to_list()
    accepted = [row for row in rows if row["accepted"]][: int(settings["answers"])]
    if not accepted:
        sys.exit(f"the stage {settings['stage']} accepted none of {len(rows)} answers")
    print(f"{len(accepted)} of {sum(r['accepted'] for r in rows)} accepted answers\n")
    print("| model | rewritten answers | their labels |")
    print("|---|---:|---:|")
    for role in run.models:
        path = run.model(role)
        model = load_causal_lm(path, dtype="float32", attn_implementation="sdpa", key="run").eval()
        tokenizer = load_tokenizer(path, key="run")
        columns = [
            nll_of_answers(
                model,
                tokenizer,
                [
                    Exercise(
                        row["task"], row["instruction"], row[column], "", context=row["context"]
                    ).answered(row[column])
                    for row in accepted
                ],
                batch_size=32,
            )
            for column in ("target", "reference")
        ]
        print(f"| {role} | " + " | ".join(f"{nats:.3f}" for nats in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
