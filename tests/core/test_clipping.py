"""The law of scales and zero points, against exact fractions; the range search, against a plain float64 loop."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.clipping import CHUNK, FACTORS, affine_params, best_factor, search_range, shrink_errors
from qcompiler.dtypes import BF16, F16, F32, F64, DType
from qcompiler.errors import InputError
from qcompiler.scheme import Scheme, parse_scheme

LARGEST = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38}
# Digits of the significand, the smallest normal number, the smallest number: from IEEE 754, not from NumPy.
FORMAT = {"f16": (11, -14, -24), "bf16": (8, -126, -133), "f32": (24, -126, -149)}


def params(lo: float, hi: float, text: str, element: DType = F32) -> tuple[float, float | None]:
    scale, zero = affine_params(np.array([lo]), np.array([hi]), parse_scheme(text), element)
    assert scale.dtype == element.storage
    return float(scale[0]), None if zero is None else float(zero[0])


@pytest.mark.parametrize(
    ("text", "lo", "hi", "scale", "zero"),
    [
        ("int4 sym", -7.5, 3.0, 1.0, None),
        ("int4 sym", -1.0, 15.0, 2.0, None),
        ("int8 sym", 0.0, 127.5, 1.0, None),
        ("int2 sym", -3.0, 1.0, 2.0, None),
        ("uint8 sym", 0.0, 255.0, 1.0, None),
        ("int4 asym", -2.0, 5.5, 0.5, -4),  # -8 + 2 / 0.5
        ("uint4 asym", -2.0, 5.5, 0.5, 4),
        ("uint8 asym", -1.0, 254.0, 1.0, 1),
        ("int2 asym", -1.0, 5.0, 2.0, -2),  # -2 + 0.5 = -1.5, a tie: to even
        ("int4 asym", 3.0, 15.0, 1.0, -8),  # a range is widened to hold 0
        ("int4 asym", -15.0, -3.0, 1.0, 7),
        ("int4 asymf", -2.25, 5.25, 0.5, -3.5),
        ("int4 sym", 0.0, 0.0, 1.0, None),
        ("int4 asym", 0.0, 0.0, 1.0, -8),
        ("uint4 asym", 0.0, 0.0, 1.0, 0),
    ],
)
def test_parameters_counted_by_hand(text: str, lo: float, hi: float, scale: float, zero: float | None) -> None:
    assert params(lo, hi, text) == (scale, zero)


@pytest.mark.parametrize(
    ("element", "high", "scale"),
    [
        (F16, 7.5 * 2.0**-20, 2.0**-20),  # a subnormal f16 that is exact stays
        (F16, 7.5 * 2.0**-25, 2.0**-24),  # half the smallest: to nearest it would be 0
        (F16, 7.5 * 2.6 * 2.0**-24, 3 * 2.0**-24),
        (F16, 7.5 * 2.4 * 2.0**-24, 3 * 2.0**-24),  # up, where to nearest would clip
        (F32, 1e-44, 2.0**-126),
        (BF16, 1e-40, 2.0**-126),
        (F64, 1e-320, 2.0**-1022),
        (F32, LARGEST["f32"], 137 / 128 * 2.0**125),  # 2^128 / 7.5 = 136.53 / 128 * 2^125
        (F16, 7.5 * 600.2 * 2.0**-24, 600 * 2.0**-24),  # 601 steps are 150.25 / 128 * 2^-15: 600 in 8 bits
        (F64, 7.5 * 2.0**1000, 2.0**1000),
    ],
)
def test_tiny_and_huge_ranges_have_a_finite_scale(element: DType, high: float, scale: float) -> None:
    assert params(-high / 2, high, "int4 sym", element)[0] == scale


def test_the_whole_range_of_a_type_does_not_overflow() -> None:
    for element, largest in ((F16, LARGEST["f16"]), (F32, LARGEST["f32"]), (F64, np.finfo(np.float64).max)):
        scale, zero = params(-largest, largest, "uint2 asym", element)
        assert 0.66 * largest < scale < 0.67 * largest
        assert zero in (1, 2)  # -lo / scale is 1.5 but for the rounding of the scale


def test_unsigned_codes_without_a_zero_point_hold_nothing_negative() -> None:
    with pytest.raises(InputError, match="values down to -1 have no code in uint4"):
        params(-1.0, 2.0, "uint4 sym")


@st.composite
def ranges(draw: st.DrawFn) -> tuple[DType, float, float]:
    element = draw(st.sampled_from([F16, BF16, F32]))
    top = LARGEST[element.name]
    bound = st.floats(-top, top) | st.floats(-1e-4, 1e-4) | st.floats(-1e-38, 1e-38) | st.just(0.0)
    lo, hi = sorted(float(np.array(draw(bound)).astype(element.storage)) for _ in range(2))
    return element, lo, hi


SCHEMES = ["int8 sym", "int4 sym", "int2 sym", "int8 asym", "int4 asym", "uint8 asym", "uint4 asym", "uint2 asym"]


@given(ranges(), st.sampled_from(SCHEMES))
@settings(max_examples=300, deadline=None)
def test_the_scale_is_the_exact_quotient_rounded_once(found: tuple[DType, float, float], text: str) -> None:
    """Against fractions. The quotient is taken in float64 first: hence 2^-40 of slack around half a unit. Scales of
    codes of up to 4 bits have 8 digits, or as many as bf16 has."""
    element, lo, hi = found
    scheme = parse_scheme(text)
    scale, zero = params(lo, hi, text, element)
    levels = Fraction(scheme.dtype.qmax - scheme.dtype.qmin)
    low, high = Fraction(min(lo, 0.0)), Fraction(max(hi, 0.0))
    exact = max(-low, high) / (levels / 2) if scheme.symmetric else (high - low) / levels
    assert math.isfinite(scale)
    assert scale > 0
    digits, normal, smallest = FORMAT[element.name]
    if scheme.bits <= 4:
        digits = min(digits, 8)
        assert np.array(scale).astype(BF16.storage) == scale
    if exact == 0:
        assert scale == 1
    elif exact < Fraction(2) ** normal:
        step = Fraction(2) ** (smallest if element is F16 else normal)
        up = -(-exact // step) * step
        assert abs(Fraction(scale) - up) <= (up / 2**8 if scheme.bits <= 4 else 0)
        assert (Fraction(scale) / step).denominator == 1
    else:
        exponent = math.frexp(float(exact))[1]
        half = Fraction(2) ** (exponent - digits - 1)
        assert abs(Fraction(scale) - exact) <= half * (1 + Fraction(1, 2**40))
    if not scheme.symmetric:
        want = scheme.dtype.qmin - low / Fraction(scale)
        want = min(max(want, Fraction(scheme.dtype.qmin)), Fraction(scheme.dtype.qmax))
        assert zero is not None
        assert abs(Fraction(zero) - want) <= Fraction(1, 2) + Fraction(1, 2**40)
        assert scheme.dtype.qmin <= zero <= scheme.dtype.qmax


# -- the search -----------------------------------------------------------------------------------------------


def rounded(scale: float, scheme: Scheme) -> float:
    """To f32; for codes of up to 4 bits to bf16, whose numbers are those of 8 significant bits."""
    return float(np.float64(scale).astype(np.float32 if scheme.bits > 4 else BF16.storage))


def plain_errors(x: np.ndarray, scheme: Scheme) -> list[float]:
    """Sum of (w - dq)^2 of one group under every factor, in float64; written out on its own."""
    qmin, qmax = scheme.dtype.qmin, scheme.dtype.qmax
    out = []
    for factor in FACTORS:
        lo, hi = min(float(x.min()), 0.0) * factor, max(float(x.max()), 0.0) * factor
        if scheme.symmetric:
            scale, zero = rounded(max(-lo, hi) / ((qmax - qmin) / 2), scheme), 0.0
        else:
            scale = rounded((hi - lo) / (qmax - qmin), scheme)
            zero = min(max(round(qmin - lo / scale), qmin), qmax)
        codes = [min(max(round(w / scale) + zero, qmin), qmax) for w in x.astype(np.float64)]
        out.append(sum((float(w) - (c - zero) * scale) ** 2 for w, c in zip(x, codes, strict=True)))
    return out


@pytest.mark.parametrize("text", ["int4 sym", "int4 asym", "int2 asym", "int8 sym", "uint2 asym"])
def test_the_search_finds_the_least_error(text: str) -> None:
    """The found factor is within 1e-5 of the best one: float32 rounds the errors, so near ties may go either way."""
    rng = np.random.default_rng(3)
    scheme = parse_scheme(text)
    x = rng.standard_t(3, (96, 12)).astype(np.float32)
    lo, hi = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
    found_lo, found_hi = search_range(x, lo, hi, scheme, F32)
    shrunk = 0
    for j in range(x.shape[1]):
        errors = plain_errors(x[:, j], scheme)
        factor = found_hi[j] / hi[j]
        assert found_lo[j] == lo[j] * FACTORS[np.abs(np.array(FACTORS) - factor).argmin()]
        at = int(np.abs(np.array(FACTORS) - factor).argmin())
        assert errors[at] <= min(errors) * (1 + 1e-5)
        shrunk += at > 0
    assert (shrunk > 0) == (scheme.bits < 8)  # 256 steps over a few outliers: clipping them costs more


def test_a_tie_goes_to_the_larger_range() -> None:
    errors = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    assert best_factor(errors).tolist() == [FACTORS[1], FACTORS[0], FACTORS[0]]


def test_weights_on_the_grid_lose_nothing_and_keep_their_range() -> None:
    x = np.arange(-8, 8, dtype=np.float32)[:, None] * 2.0**-7
    lo, hi = search_range(x, x.min(axis=0) + 0.0, x.max(axis=0) + 0.0, parse_scheme("int4 asym"), F32)
    assert (lo[0], hi[0]) == (-8 * 2.0**-7, 7 * 2.0**-7)


@pytest.mark.parametrize("size", [2.0**-133, 2.0**-66, 1.0, 2.0**66, 2.0**127])
def test_the_search_neither_overflows_nor_vanishes(size: float) -> None:
    """Errors are in steps of the scale, so the factor found does not depend on the size of the weights: by powers of
    two, which leave the digits of a scale as they are."""
    rng = np.random.default_rng(4)
    unit = rng.standard_normal((64, 8))
    unit /= np.abs(unit).max()
    scheme = parse_scheme("int2 sym")
    x = (unit * size).astype(np.float32)
    factors = []
    for values in (x, unit.astype(np.float32)):
        lo, hi = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
        factors.append(search_range(values, lo, hi, scheme, F32)[1] / hi)
    if size > 1e-30:  # below, scales are held at the smallest normal number
        assert np.allclose(factors[0], factors[1], rtol=0, atol=1e-12)
    assert np.isfinite(factors[0]).all()


@pytest.mark.parametrize("length", [1, 2, 3, 100, 128, 1000, CHUNK])
def test_errors_do_not_depend_on_the_columns_beside(length: int) -> None:
    rng = np.random.default_rng(length)
    x = rng.standard_normal((length, 37)).astype(np.float32)
    lo, hi = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
    scheme = parse_scheme("int4 asym")
    together = shrink_errors(x, lo, hi, scheme, F32)
    for a, b in ((0, 1), (1, 18), (18, 37)):
        part = np.asfortranarray(x[:, a:b])
        assert np.array_equal(shrink_errors(part, lo[a:b], hi[a:b], scheme, F32), together[:, a:b])


def test_more_rows_than_a_chunk_are_refused() -> None:
    x = np.zeros((CHUNK + 1, 1), np.float32)
    with pytest.raises(InputError, match=f"{CHUNK} rows at a time"):
        shrink_errors(x, np.zeros(1), np.zeros(1), parse_scheme("int4 sym"), F32)
