"""The Triton kernels of the loss, in the interpreter where there is no GPU, against plain torch."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from stillhouse_kernels.vocabulary_loss import TeacherTopK, kernel, launch, linear_divergence
from stillhouse_kernels.vocabulary_loss.settings import Divergence, Settings, Shaping

# NumPy, which interprets, also works out what `tl.where` discards: -inf - -inf and 0 · inf.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DIVERGENCES = get_args(Divergence)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: (2e-6, 2e-5), torch.float16: (1e-3,) * 2, torch.bfloat16: (1e-2,) * 2}


@dataclass
class Problem:
    """Two heads: X [n, H], W [V, H], b [V]; Y [n, Ht], U [V, Ht], c [V]; float64."""

    X: Tensor
    W: Tensor
    b: Tensor
    Y: Tensor
    U: Tensor
    c: Tensor

    def __call__(self, *, backend: str = "triton", **options: Any) -> list[Tensor]:
        """Return the loss, dX, dW and db."""
        X, W, b = (x.detach().requires_grad_() for x in (self.X, self.W, self.b))
        dense = options.get("teacher_topk") is None
        Y, U, c = (self.Y, self.U, self.c) if dense else (None, None, None)
        options |= {"student_bias": b, "teacher_bias": c, "backend": backend}
        loss = linear_divergence(X, W, Y, U, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (X, W, b))]

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in vars(self).values()))


def problem(n: int = 5, V: int = 300, H: int = 8, Ht: int = 6) -> Problem:
    g = torch.Generator().manual_seed(0)
    shapes = [(n, H), (V, H), (V,), (n, Ht), (V, Ht), (V,)]
    made = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return Problem(*(x.to(DEVICE) for x in made))


def top_k(p: Problem, k: int, drawn: int = 0) -> TeacherTopK:
    log_probs, order = (p.Y @ p.U.t() + p.c).log_softmax(-1).sort(-1, descending=True)
    residual = log_probs[:, k:].logsumexp(-1)
    kept = TeacherTopK(order[:, :k], log_probs[:, :k], residual)
    if not drawn:
        return kept
    columns = torch.arange(drawn, device=DEVICE) * 7 + k
    return kept._replace(tail_ids=order[:, columns], tail_entropy=residual.exp())


def assert_close_in_norm(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    values, slopes = TOLERANCES[dtype]
    for name, a, b in zip(("loss", "dX", "dW", "db"), got, exact, strict=True):
        error = (a.double() - b.double()).norm() / b.norm().double().clamp_min(1e-9)
        assert error <= (values if name == "loss" else slopes), f"{name}: {error:.1e}"


@pytest.mark.parametrize("teacher", ["dense", "top-k"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_plain_form(divergence: str, dtype: torch.dtype, teacher: str) -> None:
    p = problem().to(dtype)
    mask = torch.arange(5, device=DEVICE) != 2
    p.X[2], p.Y[2] = torch.nan, torch.inf
    options: dict[str, Any] = {"divergence": divergence, "mask": mask, "temperature": 1.5}
    options |= {"logit_softcap": (4.0, None), "logit_scale": (0.5, 2.0), "alpha": 0.3, "beta": 0.3}
    if teacher == "top-k":
        finite = replace(p.to(torch.float64), Y=problem().Y)
        options["teacher_topk"] = top_k(finite, 4, 3)
    exact = p.to(torch.float64)(backend="reference", **options)
    got = p(chunk_size=3, **options)
    assert_close_in_norm(got, exact, dtype)
    assert not got[1][2].any()


@pytest.mark.parametrize("cap", [0.5, 30.0, 1e3, 1e5])
def test_a_cap_far_above_the_logits_costs_no_digits(cap: float) -> None:
    p = problem().to(torch.float32)
    exact = p.to(torch.float64)(backend="reference", logit_softcap=cap)
    assert_close_in_norm(p(logit_softcap=cap), exact, torch.float32)


@pytest.mark.parametrize(("n", "V"), [(1, 1), (1, 63), (2, 1000)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_awkward_sizes(divergence: str, n: int, V: int) -> None:
    p = problem(n, V)
    exact = p(backend="reference", divergence=divergence)
    for got, expected in zip(p.to(torch.float32)(divergence=divergence), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_and_impossible_blocks(divergence: str) -> None:
    p = problem()
    p.b[::2], p.b[1::2] = 300.0, -300.0
    p.c[::3] = -300.0
    block = kernel.configuration(None).block
    p.c[block : 2 * block] = -torch.inf  # a whole block of the online sums
    p.c[:3] = -torch.inf
    if divergence == "reverse_kl":
        p.b[block : 2 * block], p.b[:3] = -torch.inf, -torch.inf
    got = p.to(torch.float32)(divergence=divergence)
    assert all(x.isfinite().all() for x in got)
    exact = p(backend="reference", divergence=divergence)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("first", [False, True])
def test_one_pass_kl_survives_an_empty_block(divergence: str, first: bool) -> None:
    block = kernel.configuration(None).block
    g = torch.Generator().manual_seed(3)
    s, t = (torch.randn(2, 2 * block + 50, generator=g).to(DEVICE) for _ in range(2))
    where = slice(0, block) if first else slice(block, 2 * block)
    s[:, where] = t[:, where] = -torch.inf
    settings = Settings(divergence, 0.0, 1.0, 1.0, Shaping(), Shaping())
    values, G = launch.dense_rows(s.clone(), t, settings, torch.float32, gradient=True)
    log_q, log_p = s.double().log_softmax(-1), t.double().log_softmax(-1)
    a, b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    ratio = (a - b).masked_fill(a == -torch.inf, 0)
    expected = (a.exp() * ratio).sum(-1)
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=0)
    slope = (
        b.exp() - a.exp() if divergence == "forward_kl" else a.exp() * (ratio - expected[:, None])
    )
    assert G is not None
    torch.testing.assert_close(G.double(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_are_at_rest(divergence: str) -> None:
    p = problem(V=150).to(torch.float32)
    p = replace(p, Y=p.X, U=p.W, c=p.b)
    for x in p(divergence=divergence):
        assert x.abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_takes_the_storage_of_the_logits(dtype: torch.dtype) -> None:
    s, t = (torch.full((2, 3, 300), torch.nan, device=DEVICE) for _ in range(2))
    g = torch.Generator().manual_seed(4)
    for x in (s, t):
        x[1] = torch.randn(3, 300, generator=g).to(DEVICE)
    expected = s[1].double().softmax(-1) - t[1].double().softmax(-1)
    before = t.clone()
    settings = Settings("forward_kl", 0.0, 1.0, 1.0, Shaping(), Shaping())
    _, G = launch.dense_rows(s[1], t[1], settings, dtype, gradient=True)
    assert G is not None
    assert G.dtype == dtype
    assert G.data_ptr() == s[1].data_ptr()
    torch.testing.assert_close(G.double(), expected, rtol=1e-2, atol=1e-5)
    assert s[0].isnan().all()
    assert torch.equal(t[1], before[1])


def test_evaluation_makes_no_gradient() -> None:
    p = problem().to(torch.float32)
    with torch.no_grad():
        loss = linear_divergence(p.X, p.W, p.Y, p.U, backend="triton", divergence="jsd")
    assert not loss.requires_grad
    exact = linear_divergence(p.X, p.W, p.Y, p.U, backend="reference", divergence="jsd")
    torch.testing.assert_close(loss, exact)


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as e:
        problem()()
    assert str(e.value) == (
        "backend='triton': the dtype is float64, the kernel takes float32, float16 and bfloat16; "
        "backend='streaming' takes it"
    )
