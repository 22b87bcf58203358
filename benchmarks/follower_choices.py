"""What sharing attention costs before any training: by which layers follow.

    python benchmarks/follower_choices.py run=<directory> [draws=8] [windows=8] [fraction=0.41]

Reads a finished run of an `echoatt` recipe: its teacher, its analysis and its data. The teacher is
cut by the most similar layers (EchoAtt, 2409.14595), by as many layers drawn at random, `draws`
times, and by the least similar ones; printed is the negative log-likelihood, nats a token, of each
cut model on the first `windows` windows of the test split, beside the teacher's.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stillhouse.data.language import LanguageData
from stillhouse.evaluation.language import held_out_quality
from stillhouse.jobs.finished_run import FinishedRun, read_run
from stillhouse.records.similarity import Similarity, read_similarity
from stillhouse.stages.runner import quiet_libraries
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.students.follower_choices import most_similar
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of

CHOOSE = "stillhouse.stages.choose_followers.ChooseFollowers"


def choices(
    similarity: Similarity, fraction: float, draws: int
) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield (name, followers): nobody, the most similar, random ones, the least similar."""
    similar = most_similar(similarity, fraction=fraction)
    candidates = similarity.with_one_before(range(similarity.layers))
    generator = torch.Generator().manual_seed(0)
    yield "teacher", []
    yield "most similar", similar
    for draw in range(draws):
        places = torch.randperm(len(candidates), generator=generator)[: len(similar)].tolist()
        yield f"random {draw}", [candidates[place] for place in places]
    by_score = sorted(candidates, key=lambda layer: similarity.scores[layer])
    yield "least similar", by_score[: len(similar)]


def parts_of(run: FinishedRun, windows: int) -> tuple[Any, Similarity, LanguageData]:
    """Return the teacher, the similarity of its layers and the data of a run."""
    stage = next(node for node in run.stages.values() if node["_target_"] == CHOOSE)
    analysis = run.located(stage["analysis_path"])
    model = load_causal_lm(
        run.model("teacher"), dtype="float32", attn_implementation="sdpa", key="run"
    )
    node = {**run.located(run.config["data"]), "max_evaluation_windows": windows}
    data: LanguageData = instantiate(node, _recursive_=False)(0)
    return model.eval(), read_similarity(analysis, key="run"), data


def main() -> None:
    """Print a table and how the most similar layers rank among the random ones."""
    quiet_libraries()
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    settings = {"draws": "8", "windows": "8", "fraction": "0.41"} | given
    run = read_run(OmegaConf.create({"run": str(Path(settings["run"]))}))
    full, similarity, data = parts_of(run, int(settings["windows"]))
    batches = list(data.evaluation_batches("test"))
    print("| followers | layers | test_nll |\n|---|---|---:|")
    found: dict[str, float] = {}
    chosen = choices(similarity, float(settings["fraction"]), int(settings["draws"]))
    for name, followers in chosen:
        sharing = sharing_of(
            followers, similarity.layers, key="followers", layer_types=similarity.layer_types
        )
        cut = share_attention(full, sharing, where="teacher").eval()
        found[name] = held_out_quality(cut, None, batches, text_bytes=None)["test_nll"]
        layers = ", ".join(map(str, sharing.followers))
        print(f"| {name} | {layers} | {found[name]:.3f} |", flush=True)
    random = [nll for name, nll in found.items() if name.startswith("random")]
    better = sum(nll < found["most similar"] for nll in random)
    print(f"\nof {len(random)} random choices {better} have a lower NLL than the most similar one")


if __name__ == "__main__":
    main()
