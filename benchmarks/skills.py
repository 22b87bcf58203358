"""What a model can do of reasoning-gym: its accuracy beside that of always the same answer.

    python benchmarks/skills.py model=<folder> 'generators={chain_sum: {max_terms: 2}, …}'
        [exercises=60] [max_new_tokens=64] [batch_size=32]

Questions are asked as a recipe with `data=reasoning_gym` asks them, and answered greedily. The
model has a skill where it does better than the most frequent label of the same exercises.
"""

import sys
from collections import Counter

import yaml

from stillhouse.data.tasks.reasoning_gym import reasoning_gym
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.evaluation.exercises import accuracy_by_task
from stillhouse.stages.runner import quiet_libraries
from stillhouse.students.causal_lm import load_causal_lm


def main() -> None:
    """Print a table."""
    quiet_libraries()
    settings = {"exercises": "60", "max_new_tokens": "64", "batch_size": "32"}
    settings |= dict(a.split("=", 1) for a in sys.argv[1:])
    folder = settings["model"]
    model = load_causal_lm(folder, dtype="float32", attn_implementation="sdpa", key="model").eval()
    tokenizer = load_tokenizer(folder, key="model")
    print("| generator | settings | accuracy | always the same answer |")
    print("|---|---|---:|---:|")
    for name, chosen in yaml.safe_load(settings["generators"]).items():
        asked = reasoning_gym(
            generators={name: chosen},
            train_exercises=1,
            validation_exercises=1,
            test_exercises=int(settings["exercises"]),
            seed=0,
        ).splits["test"]
        right = accuracy_by_task(
            model,
            tokenizer,
            asked,
            max_new_tokens=int(settings["max_new_tokens"]),
            batch_size=int(settings["batch_size"]),
        )
        ((_, most),) = Counter(exercise.answer for exercise in asked).most_common(1)
        print(
            f"| {name} | {chosen} | {right['accuracy']:.3f} | {most / len(asked):.3f} |", flush=True
        )


if __name__ == "__main__":
    main()
