"""Captions as a text encoder reads them: a store of embeddings, with the encoder beside them.

The folder holds what a pipeline of diffusers has under the same names, `text_encoder` and
`tokenizer`: a generator that was trained on the store reads prompts by the very encoder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import write_json

STATES, CAPTIONS = "captions.safetensors", "captions.json"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True)
class Captions:
    """A store.

    Attributes:
        folder: where it lies.
        captions: the texts, each once, the empty one among them.
        states: of all tokens, one caption behind the other [T, D].
        ends: where in `states` a caption ends [N].
    """

    folder: Path
    captions: Sequence[str]
    states: Float[Tensor, "T D"]
    ends: Int[Tensor, "N"]

    def write(self) -> None:
        """Write the embeddings; the encoder is written by who embeds."""
        save_file({"states": self.states, "ends": self.ends}, self.folder / STATES)
        write_json(self.folder / CAPTIONS, list(self.captions))

    @property
    def width(self) -> int:
        """D."""
        return self.states.shape[1]

    @property
    def empty(self) -> Float[Tensor, "L D"]:
        """States of the empty caption, which networks of the hub are told where there is none."""
        states, mask = self.embedded([""])
        return states[0, mask[0]]

    @cached_property
    def places(self) -> dict[str, int]:
        """Of every caption."""
        return {caption: place for place, caption in enumerate(self.captions)}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest caption: every batch is as long, so that batches can be joined."""
        return int(self.ends.diff(prepend=self.ends.new_zeros(1)).max())

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Return those that the store does not have."""
        return [caption for caption in captions if caption not in self.places]

    def embedded(
        self, captions: Sequence[str]
    ) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Return states of captions that the store has, filled up with zeros; True at tokens."""
        states = self.states.new_zeros(len(captions), self.longest, self.width)
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for row, caption in enumerate(captions):
            place = self.places[caption]
            start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
            states[row, : end - start] = self.states[start:end]
            mask[row, : end - start] = True
        return states, mask


def read_captions(path: str, *, key: str) -> Captions:
    """Return the store in a folder.

    Raises:
        UserError: for a folder without one.
    """
    folder = Path(path).expanduser()
    try:
        captions = json.loads((folder / CAPTIONS).read_text())
        tensors = load_file(folder / STATES)
        return Captions(folder, captions, tensors["states"], tensors["ends"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{key}={path}: no captions can be read there; expected the artifact of a stage of "
            "conf/stage/embed_captions.yaml"
        ) from error
