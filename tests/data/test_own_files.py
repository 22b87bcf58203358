from pathlib import Path

import pytest
from chats import CHATML, bracketed, chat_tokenizer, marked
from commands import TINY, run_here
from own_files import ANSWER, USER, WAYS_IN, lines
from transformers import AutoTokenizer

from stillhouse.data.documents import Conversation
from stillhouse.data.language import LanguageData

pytestmark = pytest.mark.usefixtures("own_folder")

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [7, 64, 500])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        marked("{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}"),
    ],
    ids=["plain", "marked"],
)
def test_training_predicts_every_learnt_token_once(packing, length, template):
    tokenizer = chat_tokenizer(template)
    tokenizer.save_pretrained("tokenizer")
    short = [{"prompt": f"{w}?", "completion": w * 3} for w in WORDS]
    long = [{"messages": [{"role": "user", "content": w * 90}, {**ANSWER, "content": w * 99}]}
            for w in WORDS]  # fmt: skip
    Path("a.jsonl").write_bytes(lines(*short, {"text": "plain"}, *long, {"text": "text " * 40}))
    data = LanguageData(
        0,
        corpus={
            "_target_": "stillhouse.data.corpora.files.files",
            "train_path": "a.jsonl",
            "validation_path": "held.txt",
            "test_path": "held.txt",
        },
        tokenizer_path="./tokenizer",
        sequence_length=length,
        batch_size=2,
        evaluation_batch_size=4,
        packing=packing,
    )
    windows = data.windows("train").in_order()
    said = [f"{w * 3}<|im_end|>" for w in WORDS] + ["plain<|im_end|>"]
    said += [f"{w * 99}<|im_end|>" for w in WORDS] + ["text " * 40 + "<|im_end|>"]
    predicted = [int(t) for w in windows for t in w.labels[w.learned]]
    assert data.tokenizer.decode(predicted) == "".join(said)
    assert data.text_bytes("train") is None
    assert data.text_bytes("test") == len("held out")


@pytest.mark.parametrize(("held", "packing", "packed"), [
    ("chats.jsonl", False, False), ("chats.jsonl", True, True), ("held.txt", False, True),
])  # fmt: skip
def test_held_out_conversations_are_packed_as_training_is_and_text_always(held, packing, packed):
    chat_tokenizer(CHATML).save_pretrained("tokenizer")
    chats = [{"prompt": f"{w}?", "completion": w * 3} for w in WORDS]
    Path("chats.jsonl").write_bytes(lines(*chats))
    Path("held.txt").write_text("\n\n".join(WORDS))
    data = LanguageData(
        0,
        corpus={
            "_target_": "stillhouse.data.corpora.files.files",
            "train_path": "chats.jsonl",
            "validation_path": held,
            "test_path": held,
        },
        tokenizer_path="./tokenizer",
        sequence_length=500,
        batch_size=2,
        evaluation_batch_size=4,
        packing=packing,
    )
    assert len(data.windows("test")) == (1 if packed else len(WORDS))
    assert len(data.windows("train")) == (1 if packing else len(WORDS))


def run_files(capfd, *arguments: str):
    return run_here(capfd, *TINY, "experiment=sft", "data=files", *arguments)


def test_a_chat_file_trains_with_a_tokenizer_of_its_own(capfd, here: Path):
    records = [
        {"messages": [{**USER, "content": f"say {i} so"}, {**ANSWER, "content": f"so {i}"}]}
        for i in range(60)
    ]
    Path("my.jsonl").write_bytes(lines(*records))
    done = run_files(capfd, "data.corpus.train_path=my.jsonl")
    assert done.code == 0, done.err
    (student,) = here.glob("outputs/sft/*/student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    prompt = tokenizer.apply_chat_template(
        records[0]["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>say 0 so<|end|><|assistant|>"
    (document,) = encode_one(records[0], tokenizer)
    assert bracketed(document, tokenizer) == prompt + "[so 0<|end|>]"
    tokens = tokenizer("<|user|>so<|end|>")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "so"


def encode_one(record, tokenizer):
    from stillhouse.data.encoding import encode

    return encode([Conversation(record["messages"], "here")], tokenizer, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("content", "arguments", "line"),
    [
        (
            b"",
            [],
            "data.corpus.train_path has no value; set it with data.corpus.train_path=<value>",
        ),
        (
            b"",
            ["data.corpus.train_path=your.jsonl"],
            f"data.corpus.train_path=your.jsonl: there is no such file or folder; {WAYS_IN}",
        ),
        (
            lines({"text": "one"}) + b"{two}\n",
            ["data.corpus.train_path=my.jsonl"],
            "data.corpus.train_path=my.jsonl, line 2: not JSON: Expecting property name enclosed "
            'in double quotes at column 2; expected a record a line, such as {"text": "…"}',
        ),
        (
            lines({"text": "one"}, {"text": "two"}),
            ["data.corpus.train_path=my.jsonl", "data.corpus.test_path=my.jsonl"],
            "data.corpus.held_out=0.05: of 2 documents none falls to validation; set another "
            "share, give more documents, or name data.corpus.validation_path=<file>",
        ),
        (
            lines({"prompt": "one", "completion": "two"}),
            [f"data.corpus.{p}_path=my.jsonl" for p in ("train", "validation", "test")]
            + ["data.tokenizer_path=./tokenizer"],
            "data.tokenizer_path=./tokenizer: the tokenizer has no chat template, which "
            "data.corpus.train_path=my.jsonl, line 1 needs; name a tokenizer with one, or give "
            "records with a text",
        ),
        (
            lines({"prompt": "one", "completion": "two"}),
            [f"data.corpus.{p}_path=my.jsonl" for p in ("train", "validation", "test")]
            + ["stages.tokenizer.vocab_size=261"],
            "stages.tokenizer.vocab_size=261: expected at least 262, 256 bytes and 6 special "
            "tokens",
        ),
    ],
    ids=["no path", "no file", "no JSON", "too few", "no template", "no room for roles"],
)
def test_a_mistake_is_told_in_one_line(capfd, content, arguments, line):
    Path("my.jsonl").write_bytes(content)
    chat_tokenizer(None).save_pretrained("tokenizer")
    done = run_files(capfd, *arguments)
    assert (done.code, done.err) == (2, f"error: {line}\n")
