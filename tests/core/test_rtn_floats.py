"""Round-to-nearest to float and codebook codes, and in blocks, against the reference: the same bits, tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import float_codes, numerics, rtn
from qcompiler.dtypes import BF16, F16, F32, F64, TABLE, Array, DType
from qcompiler.errors import BadWeights, InputError
from qcompiler.payload import ArrayPayload
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import Scheme, parse_scheme
from qcompiler.weights import WeightQuantization

TYPED = ("f4e2m1 g32 sym scale=f8e8m0", "f4e2m1 g16 sym scale=f8e4m3", "f8e4m3 g32 sym scale=f8e8m0")
FREE = (
    "nf4 g64 sym",
    "nf4 g16 sym",
    "f4e2m1 g64 sym",
    "f8e4m3 channel sym",
    "f8e4m3 tensor sym",
    "f8e5m2 g32 sym",
    "nf4 channel sym",
)
BLOCKS = ("f8e4m3 b128x128 sym", "f8e4m3 b5x16 sym", "int8 b7x32 asym", "int4 b16x16 sym", "f8e5m2 b1x20 sym")


def same_bits(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Scheme, Any]:
    text = draw(st.sampled_from(TYPED + FREE + BLOCKS))
    scheme = parse_scheme(text).with_axis(None if "tensor" in text else draw(st.integers(0, 1)))
    clip = draw(st.sampled_from(["absmax", "mse"])) if text in FREE else "absmax"
    element: DType = draw(st.sampled_from([F32, F16, BF16, F64]))
    shape = draw(st.tuples(st.integers(0, 150), st.integers(0, 150)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1e-44, 1e-38, 1e-7, 0.02, 1.0, 6e4, 1e30]))
    x = rng.standard_normal(shape).clip(-3, 3) / 3 * size
    if draw(st.booleans()):
        x = np.rint(x / (size or 1) * 20) / 2 * (size or 1) / 10  # ties
    x[rng.random(shape) < draw(st.sampled_from([0.0, 0.7]))] = -0.0
    limit = 65504.0 if element is F16 else np.inf
    return x.clip(-limit, limit).astype(element.storage), scheme, clip


@given(cases(), st.integers(1, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_bits_are_those_of_the_reference(case: tuple[Array, Scheme, Any], threads: int, turned: bool) -> None:
    """In tiles of a few rows or columns, and of the transposed weight under the other axis."""
    weight, scheme, clip = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn, "TILE", 700)
        patch.setattr(rtn, "COLUMNS", 20)
        given_axis = scheme if scheme.axis is None else scheme.with_axis(1 - scheme.axis)
        if turned and not (clip == "mse" and scheme.granularity == "tensor"):
            found = quantize_weight(weight.T, given_axis, clip=clip, transpose=True, threads=threads)
        else:
            found = quantize_weight(weight, scheme, clip=clip, threads=threads)
    scale, zero = numerics.choose_qparams(weight, scheme, clip)
    codes = numerics.quantize(weight, scale, zero, scheme)
    assert same_bits(found.codes, codes)
    assert same_bits(found.scale, scale)
    assert same_bits(found.zero, zero)
    if scheme.scale is not None and scale.size:
        float_codes.split_scales(scale, scheme.scale)


@pytest.mark.parametrize("text", [*TYPED, "nf4 g64 sym", "f8e4m3 b128x128 sym", "f8e4m3 channel sym"])
@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_of_their_real_size(text: str, axis: int) -> None:
    weight = np.random.default_rng(5).standard_normal((1100, 1030)).astype(np.float32)
    scheme = parse_scheme(text).with_axis(axis)
    found = quantize_weight(weight, scheme)
    scale, zero = numerics.choose_qparams(weight, scheme)
    codes = numerics.quantize(weight, scale, zero, scheme)
    assert same_bits(found.codes, codes)
    assert same_bits(found.scale, scale)
    error = numerics.dequantize(codes, scale, zero, scheme, F64) - weight.astype(np.float64)
    assert found.stats["sum_sq_error"] == pytest.approx(np.square(error).sum(), rel=1e-4)  # sums of f32 squares
    assert found.stats["sum_sq"] == pytest.approx(np.square(weight.astype(np.float64)).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("nf4 g64 sym", 20.5),
        ("f4e2m1 g64 sym", 19.0),
        ("f4e2m1 g32 sym scale=f8e8m0", 18.0),
        ("f4e2m1 g16 sym scale=f8e4m3", 20.0),
        ("f8e4m3 channel sym", 31.0),
        ("f8e5m2 channel sym", 25.0),
    ],
)
def test_the_error_of_normal_weights(text: str, least: float) -> None:
    """Signal over noise in dB. A float of m mantissa bits loses 6.02 m + 13.8 dB less a little for what it clips or
    has no exponent for (31.8, 25.8 and 19.8 dB); NF4 is made for normal weights of its range."""
    weight = np.random.default_rng(6).standard_normal((256, 1024)).astype(np.float32)
    scheme = parse_scheme(text)
    stats = quantize_weight(weight, scheme.with_axis(0 if "channel" in text else 1)).stats
    found = 10 * np.log10(stats["sum_sq"] / stats["sum_sq_error"])
    assert least < found < least + 1.5


def test_a_searched_range_loses_less() -> None:
    weight = np.random.default_rng(7).standard_t(4, (64, 512)).astype(np.float32)
    for text in ("nf4 g64 sym", "f4e2m1 g64 sym"):
        scheme = parse_scheme(text).with_axis(1)
        whole, searched = (quantize_weight(weight, scheme, clip=c).stats["sum_sq_error"] for c in ("absmax", "mse"))
        assert searched < whole


@pytest.mark.parametrize("text", ["f4e2m1 g16 sym scale=f8e4m3", "nf4 g64 sym", "f8e4m3 b8x8 sym"])
def test_nan_and_infinity_are_counted(text: str) -> None:
    weight = np.ones((40, 70), np.float32)
    weight[3, 5], weight[20, 60] = np.nan, np.inf
    for run in (quantize_weight, numerics.choose_qparams):
        with pytest.raises(BadWeights, match="2 of 2800"):
            run(weight, parse_scheme(text).with_axis(1))


@pytest.mark.parametrize(
    ("text", "clip", "message"),
    [
        ("f8e4m3 b8x8 sym", "mse", "no range is searched for blocks or typed scales"),
        ("f4e2m1 g32 sym scale=f8e8m0", "mse", "no range is searched for blocks or typed scales"),
        ("f8e4m3 tensor sym dynamic", "absmax", "drop 'dynamic'"),
        ("f8e5m2fnuz channel sym", "absmax", "codes are integers of up to 8 bits, or f8e4m3, f8e5m2, f4e2m1, nf4"),
    ],
)
def test_misfits_are_named(text: str, clip: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_weight(np.ones((16, 32), np.float32), parse_scheme(text).with_axis(1), clip=clip)


@pytest.mark.parametrize("text", [*TYPED, "nf4 g64 sym", "f8e4m3 b128x128 sym"])
def test_a_recorded_computation_turns_round(text: str) -> None:
    weight = np.random.default_rng(8).standard_normal((130, 260)).astype(np.float32)
    made = WeightQuantization(ArrayPayload(weight, F32), parse_scheme(text).with_axis(1))
    for one, other in zip(made.outputs(), made.transposed().outputs(), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape[::-1])
        assert same_bits(np.ascontiguousarray(one.array().T), other.array())
    assert made.outputs()[0].dtype is TABLE[text.split()[0]]
