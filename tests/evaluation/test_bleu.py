import pytest

from stillhouse.evaluation.bleu import sentence_bleu


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("a b c d e f", "a b c d e f", 1.0),
        ("a b c x e f", "a b c d e f", 0.48549177170732355),
        ("a b c", "a b c d e f", 0.3678794411714425),
        ("a x b y c z", "a b c d e f g", 0.21506254256566307),
        ("x y", "a b", 0.0),
        ("a b a b a b a b", "a b c", 0.1964073254502565),
    ],
)
def test_values_are_sacrebleu_s(candidate, reference, expected):
    """sacrebleu 2.x, BLEU(smooth_method="add-k", smooth_value=1, tokenize="none")."""
    found = sentence_bleu(candidate.split(), reference.split())
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("candidate", "reference"), [([], [1]), ([1], []), ([], [])])
def test_nothing_is_near_to_nothing(candidate, reference):
    assert sentence_bleu(candidate, reference) == 0.0
