"""Many prompts: in batches of like lengths, each with draws and a file of its own."""

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stillhouse.data.stream import generator_for
from stillhouse.evaluation.exercises import Question
from stillhouse.teachers.decoding import Prompts
from stillhouse.teachers.sharded_decoding import BatchDecoder, decode_in_shards
from stillhouse.tracking.work import WorkProgress

LENGTHS = (5, 1, 4, 2, 3, 1, 6, 7)


def drawn(model: Any, prompts: Prompts) -> list[list[int]]:
    """Go on with the length of the prompt and a draw."""
    lengths = prompts.attention_mask.sum(1).tolist()
    return [[n, int(torch.randint(10**6, ()))] for n in lengths]


def run(folder: Path, *, decode: Any = drawn, seed: int = 0) -> tuple[list[list[int]], float, str]:
    """Return what follows every prompt, tokens a second, and what the console said."""
    prompts = [Question([1] * length, []) for length in LENGTHS]
    model: Any = None
    console = Console(file=io.StringIO(), width=200)
    with WorkProgress("rewrite", len(prompts), "prompts", console) as progress:
        found, rate = decode_in_shards(
            BatchDecoder(model, decode, end_token=0, pad_token=0),
            prompts,
            batch_size=3,
            seed=seed,
            folder=folder,
            progress=progress,
        )
    return found, rate, console.file.getvalue()  # type: ignore[attr-defined]


def test_batches_are_of_like_lengths_and_answers_in_the_order_of_the_prompts(tmp_path) -> None:
    seen: list[list[int]] = []

    def watched(model: Any, prompts: Prompts) -> list[list[int]]:
        seen.append(prompts.attention_mask.sum(1).tolist())
        assert prompts.input_ids.shape[1] == max(seen[-1]), "no wider than the longest of them"
        return drawn(model, prompts)

    found, _, _ = run(tmp_path, decode=watched)
    assert seen == [[1, 1, 2], [3, 4, 5], [6, 7]]
    assert [length for length, _ in found] == [*LENGTHS]


def test_every_batch_has_draws_of_its_own_whatever_was_drawn_before(tmp_path) -> None:
    found, _, _ = run(tmp_path / "whole")
    by_length = [draw for _, draw in sorted(found, key=lambda pair: pair[0])]
    expected = []
    for number, size in enumerate((3, 3, 2)):
        torch.manual_seed(generator_for(0, number).initial_seed())
        expected += [int(torch.randint(10**6, ())) for _ in range(size)]
    assert by_length == expected
    assert len(set(expected)) == len(LENGTHS)
    (tmp_path / "whole" / "part-00001.json").unlink()
    assert run(tmp_path / "whole")[0] == found
    assert run(tmp_path / "other", seed=1)[0] != found


def test_the_global_generator_has_no_part_in_it(tmp_path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found, _, _ = run(tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run(tmp_path / "other")[0] == found


def test_tokens_a_second_are_of_what_was_generated_now(tmp_path, monkeypatch) -> None:
    """Two tokens each of eight prompts in four seconds; then of the three of a lost batch."""
    monkeypatch.setattr(WorkProgress, "seconds", lambda self: 4.0)
    _, rate, said = run(tmp_path)
    assert rate == 16 / 4
    assert said == "rewrite: 8 of 8 prompts  2 prompts/s  4 tokens/s\n"
    (tmp_path / "part-00001.json").unlink()
    _, rate, said = run(tmp_path)
    assert rate == 6 / 4
    assert said == "rewrite: 8 of 8 prompts  1 prompts/s  2 tokens/s\n"
    _, rate, _ = run(tmp_path)
    assert rate == 0.0
