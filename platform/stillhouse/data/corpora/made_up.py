"""Random words, in place of a package or of the hub."""

from collections.abc import Iterator
from itertools import islice

import torch

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.stream import generator_for

# As many as a recipe may ask labels for, held-out parts aside.
COUNT = 320
WORDS = ("a", "bad", "film", "good", "long", "mail", "never", "new", "not", "old", "the", "very")


def made_up_corpus(name: str) -> Corpus:
    """Make documents that need nothing fetched.

    Args:
        name: of the corpus in whose place they stand.
    """
    documents = list(islice(random_texts(), COUNT))
    splits = with_held_out(documents, {}, held_out=0.1, naming="")
    return Corpus(f"random words in place of {name}", "public domain", splits)


def random_texts() -> Iterator[str]:
    """Yield texts of eight words without end, always the same ones."""
    generator = generator_for(0)
    while True:
        places = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        yield " ".join(WORDS[place] for place in places)
