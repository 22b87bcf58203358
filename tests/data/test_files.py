from pathlib import Path

import pyarrow as pa
import pytest
from own_files import ANSWER, USER, lines, read
from pyarrow import parquet

from stillhouse.data.corpora.files import files
from stillhouse.data.documents import Conversation

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("content", "changes", "documents"),
    [
        (b"one\ntwo\n\nthree\n", {}, ["one\ntwo", "three"]),
        (b"\n\n\none\n\n\n\n  \n\ntwo", {}, ["one", "two"]),
        (b"\xef\xbb\xbfone\r\nstill\r\n\r\ntwo\r\n", {}, ["one\nstill", "two"]),
        (b"one\n\nstill", {"document_separator": None}, ["one\n\nstill"]),
        (b"one<end>two\n\nthree<end>\n", {"document_separator": "<end>"}, ["one", "two\n\nthree"]),
        ("caf\u00e9\u2028\U0001f984".encode(), {}, ["caf\u00e9\u2028\U0001f984"]),
        (b"  indented\n", {}, ["  indented"]),
    ],
)
def test_a_text_is_cut_at_its_separator(content, changes, documents):
    Path("a.txt").write_bytes(content)
    assert read("a.txt", **changes) == documents


def test_json_lines_hold_a_record_a_line():
    Path("a.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + lines({"text": " one\n"}).replace(b"\n", b"\r\n")
        + b"\r\n  \n"
        + '{"text": "two\u2028\u00e9", "id": 3}\n'.encode()
        + lines({"messages": [{**USER, "name": "x"}, ANSWER]})
        + lines({"prompt": "", "completion": "done", "text": None})
        + lines(
            {"text": "no", "messages": [USER, ANSWER], "prompt": "a", "completion": "b"}
        ).strip()
    )
    done = [{"role": "user", "content": ""}, {"role": "assistant", "content": "done"}]
    place = "data.corpus.train_path=a.jsonl, line"
    documents = read("a.jsonl")
    assert documents[:3] == [
        " one\n",
        "two\u2028\u00e9",
        Conversation([USER, ANSWER], f"{place} 5"),
    ]
    assert list(documents[3].messages) == done
    assert documents[3].place == f"{place} 6"
    assert documents[4] == Conversation([USER, ANSWER], f"{place} 7")


def test_keys_can_have_other_names():
    Path("a.jsonl").write_bytes(lines({"body": "one", "text": 3}, {"turns": [USER, ANSWER]}))
    place = "data.corpus.train_path=a.jsonl, line 2"
    documents = read("a.jsonl", text_key="body", messages_key="turns")
    assert documents == ["one", Conversation([USER, ANSWER], place)]


def test_parquet_holds_a_record_a_row():
    table = {"messages": [None, [USER, ANSWER]], "text": ["one", None], "vector": [[0.5], [1.5]]}
    parquet.write_table(pa.table(table), "a.parquet")
    place = "data.corpus.train_path=a.parquet, row 1"
    assert read("a.parquet") == ["one", Conversation([USER, ANSWER], place)]


@pytest.mark.parametrize("path", ["folder", "folder/*", "f*r/*[ab].*", "./folder/", "**/[ab].*"])
def test_a_folder_and_a_glob_are_read_in_the_order_of_names(path):
    Path("folder").mkdir()
    Path("folder", "b.TXT").write_text("second")
    Path("folder", "a.jsonl").write_bytes(lines({"messages": [USER, ANSWER]}))
    if path == "folder":
        Path("folder", "README.md").write_text("not a document")
    first, second = read(path)
    assert second == "second"
    assert first.place == f"data.corpus.train_path={path}, folder/a.jsonl, line 1"


def test_the_corpus_carries_name_and_licence():
    Path("a.txt").write_text("one")
    own = {"validation_path": "held.txt", "test_path": "held.txt"}
    assert files(train_path="./a.txt", **own).name == "a.txt"
    assert files(train_path="a.txt", **own).licence == "unknown"
    corpus = files(train_path="a.txt", **own, name="Mine", licence="CC0")
    assert (corpus.name, corpus.licence, corpus.tokenizer) == ("Mine", "CC0", None)
