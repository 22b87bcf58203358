import pytest

from stillhouse.data.tasks.checking import said_answer, said_integer, says_exactly, says_integer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42),
        ("7+8=15, 4+3+1=8, so 85", 85),
        ("it is -4.", -4),
        ("15-3", 3),
        ("it is \u22124", -4),
        ("3 - -12", -12),
        ("1,234,567 apples", 1234567),
        ("85.00", 85),
        ("85.50", None),
        ("85.50, so 86", 86),
        ("007", 7),
        ("no number", None),
        ("", None),
        ("1" * 5000, None),
        ("6 and 7\n#### 13\n", 13),
        ("#### 12\nno: #### 13", 13),
        ("13 sheep. Answer: none", None),
        ("**Answer:** 13 sheep", 13),
        ("the answer : 5\nso 6", 6),
        ("my answer is 5, from 6", 6),
    ],
)
def test_the_last_number_of_what_a_text_says(text, expected):
    assert said_integer(text) == expected
    assert expected is None or says_integer(text, expected=expected)
    assert not says_integer(text, expected=99)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" nus \n", "nus"),
        ("sun\nAnswer: nus", "nus"),
        ("**ANSWER:** nus", "nus"),
        ("steps\n#### 1 2\n3 4\n", "1 2\n3 4"),
        ("#### sun\nno: #### nus", "nus"),
        ("the answers: nus", "the answers: nus"),
    ],
)
def test_an_answer_stands_behind_the_last_mark_or_is_the_whole_text(text, expected):
    assert said_answer(text) == expected


def test_exactly_is_up_to_white_space_around():
    assert says_exactly(" nus\n", expected="nus")
    assert not any(says_exactly(t, expected="nus") for t in ("nus.", "Nus", "n us", ""))
