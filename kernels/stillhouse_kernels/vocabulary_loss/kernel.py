"""Triton kernels from rows of logits to values and G: one program a row, blocks of the vocabulary.

A row is a token, V its vocabulary. Logits are float32 whatever the heads are; z = logits/τ.

Forward and reverse KL need one pass over z_s and z_t for the value and c, by online sums under
running maxima m_s, m_t:

    d_s = Σ e^{z_s - m_s},  d_t = Σ e^{z_t - m_t},  a_t = Σ e^{z_t - m_t} (z_t - z_s)
    KL(P, Q) = a_t / d_t - lse_t + lse_s

and KL(Q, P) likewise. The others need lse_s and lse_t first, and a second pass for D and c. The
last pass writes G = Q (g - c), times the soft-cap's slope, over the student's logits: a 16-bit G
takes the first half of its own row, and every entry that it covers has been read by then.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)
GRADIENTS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


class Configuration(NamedTuple):
    """Entries of a row that a program works on at a time, and its warps."""

    block: int
    num_warps: int


def configuration(capability: int | None) -> Configuration:
    """Return what a launch uses on a chip; None is the interpreter, where blocks are small."""
    return Configuration(128, 1) if capability is None else Configuration(1024, 8)


@triton.jit
def _logit(x, scale, cap, inverse_temperature, CAPPED: tl.constexpr):
    """z = softcap(scale · x) / τ; a cap of 0 is none.

    tanh(y) = 1 - 2 / (e^{2y} + 1), which cancels where y is small: there its series to y^7.
    """
    z = x * scale
    if CAPPED:
        bound = tl.where(cap > 0, cap, 1.0)
        y = z / bound
        square = y * y
        series = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        tanh = tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0))
        z = tl.where(cap > 0, bound * tanh, z)
    return z * inverse_temperature


@triton.jit
def _slope(z, cap, temperature):
    """1 - (logit / c)^2 at the capped logit z τ; 1 without a cap, never below 0."""
    ratio = z * temperature / tl.where(cap > 0, cap, 1.0)
    return tl.where(cap > 0, tl.maximum(1.0 - ratio * ratio, 0.0), 1.0)


@triton.jit
def _finite(m):
    """A running maximum to subtract: 0 where all was -inf, for which e^{-inf - 0} = 0 is right."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _weighted(p, x):
    """p x with 0 · x = 0."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _mixture_terms(log_q, log_p, w, DIVERGENCE: tl.constexpr):
    """f(P, Q) and g = ∂f/∂Q up to a constant, for the divergences that are not one-pass KLs."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    if DIVERGENCE == "total_variation":
        f = 0.5 * tl.abs(q - p)
        g = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    else:
        v = 1.0 - w if DIVERGENCE == "skew_reverse_kl" else w
        m = tl.maximum(v * p + (1.0 - v) * q, 2e-38)  # what multiplies its logarithm is less
        log_m = tl.log(m)
        if DIVERGENCE == "jsd":
            ratio = tl.where(q == 0.0, 0.0, log_q - log_m)
            f = w * _weighted(p, log_p - log_m) + (1.0 - w) * q * ratio
            g = (1.0 - w) * ratio
        elif DIVERGENCE == "skew_forward_kl":
            f = _weighted(p, log_p - log_m)
            g = (w - 1.0) * p / m
        else:
            ratio = tl.where(q == 0.0, 0.0, log_q - log_m)
            f = q * ratio
            g = ratio - w * q / m
    return q, f, g


@triton.jit(do_not_specialize=["wants_gradient"])
def dense_rows(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    value_ptr,
    vocabulary,
    student_stride,
    teacher_stride,
    gradient_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    temperature,
    weight,
    wants_gradient,
    DIVERGENCE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D of a row, and G where it is wanted. A cap of 0 is none; weight is β or α."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    inverse = 1.0 / temperature
    columns = tl.arange(0, BLOCK)
    m_s, m_t = float("-inf"), float("-inf")
    d_s, d_t, a = 0.0, 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(student_ptr + start + columns, mask=inside, other=0.0)
        z_s = _logit(x, student_scale, student_cap, inverse, CAPPED)
        y = tl.load(teacher_ptr + start + columns, mask=inside, other=0.0)
        z_t = _logit(y, teacher_scale, teacher_cap, inverse, CAPPED)
        z_s = tl.where(inside, z_s, float("-inf"))
        z_t = tl.where(inside, z_t, float("-inf"))
        top_s, top_t = tl.maximum(m_s, tl.max(z_s, 0)), tl.maximum(m_t, tl.max(z_t, 0))
        e_s, e_t = tl.exp(z_s - _finite(top_s)), tl.exp(z_t - _finite(top_t))
        shrink_s, shrink_t = tl.exp(m_s - _finite(top_s)), tl.exp(m_t - _finite(top_t))
        d_s = d_s * shrink_s + tl.sum(e_s, 0)
        d_t = d_t * shrink_t + tl.sum(e_t, 0)
        if DIVERGENCE == "forward_kl":
            a = a * shrink_t + tl.sum(_weighted(e_t, z_t - z_s), 0)
        elif DIVERGENCE == "reverse_kl":
            a = a * shrink_s + tl.sum(_weighted(e_s, z_s - z_t), 0)
        m_s, m_t = top_s, top_t
    lse_s, lse_t = m_s + tl.log(d_s), m_t + tl.log(d_t)
    if DIVERGENCE == "forward_kl":
        value, c = a / d_t - lse_t + lse_s, 0.0
    elif DIVERGENCE == "reverse_kl":
        value = a / d_s - lse_s + lse_t
        c = value
    else:
        value, c = 0.0, 0.0
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(student_ptr + start + columns, mask=inside, other=0.0)
            z_s = _logit(x, student_scale, student_cap, inverse, CAPPED)
            y = tl.load(teacher_ptr + start + columns, mask=inside, other=0.0)
            z_t = _logit(y, teacher_scale, teacher_cap, inverse, CAPPED)
            log_q = tl.where(inside, z_s - lse_s, float("-inf"))
            log_p = tl.where(inside, z_t - lse_t, float("-inf"))
            q, f, g = _mixture_terms(log_q, log_p, weight, DIVERGENCE)
            value += tl.sum(f, 0)
            c += tl.sum(q * g, 0)
    tl.store(value_ptr + row, value)
    if wants_gradient:
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(student_ptr + start + columns, mask=inside, other=0.0)
            z_s = _logit(x, student_scale, student_cap, inverse, CAPPED)
            y = tl.load(teacher_ptr + start + columns, mask=inside, other=0.0)
            z_t = _logit(y, teacher_scale, teacher_cap, inverse, CAPPED)
            log_q, log_p = z_s - lse_s, z_t - lse_t
            if DIVERGENCE == "forward_kl":
                G = tl.exp(log_q) - tl.exp(log_p)
            elif DIVERGENCE == "reverse_kl":
                G = _weighted(tl.exp(log_q), log_q - log_p - c)
            else:
                q, f, g = _mixture_terms(log_q, log_p, weight, DIVERGENCE)
                G = q * (g - c)
            if CAPPED:
                G *= _slope(z_s, student_cap, temperature)
            # A 16-bit G of the first block lies where other threads still read.
            tl.debug_barrier()
            G = G.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + columns, G, mask=inside)


@triton.jit
def tail_lse(logits_ptr, lse_ptr, vocabulary, logits_stride, BLOCK: tl.constexpr):
    """log Σ e^s of a row; the kept tokens are the lowest float there."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    columns = tl.arange(0, BLOCK)
    m, d = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(logits_ptr + start + columns, mask=inside, other=float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        d = d * tl.exp(m - _finite(top)) + tl.sum(tl.exp(s - _finite(top)), 0)
        m = top
    tl.store(lse_ptr + row, m + tl.log(d))


@triton.jit
def spread_tail(
    logits_ptr,
    lse_ptr,
    into_tail_ptr,
    gradient_ptr,
    vocabulary,
    logits_stride,
    gradient_stride,
    cap,
    BLOCK: tl.constexpr,
):
    """G = softmax of the tail times the gradient in its symbol and the soft-cap's slope."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    columns = tl.arange(0, BLOCK)
    lse, into_tail = tl.load(lse_ptr + row), tl.load(into_tail_ptr + row)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(logits_ptr + start + columns, mask=inside, other=float("-inf"))
        G = _weighted(tl.exp(s - lse), into_tail * _slope(s, cap, 1.0))
        tl.debug_barrier()
        G = G.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + start + columns, G, mask=inside)


def compilations(capability: int) -> Iterator[Compilation]:
    """Yield every specialisation that a launch can choose on a chip of this compute capability.

    Rows begin at multiples of 16 entries, the loop over tokens sees to that; the vocabulary itself
    may be odd. Left out are a vocabulary of 1 and rows that are 2^31 entries apart.
    """
    block, num_warps = configuration(capability)
    common = {"num_warps": num_warps, "num_stages": 1, "matrix_product": False}
    numbers = ("student_scale", "teacher_scale", "student_cap", "teacher_cap")
    dense = {"student_ptr": "*fp32", "teacher_ptr": "*fp32", "gradient_ptr": "*fp32"}
    dense |= {"value_ptr": "*fp32", "vocabulary": "i32", "student_stride": "i32"}
    dense |= {"teacher_stride": "i32", "gradient_stride": "i32"}
    dense |= {**dict.fromkeys((*numbers, "temperature", "weight"), "fp32"), "wants_gradient": "i32"}
    tail = {"logits_ptr": "*fp32", "lse_ptr": "*fp32", "into_tail_ptr": "*fp32"}
    tail |= {"gradient_ptr": "*fp32", "vocabulary": "i32", "logits_stride": "i32"}
    tail |= {"gradient_stride": "i32", "cap": "fp32"}
    lse = {name: tail[name] for name in tail_lse.arg_names[:-1]}
    for odd in (False, True):
        suffix = ", odd vocabulary" if odd else ""
        for dtype, divergence, capped in product(GRADIENTS, DIVERGENCES, (False, True)):
            yield Compilation(
                kernel=dense_rows,
                label=f"{divergence}{', capped' if capped else ''}, G {dtype}{suffix}",
                signature=dense | {"gradient_ptr": GRADIENTS[dtype]},
                constexprs={"DIVERGENCE": divergence, "CAPPED": capped, "BLOCK": block},
                divisible=_divisible(dense, odd),
                **common,
            )
        yield Compilation(
            kernel=tail_lse,
            label=f"tail{suffix}",
            signature=lse,
            constexprs={"BLOCK": block},
            divisible=_divisible(lse, odd),
            **common,
        )
        for dtype, pointer in GRADIENTS.items():
            yield Compilation(
                kernel=spread_tail,
                label=f"tail, G {dtype}{suffix}",
                signature=tail | {"gradient_ptr": pointer},
                constexprs={"BLOCK": block},
                divisible=_divisible(tail, odd),
                **common,
            )


def _divisible(signature: Mapping[str, str], odd: bool) -> tuple[str, ...]:
    strides = tuple(name for name in signature if name.endswith("_stride"))
    return strides if odd else ("vocabulary", *strides)
