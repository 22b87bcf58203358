"""The documentation of Python 3.11, 11 MB of English prose and code, as Debian packages it.

It is read from the sources of the pages in the package `python3.11-doc`, in reStructuredText.
"""

from pathlib import Path

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.corpora.made_up import made_up_corpus
from stillhouse.errors import UserError

NAME, LICENCE = "Python's documentation", "PSF-2.0"
PAGES = "html/_sources/**/*.rst.txt"


def python_docs(*, package_path: str, held_out: float = 0.05, synthetic: bool = False) -> Corpus:
    """Read the pages; a page is a document.

    Args:
        package_path: folder of the unpacked package.
        held_out: share of the pages for validation and for test each.
        synthetic: read no file; make random texts.

    Raises:
        UserError: for a folder without pages, and a share that leaves a split empty.
    """
    if synthetic:
        return made_up_corpus(NAME)
    files = sorted(Path(package_path).expanduser().rglob(PAGES))
    if not files:
        raise UserError(
            f"data.corpus.package_path={package_path}: no page is in the folder; expected Debian's "
            "package python3.11-doc, unpacked; the stage in conf/stage/fetch_python_docs.yaml "
            "fetches it"
        )
    pages = [text for file in files if (text := file.read_text(encoding="utf-8").strip())]
    splits = with_held_out(pages, {}, held_out=held_out, naming="another corpus")
    return Corpus(NAME, LICENCE, splits)
