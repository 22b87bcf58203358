import pytest
import torch

from stillhouse.data.stream import generator_for
from stillhouse.data.windows import TokenWindows, Window, collate_windows
from stillhouse.errors import UserError

END = 0
LENGTH = 4
# Shorter than a window, empty, as long as one with and without its end token, and far longer.
DOCUMENTS = [[1, 2], [], [3, 4, 5], [6, 7, 8, 9], list(range(10, 25)), [], [25, 26]]
ROW = [END] + [token for document in DOCUMENTS for token in [*document, END]]


def windows_of(documents, packing, **changes) -> TokenWindows:
    return TokenWindows(documents, length=LENGTH, end_token=END, packing=packing, **changes)


def joined(windows: list[Window], field: str) -> list[int]:
    return [token for window in windows for token in getattr(window, field).tolist()]


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
    windows = [Window(torch.tensor([5, 6, 7]), torch.tensor([6, 7, 8]))]
    windows += [Window(torch.tensor([9]), torch.tensor([3]))]
    batch = collate_windows(windows, pad_token=1)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 1, 1]]
    assert batch.labels.tolist() == [[6, 7, 8], [3, 1, 1]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(batch.attention_mask, batch.mask)


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
