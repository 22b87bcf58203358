"""Distances between two sets of samples, as functions of tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.ranges import Count


def sliced_wasserstein(
    a: Float[Tensor, "N ..."], b: Float[Tensor, "M ..."], *, directions: Count = 256, seed: int = 0
) -> float:
    """Return the sliced 2-Wasserstein distance (Bonneel et al. 2015), in the samples' units.

    The root of the mean over random directions of the squared distance between the sorted
    projections; of unequal numbers, between their quantiles.

    Args:
        a, b: samples, flattened.
        directions: how many.
        seed: of the directions.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.double)
    lines = lines / lines.norm(dim=0)
    sides = [(x @ lines.to(x.device)).sort(dim=0).values for x in (a, b)]
    if len(a) != len(b):
        places = (torch.arange(max(len(a), len(b)), dtype=torch.double) + 0.5) / max(len(a), len(b))
        sides = [side.quantile(places.to(side.device), dim=0) for side in sides]
    return float((sides[0] - sides[1]).square().mean().sqrt())


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """Return the Fréchet distance of two Gaussians with the sets' means and covariances.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), after Heusel et al. (1706.08500), of whatever
    features: it is not the standard FID, whose features are Inception's.

    Args:
        a, b: features, two samples of each at least.
    """
    a, b = a.double(), b.double()
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), torch.atleast_2d(torch.cov(x.T))) for x in (a, b)
    )
    # tr (Σ_a Σ_b)^½ from the symmetric Σ_a^½ Σ_b Σ_a^½, whose eigenvalues are the same.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp_min(0))


def precision_and_recall(
    generated: Float[Tensor, "N D"], real: Float[Tensor, "M D"], *, neighbours: Count = 3
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 1904.06991).

    Precision is the share of generated samples within the real ones' manifold, recall the share of
    real ones within the generated ones'. A manifold is the union of balls that reach to the k-th
    neighbour of each sample.

    Args:
        generated, real: features, of more samples than `neighbours`.
        neighbours: k.
    """
    generated, real = generated.double(), real.double()
    across = torch.cdist(generated, real)
    radii_real, radii_generated = (_radii(x, neighbours) for x in (real, generated))
    precision = (across <= radii_real).any(1).double().mean()
    recall = (across <= radii_generated[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def _radii(x: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the sample itself.
    return torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values
