"""Random weights, shapes, types and epilogues through the kernels of ``wn_linear``, against float64.

Expected values: canonical codes dequantized by ``qcompiler.numerics`` in float64, multiplied, and finished in float64.
The bound is the sum of the roundings that the kernels say they make, no more. 12 forms, 17 problems each.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.tiles import Tile
from qcompiler.scheme import ZeroKind
from tests.backends.triton.weight_cases import ROUNDOFF, Wide, bound, draw

GROUPS = {"mxfp4": (32,), "nvfp4": (16,)}
SLOPE = 1.13
"""No activation is steeper: gelu's slope is at most 1.129, silu's 1.100."""

FINISH = 2.0**-20
"""Relative errors of f32 after the sums: an erf, an exponential, a product and two sums."""

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0.0),
    "silu": lambda v: v / (1.0 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1.0 + np.vectorize(math.erf)(v / math.sqrt(2.0))),
    "gelu_tanh": lambda v: 0.5 * v * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3))),
}


@dataclass(frozen=True)
class Problem:
    form: str
    group: int
    zero: ZeroKind
    scale: torch.dtype
    element: torch.dtype
    m: int
    n: int
    k: int
    tile: Tile
    act: str
    bias: bool
    mul: bool
    residual: bool
    strided: bool
    seed: int


def problem(form: str, rng: random.Random) -> Problem:
    """One problem for ``form``; every choice is drawn evenly, which hypothesis' own draws are not."""
    zeros: tuple[ZeroKind, ...] = ("none", "int", "float") if FORMS[form].kind == "integer" else ("none",)
    floats = (torch.float16, torch.bfloat16, torch.float32)
    m, bm = rng.choice(((1, 16), (3, 16), (16, 16), (17, 32), (40, 64), (65, 128)))
    yes = [rng.random() < 0.5 for _ in range(4)]
    return Problem(
        form,
        rng.choice(GROUPS.get(form, (0, 32, 64, 128, 256))),
        rng.choice(zeros),
        rng.choice(floats),
        rng.choice(floats),
        m,
        rng.choice((1, 17, 64, 70)),
        rng.choice((16, 100, 128, 200, 384)),
        Tile(bm, 64, 128, 4, rng.randint(1, 3), rng.choice((1, 1, 2, 3))),
        rng.choice(sorted(ACTIVATIONS)),
        *yes,
        rng.randrange(1000),
    )


def drawn(generator: torch.Generator, element: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(element)


def wide(t: torch.Tensor) -> Wide:
    out: Wide = t.double().numpy()
    return out


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=17, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=True))
def test_kernels_agree_with_the_reference_semantics(form: str, rng: random.Random) -> None:
    p = problem(form, rng)
    note(str(p))
    weight = draw(p.form, p.n, p.k, p.group, p.zero, p.scale, p.seed)
    g = torch.Generator().manual_seed(p.seed)
    x = drawn(g, p.element, p.k, p.m).T if p.strided else drawn(g, p.element, p.m, p.k)
    bias = drawn(g, p.element, p.n) if p.bias else None
    mul = drawn(g, p.element, p.m, p.n) if p.mul else None
    residual = drawn(g, p.element, p.n) if p.residual else None
    y = weight_only.linear_cuda(x, *weight.operands, bias, mul, residual, p.n, p.group, p.form, p.act, p.tile)  # type: ignore[arg-type]

    used = torch.float16 if p.element == torch.float16 else torch.bfloat16
    rounded = wide(x.to(used))
    sums = rounded @ weight.values.T + (0 if bias is None else wide(bias))
    scaled = p.group != 0 and not (p.group >= 128 and p.tile.bm <= weight_only.LATE)
    off = SLOPE * bound(weight, rounded, used, scaled=scaled) + FINISH * np.abs(sums)
    with np.errstate(over="ignore"):
        wanted = ACTIVATIONS[p.act](sums)
    if mul is not None:
        wanted, off = wanted * wide(mul), off * np.abs(wide(mul))
    if residual is not None:
        wanted = wanted + wide(residual)
    off = off + FINISH * np.abs(wanted)
    off += ROUNDOFF[p.element] * (np.abs(wanted) + off) + float(torch.finfo(p.element).smallest_normal)
    assert y.shape == (p.m, p.n)
    assert y.dtype == p.element
    assert (np.abs(wide(y) - wanted) <= off).all(), float((np.abs(wide(y) - wanted) / off).max())
