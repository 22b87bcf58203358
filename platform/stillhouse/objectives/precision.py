"""The precision that losses are computed in."""

import torch
from jaxtyping import Float
from torch import Tensor


def wide(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return half precision in float32; what is wider stays as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
