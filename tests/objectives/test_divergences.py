import math

import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import named_divergence
from stillhouse.objectives.tokens import log_probs

BETA, ALPHA = 0.3, 0.1
SMOOTH = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
NAMES = [*SMOOTH, "total_variation"]


def divergence(name, beta=BETA, alpha=ALPHA):
    return named_divergence(name, beta=beta, alpha=alpha)


def random_logits(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(rel_entr(a.numpy(), b.numpy())).sum(-1)


def direct_value(name: str, P: Tensor, Q: Tensor) -> Tensor:
    """The method card's column D, from probabilities."""
    M = BETA * P + (1 - BETA) * Q
    return {
        "forward_kl": lambda: kl(P, Q),
        "reverse_kl": lambda: kl(Q, P),
        "jsd": lambda: BETA * kl(P, M) + (1 - BETA) * kl(Q, M),
        "skew_forward_kl": lambda: kl(P, ALPHA * P + (1 - ALPHA) * Q),
        "skew_reverse_kl": lambda: kl(Q, (1 - ALPHA) * P + ALPHA * Q),
        "total_variation": lambda: 0.5 * (P - Q).abs().sum(-1),
    }[name]()


def direct_gradient(name: str, P: Tensor, Q: Tensor) -> Tensor:
    """The method card's column "gradient in s", for distributions without zeros, τ = 1."""
    if name == "forward_kl":
        return Q - P
    if name == "reverse_kl":
        return Q * ((Q / P).log() - kl(Q, P).unsqueeze(-1))
    if name == "jsd":
        g = (1 - BETA) * (Q / (BETA * P + (1 - BETA) * Q)).log()
    elif name == "skew_forward_kl":
        g = -(1 - ALPHA) * P / (ALPHA * P + (1 - ALPHA) * Q)
    elif name == "skew_reverse_kl":
        M = (1 - ALPHA) * P + ALPHA * Q
        g = (Q / M).log() - ALPHA * Q / M
    else:
        g = 0.5 * (Q - P).sign()
    return Q * (g - (Q * g).sum(-1, keepdim=True))


def gradient_in_logits(name: str, s: Tensor, t: Tensor, tau: float = 1.0, **weights) -> Tensor:
    s = s.clone().requires_grad_()
    value = divergence(name, **weights)(log_probs(s, tau), log_probs(t, tau))
    return torch.autograd.grad(value.sum(), s)[0]


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_direct_formula(name):
    s, t = random_logits(3, 4, 11, seed=0), random_logits(3, 4, 11, seed=1)
    value = divergence(name)(log_probs(s), log_probs(t))
    torch.testing.assert_close(
        value, direct_value(name, t.softmax(-1), s.softmax(-1)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_the_logits_is_that_of_the_card(name, tau):
    s, t = random_logits(5, 11, seed=2), random_logits(5, 11, seed=3)
    gradient = gradient_in_logits(name, s, t, tau)
    expected = direct_gradient(name, (t / tau).softmax(-1), (s / tau).softmax(-1)) / tau
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_finite_differences(name):
    s, t = random_logits(2, 7, seed=4).requires_grad_(), random_logits(2, 7, seed=5)
    measure = divergence(name)
    torch.autograd.gradcheck(
        lambda logits: measure(log_probs(logits), log_probs(t)), s, atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("name", NAMES)
def test_divergence_and_gradient_vanish_where_student_equals_teacher(name):
    s = random_logits(4, 9, seed=6)
    value = divergence(name)(log_probs(s), log_probs(s))
    torch.testing.assert_close(value, torch.zeros(4).double(), rtol=0, atol=1e-15)
    gradient = gradient_in_logits(name, s, s)
    torch.testing.assert_close(gradient, torch.zeros_like(s), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("beta", "factor", "limit"),
    [(1e-3, 1e-3, "forward_kl"), (1 - 1e-3, 1e-3, "reverse_kl")],
)
def test_jsd_over_its_vanishing_weight_tends_to_a_kl(beta, factor, limit):
    # Mild distributions: the next order in beta grows with the largest ratio of P to Q.
    s, t = 0.5 * random_logits(6, 9, seed=7), 0.5 * random_logits(6, 9, seed=8)
    log_q, log_p = log_probs(s), log_probs(t)
    scaled = divergence("jsd", beta=beta)(log_q, log_p) / factor
    torch.testing.assert_close(scaled, divergence(limit)(log_q, log_p), rtol=0.01, atol=0)


@pytest.mark.parametrize(("beta", "special"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_the_ends_of_beta_is_a_whole_kl(beta, special):
    s, t = random_logits(6, 9, seed=9), random_logits(6, 9, seed=10)
    at_the_end = divergence("jsd", beta=beta)(log_probs(s), log_probs(t))
    assert torch.equal(at_the_end, divergence(special)(log_probs(s), log_probs(t)))
    assert torch.equal(
        gradient_in_logits("jsd", s, t, beta=beta), gradient_in_logits(special, s, t)
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_symmetric_when_the_weights_are_swapped(beta):
    log_q, log_p = log_probs(random_logits(6, 9, seed=11)), log_probs(random_logits(6, 9, seed=12))
    forward = divergence("jsd", beta=beta)(log_q, log_p)
    torch.testing.assert_close(forward, divergence("jsd", beta=1 - beta)(log_p, log_q))


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_skew_zero_is_the_plain_kl(direction):
    s, t = random_logits(6, 9, seed=13), random_logits(6, 9, seed=14)
    skewed = divergence(f"skew_{direction}", alpha=0.0)(log_probs(s), log_probs(t))
    assert torch.equal(skewed, divergence(direction)(log_probs(s), log_probs(t)))


BOUNDS = {
    "jsd": -BETA * math.log(BETA) - (1 - BETA) * math.log(1 - BETA),
    "skew_forward_kl": -math.log(ALPHA),
    "skew_reverse_kl": -math.log(ALPHA),
    "total_variation": 1.0,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bound_holds_and_is_reached_at_disjoint_supports(name):
    measure, bound = divergence(name), BOUNDS[name]
    s, t = 10 * random_logits(200, 9, seed=15), 10 * random_logits(200, 9, seed=16)
    assert measure(log_probs(s), log_probs(t)).max() <= bound + 1e-12

    inf = torch.inf
    s = torch.tensor([0.0, 1.0, -inf, -inf], dtype=torch.float64)
    t = torch.tensor([-inf, -inf, 0.5, 0.0], dtype=torch.float64)
    assert measure(log_probs(s), log_probs(t)).item() == pytest.approx(bound, rel=1e-12)
    nearly = measure(log_probs(s.clamp_min(-20)), log_probs(t.clamp_min(-20))).item()
    assert 0.999 * bound < nearly < bound


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("forward_kl", 1.0),
        ("reverse_kl", 1.0),
        ("jsd", BETA * (1 - BETA)),
        ("skew_forward_kl", (1 - ALPHA) ** 2),
        ("skew_reverse_kl", (1 - ALPHA) ** 2),
    ],
)
def test_at_high_temperature_the_divergence_is_the_squared_distance_of_centred_logits(name, share):
    s, t = random_logits(4, 9, seed=17), random_logits(4, 9, seed=18)
    tau = 1e4
    value = tau**2 * divergence(name)(log_probs(s, tau), log_probs(t, tau))
    difference = (t - t.mean(-1, keepdim=True)) - (s - s.mean(-1, keepdim=True))
    expected = share * difference.square().sum(-1) / (2 * 9)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("impossible_for", ["teacher", "student", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_impossible_tokens_give_the_limit_and_no_nan(name, impossible_for):
    s, t = random_logits(3, 8, seed=19), random_logits(3, 8, seed=20)
    if impossible_for != "student":
        t[:, 2] = -torch.inf
    if impossible_for != "teacher":
        s[:, 2] = -torch.inf
    value = divergence(name)(log_probs(s), log_probs(t))
    expected = direct_value(name, t.softmax(-1), s.softmax(-1))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    infinite = {("forward_kl", "student"), ("reverse_kl", "teacher")}
    assert value.isinf().all() == ((name, impossible_for) in infinite)

    gradient = gradient_in_logits(name, s, t)
    if (name, impossible_for) == ("reverse_kl", "teacher"):
        # Q log Q/P is infinite in the value and in the derivative: no finite answer exists.
        assert not gradient.isfinite().all()
        return
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-14)
    if impossible_for != "teacher" and value.isfinite().all():
        assert torch.equal(gradient[:, 2], torch.zeros(3).double())


@pytest.mark.parametrize("name", NAMES)
def test_token_impossible_for_both_is_as_if_it_were_not_there(name):
    s, t = random_logits(3, 8, seed=21), random_logits(3, 8, seed=22)
    s[:, 5] = t[:, 5] = -torch.inf
    kept = [0, 1, 2, 3, 4, 6, 7]
    with_it = gradient_in_logits(name, s, t)[:, kept]
    torch.testing.assert_close(with_it, gradient_in_logits(name, s[:, kept], t[:, kept]))


def test_tie_has_no_gradient_in_total_variation():
    s = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    t = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64).log()
    Q, g = s.exp(), torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    # Without the shift of log_softmax, whose rounding would break the tie.
    leaf = s.clone().requires_grad_()
    divergence("total_variation")(leaf, t).backward()
    torch.testing.assert_close(leaf.grad, Q * g)


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("kl", {}, "forward_kl"),
        ("", {}, "forward_kl"),
        ("jsd", {"beta": -0.1}, "beta"),
        ("jsd", {"beta": 1.1}, "beta"),
        ("jsd", {"beta": math.nan}, "beta"),
        ("skew_forward_kl", {"alpha": 1.0}, "alpha"),
        ("skew_reverse_kl", {"alpha": -0.01}, "alpha"),
    ],
)
def test_unknown_name_or_weight_out_of_range_is_refused(name, weights, named):
    with pytest.raises(UserError, match=named):
        divergence(name, **weights)


def test_a_divergence_does_not_look_at_the_weights_of_others():
    log_q, log_p = log_probs(random_logits(6, seed=23)), log_probs(random_logits(6, seed=24))
    odd = named_divergence("forward_kl", beta=7.0, alpha=-3.0)(log_q, log_p)
    assert torch.equal(odd, divergence("forward_kl")(log_q, log_p))


@pytest.mark.parametrize(("name", "centre"), [("forward_kl", 0.0), ("reverse_kl", 2.0)])
def test_forward_kl_covers_both_modes_and_reverse_kl_picks_one(name, centre):
    x = torch.linspace(-6, 6, 121, dtype=torch.float64)
    log_p = torch.logaddexp(-2 * (x + 2) ** 2, -2 * (x - 2) ** 2).log_softmax(-1)
    # Nearer to the right mode from the start, so that symmetry does not decide.
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    measure = divergence(name)
    for _ in range(300):
        log_q = log_probs(-2 * (x - mean) ** 2)
        (gradient,) = torch.autograd.grad(measure(log_q, log_p), mean)
        mean = (mean - 0.05 * gradient).detach().requires_grad_()
    assert mean.item() == pytest.approx(centre, abs=0.02)
