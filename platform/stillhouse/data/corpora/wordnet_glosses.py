"""The glosses of WordNet 3.0: what 117,659 senses of English words mean, and how they are used.

They are read from the data files of Debian's package `wordnet-base`, whose format the manual page
`wndb(5WN)` gives.
"""

from collections.abc import Iterator
from pathlib import Path

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.corpora.made_up import made_up_corpus
from stillhouse.errors import UserError

NAME, LICENCE = "WordNet 3.0", "WordNet"
FILES = ("data.adj", "data.adv", "data.noun", "data.verb")


def wordnet_glosses(
    *, package_path: str, held_out: float = 0.05, synthetic: bool = False
) -> Corpus:
    """Read the senses; a document is the words of one, a colon and its gloss.

    Args:
        package_path: folder of the unpacked package.
        held_out: share of the senses for validation and for test each.
        synthetic: read no file; make random texts.

    Raises:
        UserError: for a folder without the data files, and a share that leaves a split empty.
    """
    if synthetic:
        return made_up_corpus(NAME)
    folder = Path(package_path).expanduser()
    files = [path for name in FILES for path in sorted(folder.rglob(name))]
    if len(files) != len(FILES):
        raise UserError(
            f"data.corpus.package_path={package_path}: {len(files)} of the files "
            f"{', '.join(FILES)} are in the folder; expected Debian's package wordnet-base, "
            "unpacked; the stage in conf/stage/fetch_wordnet.yaml fetches it"
        )
    senses = [sense for file in files for sense in _senses(file)]
    splits = with_held_out(senses, {}, held_out=held_out, naming="another corpus")
    return Corpus(NAME, LICENCE, splits)


def _senses(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        # The licence stands first, every line of it set in by two spaces.
        if line.startswith("  "):
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        # Offset, file and kind of the sense; how many words, in hex; each word and a number.
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        # An adjective may carry its place in a sentence: `galore(ip)`.
        names = [word.partition("(")[0].replace("_", " ") for word in words]
        yield f"{', '.join(names)}: {gloss.strip()}"
