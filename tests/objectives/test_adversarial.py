"""Adversarial losses against their optima over a few places, where both laws are known."""

import math

import pytest
import torch
from torch import Tensor

from stillhouse.objectives.adversarial import Adversarial, hinge, non_saturating

# How often each of four places is generated, and how often it is real.
FAKE, REAL = torch.tensor([4, 3, 2, 1]), torch.tensor([1, 2, 3, 4])


def discriminator_loss(
    loss: Adversarial, logits: Tensor, fake: Tensor = FAKE, real: Tensor = REAL
) -> Tensor:
    """Return L_D of a logit for each place."""
    generated, data = (logits[:, None].repeat_interleave(counts, 0) for counts in (fake, real))
    return loss.discriminator(generated, data)


def best(loss: Adversarial, fake: Tensor = FAKE, real: Tensor = REAL) -> tuple[Tensor, float]:
    """Return the logits that a discriminator without limits learns, and their loss."""
    logits = torch.full((4,), 0.3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=40,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = discriminator_loss(loss, logits, fake, real)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach(), float(discriminator_loss(loss, logits.detach(), fake, real))


def test_the_best_logit_is_the_log_ratio_of_the_laws() -> None:
    """L_D there is 2 ln 2 - 2 JSD."""
    logits, value = best(non_saturating())
    torch.testing.assert_close(logits, (REAL / FAKE).double().log(), atol=1e-5, rtol=0)
    p, q = REAL / 10, FAKE / 10
    middle = (p + q) / 2
    divergence = (p * (p / middle).log() + q * (q / middle).log()).sum() / 2
    assert value == pytest.approx(2 * math.log(2) - 2 * float(divergence), abs=1e-6)


def test_equal_laws_cannot_be_discriminated() -> None:
    """The best logit is 0 and L_D 2 ln 2; of the hinge 1, for any logit between -1 and 1."""
    logits, value = best(non_saturating(), REAL, REAL)
    assert logits.abs().max() < 1e-5
    assert value == pytest.approx(2 * math.log(2), abs=1e-9)
    for level in (-1.0, 0.0, 0.4, 1.0):
        assert discriminator_loss(hinge(), torch.full((4,), level), REAL, REAL) == pytest.approx(1)
    assert discriminator_loss(hinge(), torch.full((4,), 1.2), REAL, REAL) > 1


def test_the_best_hinge_says_which_is_likelier() -> None:
    """±1, from where no place's logit can move without a loss; L_D is what both laws share."""
    signs = torch.sign(REAL - FAKE).double()
    shared = float(torch.minimum(REAL, FAKE).sum()) / 10
    assert discriminator_loss(hinge(), signs) == pytest.approx(shared)
    for step in torch.cat([torch.eye(4), -torch.eye(4)]) * 0.1:
        assert discriminator_loss(hinge(), signs + step) > shared + 0.004


@pytest.mark.parametrize("loss", [non_saturating(), hinge()])
def test_samples_are_pulled_to_what_is_real_however_sure_their_logits(loss: Adversarial) -> None:
    """dL_G/dl is below 0, and at its largest where a sample is surely fake; it is a mean."""
    logits = torch.tensor([[-30.0, 30.0], [0.0, -30.0]], dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(loss.generator(logits), logits)
    assert (slope < 0).all()
    assert slope[0, 0].item() == slope[1, 1].item() == pytest.approx(-1 / 4)


def test_the_generator_reads_the_discriminators_sign() -> None:
    """L_G(l) = softplus(-l): the half of L_D that speaks of real data, asked of samples."""
    logits = torch.linspace(-3, 3, 8, dtype=torch.double)[:, None]
    far = torch.full((1, 1), -100.0, dtype=torch.double)
    loss = non_saturating()
    torch.testing.assert_close(loss.generator(logits), loss.discriminator(far, logits))
    torch.testing.assert_close(loss.generator(-logits), loss.discriminator(logits, -far))
