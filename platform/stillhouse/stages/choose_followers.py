"""The stage `sharing`: choose which layers take another's attention matrix."""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from stillhouse.records.similarity import Similarity, read_similarity
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.sharing import Sharing, sharing_of, write_sharing
from stillhouse.tracking.similarity_pictures import draw_similarity


@dataclass(frozen=True, kw_only=True)
class ChooseFollowers:
    """Write a choice of followers and their leaders, and draw it.

    Attributes:
        analysis_path: what the stage `analyse` wrote.
        choose: of `students.follower_choices`, partial, called with the similarity of the layers.
    """

    analysis_path: str
    choose: dict[str, Any]

    def __call__(self, context: StageContext) -> StageResult:
        """Choose; write `sharing.json` and `sharing.png`."""
        similarity = read_similarity(self.analysis_path, key=f"stages.{context.name}.analysis_path")
        followers = instantiate(self.choose)(similarity)
        sharing = sharing_of(
            followers,
            similarity.layers,
            key="sharing.followers",
            layer_types=similarity.layer_types,
        )
        write_sharing(sharing, context.output)
        picture = draw_similarity(
            similarity.matrix.tolist(),
            context.output / "sharing.png",
            _title(sharing, similarity),
            groups=sharing.groups,
        )
        context.tracker.picture("sharing", picture)
        context.console.print(f"{context.name}: {_in_words(sharing)}")
        return StageResult(
            metrics={
                "layers": similarity.layers,
                "followers": len(sharing.order),
                "shared_fraction": len(sharing.order) / similarity.layers,
            }
        )


def _title(sharing: Sharing, similarity: Similarity) -> str:
    return f"{len(sharing.order)} of {similarity.layers} layers follow another"


def _in_words(sharing: Sharing) -> str:
    """Say in one line who leads whom."""
    if not sharing.order:
        return "no layer follows another"
    return "; ".join(
        f"layer {leader} leads {', '.join(map(str, followers))}"
        for leader, followers in sharing.groups.items()
    )
