"""1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), CC BY 4.0.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits

from stillhouse.data.pictures.pictures import Pictures, Samples, held_out
from stillhouse.ranges import Count

CLASSES = tuple(str(digit) for digit in range(10))


def digits(*, validation: Count = 200, test: Count = 500) -> Pictures:
    """Return the digits, nothing fetched.

    Args:
        validation, test: how many are held out for each.

    Raises:
        UserError: when none is left for training.
    """
    found: Any = load_digits()
    samples = Samples(
        torch.from_numpy(found.images).float().div(16).unsqueeze(1),
        torch.from_numpy(found.target).long(),
    )
    splits = held_out(samples, validation=validation, test=test)
    return Pictures("digits of 8 x 8", "CC BY 4.0", CLASSES, splits)
