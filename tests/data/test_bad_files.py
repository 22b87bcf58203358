from pathlib import Path

import pyarrow as pa
import pytest
from own_files import USER, WAYS_IN, lines, read
from pyarrow import parquet

from stillhouse.data.corpora.files import files
from stillhouse.errors import UserError

KEYS = "'messages', 'text', or 'prompt' and 'completion'"

pytestmark = pytest.mark.usefixtures("own_folder")


def one(record: object) -> bytes:
    return lines({"text": "fine"}, record)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", b"text\n", f": unknown suffix '.csv'; {WAYS_IN}"),
        ("none.txt", None, f": there is no such file or folder; {WAYS_IN}"),
        ("none*.txt", None, f": no file fits the pattern; {WAYS_IN}"),
        ("a.txt", b"", ": the file is empty; expected documents in it"),
        ("a.txt", b" \n\n\n", ": the file holds no document; fill it or leave it out"),
        ("a.jsonl", b"\n \n", ": the file holds no document; fill it or leave it out"),
        (
            "a.txt",
            b"one\ntwo\n\xc3\xa9 caf\xe9",
            ", line 3: not UTF-8: byte 7 of the line is 0xe9; write the file anew in UTF-8, for "
            "example with iconv -t UTF-8",
        ),
        (
            "a.jsonl",
            "\ufeff{}".encode("utf-16-le"),
            ", line 1: not UTF-8: byte 1 of the line is 0xff; write the file anew in UTF-8, for "
            "example with iconv -t UTF-8",
        ),
        (
            "a.jsonl",
            lines({"text": "one"}) + b'\n{"text" "two"}\n',
            ", line 3: not JSON: Expecting ':' delimiter at column 9; expected a record a line, "
            'such as {"text": "…"}',
        ),
        (
            "a.jsonl",
            one(["one"]),
            f", line 2: the record is a list; expected an object with {KEYS}",
        ),
        (
            "a.jsonl",
            one({"texts": "one", "id": 1, "prompt": "two", "completion": None}),
            f", line 2: the record has none of {KEYS}; it has 'texts', 'id', 'prompt'; name the "
            "right key with data.corpus.text_key=<key> or data.corpus.messages_key=<key>; did you "
            "mean 'texts'?",
        ),
        (
            "a.jsonl",
            one({}),
            f", line 2: the record has none of {KEYS}; it has no keys; name the right key with "
            "data.corpus.text_key=<key> or data.corpus.messages_key=<key>",
        ),
        ("a.jsonl", one({"text": 3}), ", line 2: 'text' is a number; expected a string"),
        ("a.jsonl", one({"text": ["a"]}), ", line 2: 'text' is a list; expected a string"),
        (
            "a.jsonl",
            one({"text": " \n"}),
            ", line 2: 'text' is empty; expected some text; fill it or drop the record",
        ),
        (
            "a.jsonl",
            one({"text": "a\ud83e"}),
            ", line 2: 'text' holds half a surrogate pair, \\ud83e; expected Unicode text; write "
            "the whole character",
        ),
        (
            "a.jsonl",
            one({"prompt": [USER], "completion": "b"}),
            ", line 2: 'prompt' is a list; expected a string",
        ),
        (
            "a.jsonl",
            one({"prompt": "a", "completion": ""}),
            ", line 2: 'completion' is empty; expected some text; fill it or drop the record",
        ),
        (
            "a.jsonl",
            one({"messages": "hi"}),
            ", line 2: 'messages' is a string; expected a list of messages",
        ),
        (
            "a.jsonl",
            one({"messages": []}),
            ", line 2: 'messages' is an empty list; expected a list of messages",
        ),
        (
            "a.jsonl",
            one({"messages": ["hi"]}),
            ", line 2: messages[0] is a string; expected an object with 'role' and 'content'",
        ),
        (
            "a.jsonl",
            one({"messages": [USER, {"from": "gpt", "content": "yes"}]}),
            ", line 2: messages[1] has no 'role'; it has 'from', 'content'",
        ),
        (
            "a.jsonl",
            one({"messages": [{"role": "user"}]}),
            ", line 2: messages[0] has no 'content'; it has 'role'",
        ),
        (
            "a.jsonl",
            one({"messages": [USER, {"role": "asistant", "content": "yes"}]}),
            ", line 2: messages[1].role is 'asistant'; expected system, user, assistant, tool; "
            "rename it; did you mean 'assistant'?",
        ),
        (
            "a.jsonl",
            one({"messages": [USER, {"role": "assistant", "content": None}]}),
            ", line 2: messages[1].content is null; expected a string",
        ),
        (
            "a.jsonl",
            one({"messages": [USER, {"role": "assistant", "content": ""}]}),
            ", line 2: messages[1].content is empty; expected some text; fill it or drop the "
            "record",
        ),
        (
            "a.jsonl",
            one({"messages": [USER]}),
            ", line 2: no message has the role 'assistant'; expected an answer to learn; add one, "
            "or drop the record",
        ),
        (
            "a.parquet",
            b"PAR1 and no more",
            ": the file cannot be read as parquet: ArrowInvalid: Parquet magic bytes not found in "
            "footer. Either the file is corrupted or this is not a parquet file.; write it anew",
        ),
    ],
    ids=str,
)
def test_bad_files_are_told_with_file_and_line(name, content, line):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(name)
    assert str(caught.value) == f"data.corpus.train_path={name}{line}"
    if content is not None and name != "a.csv":
        Path("folder").mkdir()
        Path(name).rename(f"folder/{name}")
        with pytest.raises(UserError) as caught:
            read("folder")
        assert str(caught.value) == f"data.corpus.train_path=folder, folder/{name}{line}"


def test_bad_rows_of_parquet_are_told_with_their_row():
    parquet.write_table(pa.table({"text": ["one", ""]}), "a.parquet")
    parquet.write_table(pa.table({"body": ["one"], "id": [1]}), "b.parquet")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), "c.parquet")
    for name, line in (
        ("a", ", row 1: 'text' is empty; expected some text; fill it or drop the record"),
        (
            "b",
            f", row 0: the record has none of {KEYS}; it has 'body', 'id'; name the right key with "
            "data.corpus.text_key=<key> or data.corpus.messages_key=<key>",
        ),
        ("c", ": the file holds no document; fill it or leave it out"),
    ):
        with pytest.raises(UserError) as caught:
            read(f"{name}.parquet")
        assert str(caught.value) == f"data.corpus.train_path={name}.parquet{line}"


def test_the_key_of_a_message_is_that_of_the_path():
    Path("a.txt").write_text("one")
    for key in ("validation_path", "test_path"):
        with pytest.raises(UserError) as caught:
            files(train_path="a.txt", **{key: "none.txt"})
        line = f"data.corpus.{key}=none.txt: there is no such file or folder; {WAYS_IN}"
        assert str(caught.value) == line


def test_a_folder_without_documents_and_an_empty_separator():
    Path("folder").mkdir()
    Path("folder", "a.csv").write_text("text")
    with pytest.raises(UserError) as caught:
        read("folder")
    line = f"data.corpus.train_path=folder: the folder holds no such file; {WAYS_IN}"
    assert str(caught.value) == line
    Path("folder", "a.txt").write_text("text")
    with pytest.raises(UserError) as caught:
        read("folder/*")
    line = f"data.corpus.train_path=folder/*, folder/a.csv: unknown suffix '.csv'; {WAYS_IN}"
    assert str(caught.value) == line
    with pytest.raises(UserError, match=r"data.corpus.document_separator is empty; expected what"):
        read("held.txt", document_separator="")
