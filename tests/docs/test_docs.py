"""The pages hold to the tree: every message, every excerpt, every decision."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT
from scripts import imported

DOCS = ROOT / "docs"
EXCERPT = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
EXCERPTS = [
    pytest.param(file, text, id=f"{page.stem}-{Path(file).name}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, (file, text) in enumerate(EXCERPT.findall(page.read_text()))
]


@pytest.fixture(scope="module")
def build_messages() -> Iterator[Any]:
    with imported(DOCS / "build_messages.py") as module:
        yield module


def test_the_page_of_messages_is_made_of_the_whole_source(build_messages: Any) -> None:
    page = build_messages.page()
    for area in ("stages", "families", "students", "tracking", "stillhouse_kernels"):
        assert f"\n## {area}\n" in page
    assert "- `trainer.devices: the checkpoint of step <global step> was written by" in page


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise UserError('a word')", "a word"),
        ("raise UserError(f'{self.key}={value!r}: expected {n + 1}')", "<key>=<value>: expected"),
        ("raise BackendError(f'one of {\", \".join(sorted(KNOWN))}')", "one of <known, …>"),
        ("return UserError(f'no {name}{did_you_mean(name, all)}')", "no <name>[; did you mean …?]"),
        ("raise UserError(f'no {NAMED}')", "no file.json"),
        ('raise UserError(f\'no space{f" for {name}" if name else ""}\')', "no space[ for <name>]"),
        ("raise ValueError('of two ' + str(kind) + ' parts')", "of two <kind> parts"),
        ("message = f'said by {name}'\n    raise UserError(told(message))", "said by <name>"),
        ("raise UserError('one way' if one else 'or another')", "or another"),
        ("raise UserError(helper(1))", "of the helper <x>"),
        ("print(f'error: of {len(jobs)} jobs', file=sys.stderr)", "error: of <jobs> jobs"),
    ],
)
def test_a_message_is_found_however_it_is_made(
    build_messages: Any, source: str, expected: str
) -> None:
    helper = "def helper(x):\n    return f'of the helper {x}'\n"
    tree = ast.parse(f"{helper}def f():\n    {source}\n")
    found = list(build_messages.messages(tree, False, {"NAMED": "file.json"}))
    assert any(message.startswith(expected) for message in found), found


def test_our_own_mistakes_and_others_words_are_no_messages(build_messages: Any) -> None:
    source = (
        "raise AssertionError('our own')\nraise UserError(str(error))\nprint('a line of a log')"
    )
    assert not list(build_messages.messages(ast.parse(source), False, {}))


def test_a_mend_is_one_of_a_message_that_is_there(build_messages: Any) -> None:
    page = build_messages.page()
    for entry in yaml.safe_load((DOCS / "mends.yaml").read_text()):
        assert f"- `{entry['message']}`: {entry['mend']}\n" in page


@pytest.mark.parametrize(("file", "text"), EXCERPTS)
def test_an_excerpt_stands_in_its_file(file: str, text: str) -> None:
    """Lines of `…` alone stand for what is left out."""
    source = (ROOT / file).read_text()
    for part in re.split(r"^ *…\n", text, flags=re.MULTILINE):
        assert part.strip("\n") in source, part


def test_every_decision_is_listed() -> None:
    listed = re.findall(r"\]\((\S+\.md)\)", (DOCS / "decisions" / "README.md").read_text())
    assert listed == sorted(p.name for p in (DOCS / "decisions").glob("0*.md"))
