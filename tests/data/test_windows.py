from dataclasses import replace

import pytest
import torch

from stillhouse.data.documents import TokenDocument
from stillhouse.data.encoding import text_as_tokens
from stillhouse.data.stream import generator_for
from stillhouse.data.windows import TokenWindows, Window, collate_windows
from stillhouse.errors import UserError

END = 0
LENGTH = 4
# Shorter than a window, empty, as long as one with and without its end token, and far longer.
DOCUMENTS = [[1, 2], [], [3, 4, 5], [6, 7, 8, 9], list(range(10, 25)), [], [25, 26]]
ROW = [END] + [token for document in DOCUMENTS for token in [*document, END]]


def windows_of(documents, packing, **changes) -> TokenWindows:
    return rows_of([text_as_tokens(d, END) for d in documents], packing, **changes)


def rows_of(documents, packing, **changes) -> TokenWindows:
    return TokenWindows(documents, length=LENGTH, end_token=END, packing=packing, **changes)


def joined(windows: list[Window], field: str) -> list[int]:
    return [token for window in windows for token in getattr(window, field).tolist()]


def spoken(tokens: list[int], learned: str) -> TokenDocument:
    """Return a document that starts by itself; an x says what is learnt."""
    return TokenDocument(tokens, [c == "x" for c in learned], follows_end=False)


def predictions(windows: list[Window]) -> list[tuple[int, int]]:
    """Return (token before, token) of every learnt token."""
    return [
        (int(before), int(token))
        for w in windows
        for before, token in zip(w.input_ids[w.learned], w.labels[w.learned], strict=True)
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "documents", [DOCUMENTS, [[1]], [[]], [[], []], [list(range(1, 9))]], ids=str
)
def test_every_token_is_predicted_exactly_once_from_the_token_before_it(documents, packing):
    windows = windows_of(documents, packing).in_order()
    row = [END] + [token for document in documents for token in [*document, END]]
    assert joined(windows, "labels") == row[1:]
    assert joined(windows, "input_ids") == row[:-1]
    assert all(1 <= len(w.input_ids) == len(w.labels) <= LENGTH for w in windows)
    assert all(w.learned.all() for w in windows)
    assert [w.index for w in windows] == list(range(len(windows)))


def test_packed_windows_are_full_but_the_last():
    lengths = [len(w.input_ids) for w in windows_of(DOCUMENTS, True).in_order()]
    assert lengths == [4] * 8 + [1]


def test_without_packing_a_window_ends_with_its_document():
    windows = windows_of(DOCUMENTS, False).in_order()
    labels = [w.labels.tolist() for w in windows]
    assert labels[:5] == [[1, 2, 0], [0], [3, 4, 5, 0], [6, 7, 8, 9], [0]]
    assert labels[5:9] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21], [22, 23, 24, 0]]
    assert labels[9:] == [[0], [25, 26, 0]]


def test_no_documents_give_no_windows():
    for packing in (True, False):
        assert len(windows_of([], packing)) == 0


def test_sample_without_shift_is_the_window_in_order():
    windows = windows_of(DOCUMENTS, True)
    for index, expected in enumerate(windows.in_order()):
        sample = windows.sample(index, generator_for(1))
        assert torch.equal(sample.input_ids, expected.input_ids)
        assert torch.equal(sample.labels, expected.labels)
        assert sample.labels.dtype == torch.long
        assert torch.equal(sample.learned, expected.learned)
        assert sample.index == index


@pytest.mark.parametrize("last", range(20, 25))
def test_shifted_window_stays_inside_the_row_and_reaches_every_offset(last):
    # Tokens are their own positions, so a window tells where it was taken from.
    windows = windows_of([list(range(1, last))], True, shift_windows=True)
    for index, (start, stop) in enumerate(windows.spans):
        samples = [windows.sample(index, generator_for(seed)) for seed in range(60)]
        starts = {int(sample.input_ids[0]) for sample in samples}
        for sample in samples:
            first, length = int(sample.input_ids[0]), stop - start
            assert sample.input_ids.tolist() == list(range(first, first + length))
            successors = list(range(first + 1, first + length + 1))
            # The row ends with the end token.
            assert sample.labels.tolist() == [0 if t == last else t for t in successors]
            assert sample.index is None
        assert starts == set(range(start, min(start + LENGTH, last + 1 - (stop - start))))


def test_shift_is_decided_by_the_generator_and_spares_evaluation():
    windows = windows_of(DOCUMENTS, True, shift_windows=True)
    one, same = (windows.sample(2, generator_for(5)) for _ in range(2))
    assert torch.equal(one.input_ids, same.input_ids)
    assert joined(windows.in_order(), "labels") == ROW[1:]


def test_unpacked_windows_are_not_shifted():
    with pytest.raises(UserError, match=r"data.shift_windows=true needs data.packing=true"):
        windows_of([[1, 2, 3, 4, 5, 6], [7, 8, 9]], False, shift_windows=True)


def test_collated_batch_pads_on_the_right_and_masks_by_length():
    three, one = torch.tensor([True, False, True]), torch.tensor([True])
    windows = [Window(torch.tensor([5, 6, 7]), torch.tensor([6, 7, 8]), three, 4)]
    windows += [Window(torch.tensor([9]), torch.tensor([3]), one, 2)]
    batch = collate_windows(windows, pad_token=1)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 1, 1]]
    assert batch.labels.tolist() == [[6, 7, 8], [3, 1, 1]]
    assert batch.mask.tolist() == [[True, False, True], [True, False, False]]
    # What is not learnt is read all the same.
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.windows.tolist() == [4, 2]
    drawn = [windows[0], replace(windows[1], index=None)]
    assert collate_windows(drawn, pad_token=1).windows is None


def test_batch_of_equal_windows_needs_no_attention_mask():
    batch = collate_windows(windows_of(DOCUMENTS, True).in_order()[:3], pad_token=END)
    assert batch.attention_mask is None
    assert batch.mask.all()


@pytest.mark.parametrize("packing", [True, False])
def test_end_token_counts_when_it_is_the_pad_token_too(packing):
    batch = collate_windows(windows_of(DOCUMENTS, packing).in_order(), pad_token=END)
    assert batch.labels[batch.mask].tolist() == ROW[1:]
    assert batch.input_ids[batch.mask].tolist() == ROW[:-1]
    assert not batch.mask.all()


# A question and its answer, one longer than two windows, one of which only the last is learnt.
SPOKEN = [
    spoken([31, 32, 33, 34], "..xx"),
    spoken([*range(40, 52), END], "." * 9 + "xxxx"),
    spoken([61, 62, 63], "..x"),
]
ANSWERS = [(32, 33), (33, 34), (48, 49), (49, 50), (50, 51), (51, END), (62, 63)]


def test_only_what_is_learnt_is_predicted_packed():
    windows = rows_of(SPOKEN, True)
    assert windows.tokens.tolist() == [31, 32, 33, 34, *range(40, 52), END, 61, 62, 63]
    # Of 19 tokens to predict, those of the windows 40..43 and 44..47 are not learnt.
    assert [w.input_ids.tolist() for w in windows.in_order()] == [
        [31, 32, 33, 34],
        [48, 49, 50, 51],
        [END, 61, 62],
    ]
    assert predictions(windows.in_order()) == ANSWERS
    assert [w.index for w in windows.in_order()] == [0, 1, 2]
    assert windows.learned_lengths() == [2, 4, 1]


def test_only_what_is_learnt_is_predicted_unpacked():
    windows = rows_of(SPOKEN, False)
    assert [w.input_ids.tolist() for w in windows.in_order()] == [
        [31, 32, 33],
        [48, 49, 50, 51],
        [61, 62],
    ]
    assert predictions(windows.in_order()) == ANSWERS
    assert windows.learned_lengths() == [2, 4, 1]


@pytest.mark.parametrize("packing", [True, False])
def test_texts_follow_an_end_token_and_conversations_do_not(packing):
    text = text_as_tokens([1, 2], END)
    ended, open_ended = spoken([41, 42, END], ".xx"), spoken([51, 52], ".x")
    windows = rows_of([ended, open_ended, text, ended, text, open_ended], packing)
    # An end token is put in only where none stands, and is itself not learnt.
    row = [41, 42, END, 51, 52, END, 1, 2, END, 41, 42, END, 1, 2, END, 51, 52]
    assert windows.tokens.tolist() == row
    spoken_by = [(41, 42), (42, END)]
    written = [(END, 1), (1, 2), (2, END)]
    expected = [*spoken_by, (51, 52), *written, *spoken_by, *written, (51, 52)]
    assert predictions(windows.in_order()) == expected
    if not packing:
        lengths = [len(w.labels) for w in windows.in_order()]
        assert lengths == [2, 1, 3, 2, 3, 1], "a window ends with its document"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("document", [[], [7], [7, 8, 9], list(range(1, 20))], ids=len)
def test_documents_without_a_token_to_learn_give_no_windows(packing, document):
    windows = rows_of([spoken(document, "." * len(document))], packing)
    assert len(windows) == 0
    assert windows.in_order() == windows.learned_lengths() == []


def test_windows_are_named_in_any_stretch():
    windows = windows_of(DOCUMENTS, True)
    some = windows.in_order(range(2, 5))
    assert [w.index for w in some] == [2, 3, 4]
    assert [w.labels.tolist() for w in some] == [
        windows.window(i).labels.tolist() for i in range(2, 5)
    ]
    assert windows.learned_lengths() == [4] * 8 + [1]


def test_identity_tells_every_token_mask_and_span_apart():
    text = [*range(1, 9)]

    def identity(tokens, learned, **changes):
        options = {"length": LENGTH, "end_token": END, "packing": True, **changes}
        return TokenWindows([spoken(tokens, learned)], **options).identity()

    learned = ".xxxxxx."
    same = identity(text, learned)
    assert identity(list(text), learned) == same
    others = [identity([*text[:i], 30, *text[i + 1 :]], learned) for i in range(8)]
    for i in range(8):
        flipped = learned[:i] + ("x" if learned[i] == "." else ".") + learned[i + 1 :]
        others.append(identity(text, flipped))
    others += [identity(text, learned, length=5), identity(text[:4], learned[:4])]
    # Equal tokens in one row, cut at another place.
    halves = [spoken(text[:3], ".xx"), spoken(text[3:], "xxxx.")]
    others.append(rows_of(halves, False).identity())
    assert len({same, *others}) == len(others) + 1
