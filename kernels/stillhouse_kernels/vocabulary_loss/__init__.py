"""The divergence of two vocabulary heads, and its gradients, without the logits.

The derivation and the costs are in the README beside this file.
"""

from stillhouse_kernels.vocabulary_loss.interface import linear_divergence
from stillhouse_kernels.vocabulary_loss.settings import TeacherTopK

__all__ = ["TeacherTopK", "linear_divergence"]
