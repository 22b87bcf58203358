from pathlib import Path

import pytest
from commands import TINY, run_here

from stillhouse.data.corpora.hub import hub
from stillhouse.data.documents import Conversation
from stillhouse.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEXTS = [f"document {i}" for i in range(200)]


@pytest.fixture(scope="module")
def datasets():
    import datasets

    datasets.disable_progress_bars()
    return datasets


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    texts = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(200))})
    chats = datasets.Dataset.from_dict({"messages": [CHAT, CHAT], "text": [None, "left out"]})
    datasets.DatasetDict({"train": texts, "chats": chats}).save_to_disk("saved")
    texts.save_to_disk("rows")
    Path("plain").mkdir()
    Path("plain", "a.jsonl").write_text('{"text": "one"}\n')
    return tmp_path


def test_splits_of_a_saved_folder_are_read():
    corpus = hub(id="./saved", validation_split="chats", test_split="chats", licence="CC0")
    assert corpus.documents("train") == TEXTS
    expected = [Conversation(CHAT, f"data.corpus.id=./saved, split chats, row {i}") for i in (0, 1)]
    assert corpus.documents("validation") == corpus.documents("test") == expected
    assert (corpus.name, corpus.licence) == ("./saved", "CC0")


@pytest.mark.parametrize("id", ["./saved", "./rows"])
def test_what_is_not_named_is_held_out(id):
    corpus = hub(id=id, held_out=0.1)
    parts = {split: corpus.documents(split) for split in ("train", "validation", "test")}
    assert sorted(d for part in parts.values() for d in part) == sorted(TEXTS)
    assert all(5 < len(parts[split]) < 40 for split in ("validation", "test"))


@pytest.mark.parametrize("id", ["./saved", "./rows"])
def test_a_slice_of_a_saved_split_is_a_slice(id):
    for slice_, kept in (
        ("[:100]", TEXTS[:100]),
        ("[50%:]", TEXTS[100:]),
        ("[10:-20]", TEXTS[10:-20]),
    ):
        corpus = hub(id=id, train_split=f"train{slice_}", held_out=0.1)
        assert sorted(d for s in corpus.splits for d in corpus.documents(s)) == sorted(kept)


def test_the_first_documents_of_every_split_are_enough():
    corpus = hub(id="./saved", validation_split="train", test_split="chats", max_documents=3)
    assert corpus.documents("train") == corpus.documents("validation") == TEXTS[:3]
    assert len(corpus.documents("test")) == 2


def test_the_hub_is_asked_for_what_the_config_names(monkeypatch, datasets):
    asked = []

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.Dataset.from_dict({"body": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = hub(
        id="some/set",
        config_name="en",
        revision="abc",
        train_split="train[:9]",
        validation_split="dev",
        text_key="body",
    )
    assert asked == [
        (("some/set", "en"), {"revision": "abc", "split": "train[:9]"}),
        (("some/set", "en"), {"revision": "abc", "split": "dev"}),
    ]
    assert corpus.documents("validation") == TEXTS


def test_a_split_without_documents(monkeypatch, datasets):
    empty = datasets.Dataset.from_dict({"text": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: empty)
    with pytest.raises(UserError) as caught:
        hub(id="some/set", train_split="train[:0]")
    line = "data.corpus.train_split=train[:0]: the split holds no document; name another"
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"id": "./saved", "train_split": "trian"},
            "data.corpus.train_split=trian: the folder ./saved has no such split; it has train, "
            "chats; did you mean 'train'?",
        ),
        (
            {"id": "./rows", "train_split": "foo"},
            "data.corpus.train_split=foo: the folder ./rows has no splits, its rows are the "
            "training part; set data.corpus.train_split=train or a slice of it",
        ),
        (
            {"id": "./saved", "train_split": "train[a:]"},
            "data.corpus.train_split=train[a:]: Unrecognized instruction format: train[a:]; "
            "expected a split or a slice of one, such as train[:1000]",
        ),
        (
            {"id": "./rows", "test_split": "test"},
            "data.corpus.test_split=test: the folder ./rows has no splits, its rows are the "
            "training part; set data.corpus.test_split=null to hold documents out of it",
        ),
        (
            {"id": "./saved", "revision": "main"},
            "data.corpus.revision=main: a folder has none; set it to null",
        ),
        ({"id": "saved"}, "data.corpus.id=saved: there is a folder of that name; name it ./saved"),
        (
            {"id": "./plain"},
            "data.corpus.id=./plain: the folder holds no data set: FileNotFoundError: Directory "
            "plain is neither a `Dataset` directory nor a `DatasetDict` directory.; expected "
            "what save_to_disk wrote; for a folder of files take data=files "
            "data.corpus.train_path=./plain",
        ),
        (
            {"id": "./rows", "max_documents": 0},
            "data.corpus.max_documents=0: expected 1 or more, or null",
        ),
        (
            {"id": "./rows", "max_documents": 1},
            "data.corpus.held_out=0.05: of 1 documents none falls to validation; set another "
            "share, give more documents, or name data.corpus.validation_split=<split> or "
            "data.corpus.test_split=<split>",
        ),
        (
            {"id": "./rows", "text_key": "body"},
            "data.corpus.id=./rows, split train, row 0: the record has none of 'messages', 'body', "
            "or 'prompt' and 'completion'; it has 'text', 'id'; name the right key with "
            "data.corpus.text_key=<key> or data.corpus.messages_key=<key>",
        ),
        (
            {"id": "no/such"},
            "data.corpus.id=no/such: the data set cannot be loaded with train_split=train: "
            "ConnectionError: Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled); check "
            "id, split and network; without one, save it elsewhere with save_to_disk and name that "
            "folder",
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_told_in_one_line(arguments, line):
    with pytest.raises(UserError) as caught:
        hub(**arguments)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["data.corpus.id=./saved", "data.corpus.test_split=tests"],
            "data.corpus.test_split=tests: the folder ./saved has no such split; it has train, "
            "chats",
        ),
        ([], "data.corpus.id has no value; set it with data.corpus.id=<value>"),
    ],
)
def test_a_mistake_on_the_command_line(capfd, arguments, line):
    done = run_here(capfd, *TINY, "experiment=sft", "data=hub", *arguments)
    assert (done.code, done.err) == (2, f"error: {line}\n")


def test_a_saved_folder_trains(capfd, here: Path):
    done = run_here(capfd, *TINY, "experiment=sft", "data=hub", "data.corpus.id=./rows")
    assert done.code == 0, done.err
    assert list(here.glob("outputs/sft/*/student/config.json"))
