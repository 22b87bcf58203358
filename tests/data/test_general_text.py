"""General text out of packages, whose folders are made here."""

import pytest

from stillhouse.data.corpora.python_docs import python_docs
from stillhouse.data.corpora.wordnet_glosses import FILES, wordnet_glosses
from stillhouse.errors import UserError

# Lines of the package's own files, with its licence cut short.
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
PLENTY = (
    "00014490 00 s 03 abounding 0 galore(ip) 0 more_than_enough 0 001 & 00013887 a 0000 | existing "
    'in abundance; "abounding confidence"  \n'
)
SENSE = "0001{:04} 03 n 01 thing_{} 0 001 @ 00001740 n 0000 | the thing numbered {}  \n"


def together(corpus):
    return [d for part in corpus.splits.values() for d in part]


def test_a_page_of_pythons_documentation_is_a_document(tmp_path):
    sources = tmp_path / "usr/share/doc/python3.11/html/_sources"
    pages = [f"Page {i}\n=======\n\nText – of page {i}." for i in range(80)]
    for i, page in enumerate(pages):
        path = sources / ("library", ".")[i % 2] / f"{i}.rst.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\n{page}\n", encoding="utf-8")
    (sources / "empty.rst.txt").write_text("\n")
    (sources.parent / "other.txt").write_text("not a page")
    corpus = python_docs(package_path=str(tmp_path), held_out=0.1)
    assert sorted(together(corpus)) == sorted(pages)
    assert all(corpus.splits.values())
    assert corpus.licence == "PSF-2.0"


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for name in FILES:
        lines = "".join(SENSE.format(i, i, f"{i} of {name}") for i in range(40))
        (folder / name).write_text(LICENCE + (PLENTY if name == "data.adj" else "") + lines)
    return tmp_path


def test_a_sense_is_its_words_and_its_gloss(wordnet):
    corpus = wordnet_glosses(package_path=str(wordnet), held_out=0.1)
    plenty = 'abounding, galore, more than enough: existing in abundance; "abounding confidence"'
    things = [f"thing {i}: the thing numbered {i} of {name}" for name in FILES for i in range(40)]
    assert sorted(together(corpus)) == sorted([plenty, *things])
    assert all(corpus.splits.values())


@pytest.mark.parametrize("function", [python_docs, wordnet_glosses])
def test_synthetic_reads_nothing(function):
    corpus = function(package_path="/no/such/folder", synthetic=True)
    assert all(corpus.splits.values())


def test_folders_without_the_text(tmp_path, wordnet):
    with pytest.raises(UserError) as refused:
        python_docs(package_path=str(tmp_path))
    assert str(refused.value) == (
        f"data.corpus.package_path={tmp_path}: no page is in the folder; expected Debian's package "
        "python3.11-doc, unpacked; the stage in conf/stage/fetch_python_docs.yaml fetches it"
    )
    (wordnet / "usr/share/wordnet/data.adv").unlink()
    with pytest.raises(UserError) as refused:
        wordnet_glosses(package_path=str(wordnet))
    assert str(refused.value) == (
        f"data.corpus.package_path={wordnet}: 3 of the files data.adj, data.adv, data.noun, "
        "data.verb are in the folder; expected Debian's package wordnet-base, unpacked; the stage "
        "in conf/stage/fetch_wordnet.yaml fetches it"
    )
