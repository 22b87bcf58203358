"""The job `sample`: text as it is made, the same for a seed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stillhouse import cli
from stillhouse.evaluation.samples import TextPieces, continuation

SAMPLE = ("--config-name", "sample")
PROMPTS = "prompts=[In the beginning,And God said]"
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


def rows_in(folder: Path) -> list[list[str]]:
    return json.loads((folder / "samples.json").read_text())


class Recorder:
    """A standard output that keeps every write."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.events: list[str] = []

    def write(self, text: str) -> int:
        self.events.append(text)
        return len(text)

    def flush(self) -> None:
        self.events.append("flush")

    def isatty(self) -> bool:
        return False


def test_text_appears_while_it_is_made(
    here: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    original = LlamaForCausalLM.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        recorder.events.append("forward")
        return original(*arguments, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(sys, "stdout", recorder)
    code = cli.run([*SAMPLE, f"run={run}", "prompts=[Thus]", "max_new_tokens=40"])
    monkeypatch.undo()
    assert code == 0
    steps = [i for i, event in enumerate(recorder.events) if event == "forward"]
    between = recorder.events[steps[5] : steps[-1]]
    written = [e for e in between if e not in ("forward", "flush")]
    assert len(written) > 10, "the text came in one piece"
    for text in written:
        after = between[between.index(text) + 1]
        assert after == "flush", "a piece waits in a buffer"


def test_what_is_shown_is_what_is_kept(capfd, here: Path, run: Path) -> None:
    done = run_here(capfd, *SAMPLE, f"run={run}", PROMPTS, "max_new_tokens=30")
    assert (done.code, done.err) == (0, "")
    assert [p.name for p in here.iterdir()] == ["sample"]
    rows = rows_in(here / "sample")
    assert [row[:2] for row in rows] == [
        ["student", "In the beginning"],
        ["student", "And God said"],
    ]
    kept = "".join(f"{prompt}{text}\n\n" for _, prompt, text in rows)
    allowed = {*"\n\t"}
    shown = "".join(c if c.isprintable() or c in allowed or ord(c) > 160 else "�" for c in kept)
    assert done.out == f"{shown}sample: samples.json\n"


def test_a_seed_repeats_its_text_and_another_seed_differs(capfd, here: Path, run: Path) -> None:
    for seed, to in ((0, "first"), (0, "again"), (1, "other")):
        done = run_here(
            capfd, *SAMPLE, f"run={run}", PROMPTS, f"seed={seed}", "max_new_tokens=20", f"to={to}"
        )
        assert done.code == 0, done.err
    assert rows_in(here / "first") == rows_in(here / "again")
    assert rows_in(here / "first") != rows_in(here / "other")


def test_the_runs_own_prompts_and_settings_give_its_own_samples(
    capfd, here: Path, run: Path
) -> None:
    for role in ("student", "teacher"):
        done = run_here(capfd, *SAMPLE, f"run={run}", f"role={role}", "max_new_tokens=4")
        assert done.code == 0, done.err
        own = json.loads((run / "stages" / "evaluate" / "samples.json").read_text())
        assert rows_in(here / "sample") == [row for row in own if row[0] == role]


def test_temperature_zero_takes_the_likeliest(capfd, here: Path, run: Path) -> None:
    for seed in (0, 1):
        done = run_here(capfd, *SAMPLE, f"run={run}", "temperature=0", f"seed={seed}", f"to={seed}")
        assert done.code == 0, done.err
    assert rows_in(here / "0") == rows_in(here / "1")


def test_a_chat_goes_through_the_tokenizers_own_template(capfd, here: Path, copy: Path) -> None:
    asked = (*SAMPLE, f"run={copy}", "prompts=[who]", "max_new_tokens=8")
    done = run_here(capfd, *asked, "chat=true")
    assert done == Finished(
        2,
        "",
        f"error: chat=true: the tokenizer of student ({copy / 'student'}) has no chat template; "
        "set chat=false\n",
    )
    assert not list(here.iterdir())
    (copy / "student" / "chat_template.jinja").write_text(CHAT)
    assert run_here(capfd, *asked, "chat=true").code == 0
    plain = run_here(capfd, *asked[:3], 'prompts=["<user> who <assistant>"]', asked[4], "to=plain")
    assert plain.code == 0, plain.err
    ((_, prompt, chatted),) = rows_in(here / "sample")
    assert prompt == "who"
    assert chatted == rows_in(here / "plain")[0][2]


def test_pieces_are_whole_characters_and_add_up(run: Path) -> None:
    """Tokens of a byte each: no piece holds half a character, and the last is not lost."""
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    model = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    pieces: list[str] = []
    text = continuation(
        model, tokenizer, "A", max_new_tokens=60, temperature=1.0, seed=3, show=pieces.append
    )
    assert "".join(pieces) == text
    streamer, shown = TextPieces(tokenizer, (heard := []).append), "né 春 …"
    ids = tokenizer(shown, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > len(shown)
    for value in (ids, *ids[0].split(1)):
        streamer.put(value)
    streamer.end()
    assert "".join(heard) == shown
    assert "\ufffd" not in "".join(heard)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "role=techer",
            "role=techer: the run has no such model; its models are teacher, student_alone, "
            "student; did you mean 'teacher'?",
        ),
        ("max_new_tokens=0", "max_new_tokens=0: expected 1 or more"),
        (
            "max_new_tokens=3000",
            "max_new_tokens=3000: with the 8 tokens of the prompt this is more than the model's "
            "2048 positions; expected at most 2040",
        ),
        (
            "max_new_tokens=few",
            "max_new_tokens: Value 'few' of type 'str' could not be converted to Integer",
        ),
        ("temperature=-1", "temperature=-1.0: expected 0, the likeliest token, or more"),
        (
            "prompts=[]",
            "prompts=[]: expected a list of texts, such as "
            "'prompts=[In the beginning,And God said]'",
        ),
        ("prompts=['']", "prompts: '' has no tokens; expected a text to go on from"),
        (
            "prompts=[it's]",
            "prompts=[it's]: the value cannot be read; put a text with quotes, commas, brackets or "
            'the like in it between double quotes: \'key=["one, two","(three)"]\'',
        ),
    ],
    ids=lambda value: value if ":" not in value else "",
)
def test_bad_values(capfd, here: Path, run: Path, argument: str, line: str) -> None:
    done = run_here(capfd, *SAMPLE, f"run={run}", argument)
    assert done == Finished(2, "", f"error: {line}\n")
    assert not list(here.iterdir())


def test_no_prompts_anywhere(capfd, here: Path, copy: Path) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("\nevaluation:", "\nnot_evaluation:"))
    done = run_here(capfd, *SAMPLE, f"run={copy}")
    assert done == Finished(
        2,
        "",
        "error: prompts: the run's own evaluation has none; give some: "
        "'prompts=[In the beginning,And God said]'\n",
    )


def test_a_tokenizer_that_is_gone(capfd, here: Path, copy: Path) -> None:
    for path in (copy / "student").glob("tokenizer*"):
        path.unlink()
    done = run_here(capfd, *SAMPLE, f"run={copy}")
    assert done.code == 2
    line = f"error: models.student={copy / 'student'}: no tokenizer can be loaded: "
    assert done.err.startswith(line)
    assert done.err.count("\n") == 1
