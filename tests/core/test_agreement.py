"""The laws by which two computations of one value agree, on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompiler.agreement import HEADROOM, UNIT, Rounding, codes_differing, differing, summed
from qcompiler.dtypes import UINT8
from qcompiler.reader import parse
from qcompiler.scheme import Scheme

U8 = Scheme(UINT8, symmetric=False)

TEXT = """\
graph @main dialect=onnx {
  input %x : f32[4, 64]
  const %w : f32[64, 16] = rand:1
  const %k : f32[8, 2, 3, 3] = rand:2
  input %p : f32[1, 2, 6, 6]
  %a : f32[4, 16] = onnx.MatMul(%x, %w)
  %b : f32[4, 16] = onnx.Relu(%a)
  %c : f32[1, 8, 4, 4] = onnx.Conv(%p, %k)
  return %b, %c
}
"""


def test_sums_are_counted_along_the_longest_way() -> None:
    graph = parse(TEXT)
    by_name = {op.results[0].name: op for op in graph}
    assert (summed(by_name["a"]), summed(by_name["b"]), summed(by_name["c"])) == (64, 1, 18)
    rounding = Rounding(graph)
    assert rounding.relative(graph.outputs[0]) == HEADROOM * UNIT["f32"] * math.sqrt(66)
    assert rounding.relative(graph.outputs[1]) == HEADROOM * UNIT["f32"] * math.sqrt(19)


def test_rounding_of_real_products_stays_far_below_the_bound() -> None:
    rng = np.random.default_rng(0)
    for k in (16, 256, 4096):
        x, w = rng.standard_normal((8, k)), rng.standard_normal((k, 32))
        narrow = x.astype(np.float32) @ w.astype(np.float32)
        limit = HEADROOM * UNIT["f32"] * math.sqrt(k + 1)
        gap = differing(
            x.astype(np.float32).astype(np.float64) @ w.astype(np.float32).astype(np.float64), narrow, limit
        )
        assert gap.fits
        assert gap.ratio < 0.2


@pytest.mark.parametrize(
    ("after", "fits"),
    [
        ([1.0, 2.0, 4.0], True),
        ([1.0, 2.0, 4.0 + 1e-6], True),
        ([1.0, 2.0, 4.0 + 1e-4], False),
        ([1.0, np.nan, 4.0], False),
        ([1.0, np.inf, 4.0], False),
    ],
)
def test_floats_agree_within_a_share_of_the_largest(after: list[float], fits: bool) -> None:
    gap = differing(np.array([1.0, 2.0, 4.0], np.float32), np.array(after, np.float64), 1e-6)
    assert gap.fits == fits
    assert (gap.ratio <= 1) == fits


def test_the_worst_is_that_which_is_nearest_to_its_bound() -> None:
    more = np.array([0.0, 10.0])
    gap = differing(np.array([1.0, 1.0]), np.array([1.5, 3.0]), 0.5, more)
    assert gap.ratio == pytest.approx(0.5 / 1.5)


def test_infinity_and_nan_in_the_same_places_are_equal() -> None:
    x = np.array([np.nan, -np.inf, np.inf, 1.0], np.float32)
    assert differing(x, x.copy(), 0.0).fits
    assert not differing(x, np.array([np.nan, -np.inf, -np.inf, 1.0], np.float32), 1.0).fits


def test_integers_and_shapes_are_equal_or_wrong() -> None:
    assert differing(np.arange(3), np.arange(3), 0.0).fits
    assert "1 of 3 elements differ" in differing(np.arange(3), np.array([0, 1, 3]), 1.0).text
    assert "its shape is [1, 3], not [3]" in differing(np.zeros(3), np.zeros((1, 3)), 1.0).text


@pytest.mark.parametrize(
    ("exact", "after", "fits"),
    [
        (10.2, 10, True),
        (10.4999, 11, True),  # within the slack of a tie
        (10.4, 11, False),
        (300.0, 255, True),  # saturates
        (300.0, 254, False),
        (-4.0, 0, True),
    ],
)
def test_a_code_is_half_a_step_from_the_exact_value(exact: float, after: int, fits: bool) -> None:
    before = np.clip(np.rint(np.array([exact])), 0, 255).astype(np.uint8)
    gap = codes_differing(before, np.array([after], np.uint8), np.array([exact]), 0.01, U8)
    assert gap.fits == fits


def test_without_the_exact_value_a_share_may_flip() -> None:
    before = np.full(10_000, 7, np.uint8)
    few, many, far = before.copy(), before.copy(), before.copy()
    few[:150], many[:300], far[0] = 8, 8, 9
    assert codes_differing(before, few, None, 0.01, U8).fits
    assert not codes_differing(before, many, None, 0.01, U8).fits
    assert not codes_differing(before, far, None, 0.01, U8).fits
