"""Reference semantics, against plain float64 written here; test_numerics_onnx.py has the comparisons with ONNX."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics, spec
from qcompiler.dtypes import BF16, F16, F32, F64, DType, dtype_of
from qcompiler.errors import BadWeights, InputError
from qcompiler.scheme import Scheme, parse_scheme

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(20)


def scheme_of(text: str, axis: int | None) -> Scheme:
    return parse_scheme(text).with_axis(axis)


# -- parameters and bounds ------------------------------------------------------------------------------------


def plain_groups(x: Array, scheme: Scheme) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """(where in x, where in the parameters) of each group, written out for matrices."""
    rows, cols = x.shape
    if scheme.granularity == "tensor":
        return [((slice(None), slice(None)), ())]
    if scheme.granularity == "channel":
        count = x.shape[scheme.axis or 0]
        return [((i, slice(None)) if scheme.axis == 0 else (slice(None), i), (i,)) for i in range(count)]
    g = scheme.group[0]
    if scheme.axis == 1:
        return [((n, slice(k, k + g)), (n, k // g)) for n in range(rows) for k in range(0, cols, g)]
    return [((slice(k, k + g), n), (k // g, n)) for n in range(cols) for k in range(0, rows, g)]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, Scheme]:
    name = draw(st.sampled_from(["int8", "int4", "int2", "uint8", "uint4", "uint2"]))
    granularity = draw(st.sampled_from(["tensor", "channel", "g16", "g32"]))
    zero = draw(st.sampled_from(["asym", "asymf"] if name.startswith("u") else ["sym", "asym", "asymf"]))
    axis = None if granularity == "tensor" else draw(st.integers(0, 1))
    scheme = scheme_of(f"{name} {granularity} {zero}", axis)
    element = draw(st.sampled_from([F32, F16, BF16, F64]))
    shape = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1e-42, 1e-30, 1e-7, 1e-4, 1.0, 3e4, 1e30, 8e37]))
    shift = draw(st.sampled_from([0.0, 3.0, -3.0]))
    x = (rng.standard_normal(shape).clip(-4, 4) / 4 + shift) / 4 * size
    x[rng.random(shape) < draw(st.sampled_from([0.0, 0.5]))] = 0
    limit = 65504.0 if element is F16 else np.inf
    return x.clip(-limit, limit).astype(element.storage), scheme


@given(weights())
@settings(max_examples=150, deadline=None)
def test_each_code_is_the_nearest_and_the_error_at_most_half_a_step(found: tuple[Array, Scheme]) -> None:
    """For each group: dq is the nearest of the values that the codes can express, and where a weight lies within them
    it is at most scale / 2 away. ``slack`` is what float32 division can move a tie by: 2^-23 of the largest quotient,
    256 steps and a zero point. Beyond the last value the error is the distance to it: at most half a step, for the
    positive end of a symmetric range or a rounded zero point, and what rounding the scale took from it.
    """
    x, scheme = found
    scale, zero = numerics.choose_qparams(x, scheme)
    assert scale.dtype == x.dtype
    codes = numerics.quantize(x, scale, zero, scheme)
    values = numerics.dequantize(codes, scale, zero, scheme, F64)
    qmin, qmax = scheme.dtype.qmin, scheme.dtype.qmax
    for where, at in plain_groups(x, scheme):
        w, dq = x[where].astype(np.float64).reshape(-1), values[where].reshape(-1)
        s, z = float(scale[at]), 0.0 if zero is None else float(zero[at])
        assert 0 < s < np.inf
        slack = s * 2.0**-14
        grid = (np.arange(qmin, qmax + 1) - z) * s
        nearest = np.abs(w[:, None] - grid).min(axis=1)
        assert (np.abs(w - dq) <= nearest + slack).all()
        inside = (grid[0] <= w) & (w <= grid[-1])
        assert (np.abs(w - dq)[inside] <= s / 2 + slack).all()
        rounding = {F16: 2.0**-11, BF16: 2.0**-8}.get(dtype_of(x.dtype), 2.0**-24)
        if scheme.bits <= 4:
            rounding = max(rounding, 2.0**-8)  # their scales have 8 significant bits, as those of bf16
        assert (np.abs(w - dq) <= s / 2 + (qmax - qmin) * rounding * s + slack).all()
        if scheme.zero != "float":
            assert (dq[w == 0] == 0).all()
        if not w.any():
            assert s == 1


@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_any_rank_is_the_same_as_its_matrices(clip: Any) -> None:
    """A stack of experts [E, N, K] under axis 2, [E, K, N] under axis 1, a convolution [O, I, 3, 3] per channel."""
    x = RNG.standard_normal((3, 5, 48)).astype(np.float32)
    scheme = scheme_of("int4 g32 asym", 2)
    scale, zero = numerics.choose_qparams(x, scheme, clip)
    assert zero is not None
    assert scale.shape == (3, 5, 2)
    codes = numerics.quantize(x, scale, zero, scheme)
    flipped = x.transpose(0, 2, 1)
    other, other_zero = numerics.choose_qparams(flipped, scheme.with_axis(1), clip)
    assert np.array_equal(other, scale.transpose(0, 2, 1))
    assert np.array_equal(numerics.quantize(flipped, other, other_zero, scheme.with_axis(1)), codes.transpose(0, 2, 1))
    for e in range(3):
        s, z = numerics.choose_qparams(x[e], scheme.with_axis(1), clip)
        assert np.array_equal(s, scale[e])
        assert np.array_equal(numerics.quantize(x[e], s, z, scheme.with_axis(1)), codes[e])
    conv = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)
    scale, _ = numerics.choose_qparams(conv, scheme_of("int8 channel sym", 0))
    assert np.allclose(scale, np.abs(conv).reshape(4, -1).max(axis=1) / 127.5, rtol=2**-23, atol=0)


@pytest.mark.parametrize("text", ["int4 tensor asym", "int4 channel sym", "int2 g32 asym"])
def test_a_searched_range_never_loses_more(text: str) -> None:
    scheme = scheme_of(text, None if "tensor" in text else 0)
    x = RNG.standard_t(4, (1100, 24)).astype(np.float32)  # longer than a chunk of the sums
    errors = {}
    for clip in ("absmax", "mse"):
        scale, zero = numerics.choose_qparams(x, scheme, clip)  # type: ignore[arg-type]
        values = numerics.dequantize(numerics.quantize(x, scale, zero, scheme), scale, zero, scheme, F64)
        errors[clip] = float(((x - values) ** 2).sum())
    assert errors["mse"] < errors["absmax"]


# -- ops ------------------------------------------------------------------------------------------------------


def stored_scheme(scheme: Scheme) -> Scheme:
    """The scheme of a dequantize of [N, K] that means what ``scheme`` (axis 1) means to q.linear."""
    return {"channel": scheme.with_axis(0), "tensor": scheme.with_axis(None)}.get(scheme.granularity, scheme)


def operands(text: str, n: int, k: int, dtype: Any = np.float32) -> tuple[Array, Array, Array, Array | None, Scheme]:
    """Weight [N, K], then codes, scales and zeros as q.linear takes them."""
    scheme = scheme_of(text, 1)
    chosen = stored_scheme(scheme)
    w = RNG.standard_normal((n, k)).astype(dtype)
    scale, zero = numerics.choose_qparams(w, chosen)
    codes = numerics.quantize(w, scale, zero, chosen)
    columns = (1, 1) if scheme.granularity == "tensor" else (n, -1)
    return w, codes, scale.reshape(columns), None if zero is None else zero.reshape(columns), scheme


LINEARS = [
    "int4 g32 asym",
    "int4 g32 sym",
    "int8 channel sym",
    "int8 channel asym",
    "int8 tensor sym",
    "int2 g16 asymf",
]


@pytest.mark.parametrize("text", LINEARS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_multiplies_with_the_dequantized_weight(text: str, bias: bool) -> None:
    n, k = 2 * numerics.ROWS + 5, 40
    _, codes, scale, zero, scheme = operands(text, n, k)
    x = RNG.standard_normal((2, 3, k)).astype(np.float32)
    b = RNG.standard_normal(n).astype(np.float32) if bias else None
    y = numerics.q_linear(x, codes, scale, zero, b, scheme)
    want = np.empty((2, 3, n))
    for j in range(n):
        row = [0.0] * k
        for i in range(k):
            p = (0, 0) if scheme.granularity == "tensor" else (j, i // scheme.group[0] if scheme.group else 0)
            row[i] = (int(codes[j, i]) - (0.0 if zero is None else float(zero[p]))) * float(scale[p])
        want[..., j] = x.astype(np.float64) @ np.array(row) + (0.0 if b is None else float(b[j]))
    assert y.dtype == np.float32
    # one rounding to float32 of a float64 sum: 2^-24 of the value, and 1e-12 for sums that cancel
    assert (np.abs(y - want) <= np.abs(want) * 2.0**-24 + 1e-12).all()


@pytest.mark.parametrize("text", LINEARS)
@pytest.mark.parametrize("element", [F32, F16, BF16], ids=str)
def test_embedding_is_rows_of_the_dequantized_table(text: str, element: DType) -> None:
    w, codes, scale, zero, scheme = operands(text, 30, 50, element.storage)
    indices = np.array([[0, 29, 7], [-1, -30, 7]], np.int32)
    rows = numerics.q_embedding(indices, codes, scale, zero, scheme)
    assert (rows.shape, rows.dtype) == ((2, 3, 50), element.storage)
    assert np.array_equal(rows[0, 2], rows[1, 2])
    assert np.array_equal(rows[1, 0], rows[0, 1])
    stored = stored_scheme(scheme)
    shape = spec.scale_shape(w.shape, stored)
    flat_zero = None if zero is None else zero.reshape(shape)
    table = numerics.dequantize(codes, scale.reshape(shape), flat_zero, stored, element)
    assert np.array_equal(rows, table[indices])


def test_evaluate_names_the_ops() -> None:
    w, codes, scale, zero, scheme = operands("int4 g32 asym", 6, 64)
    attrs = {"scheme": scheme, "site": "x"}
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    b = np.ones(6, np.float32)
    assert np.array_equal(numerics.evaluate("q.quantize", [w, scale, zero], attrs), codes)
    dq = numerics.evaluate("q.dequantize", [codes, scale, zero], attrs)
    assert np.array_equal(dq, numerics.dequantize(codes, scale, zero, scheme, F32))
    y = numerics.evaluate("q.linear", [x, codes, scale, zero, b], attrs)
    # sums of 64 products of size 1, rounded to float32 once: 1e-6 of slack
    assert np.allclose(y, x.astype(np.float64) @ dq.T.astype(np.float64) + 1, rtol=1e-6, atol=1e-6)
    for absent in ([], [None]):
        plain = numerics.evaluate("q.linear", [x, codes, scale, zero, *absent], attrs)
        assert np.array_equal(plain, numerics.q_linear(x, codes, scale, zero, None, scheme))
        assert np.allclose(plain, y - 1, rtol=1e-6, atol=1e-6)
    assert np.array_equal(numerics.evaluate("q.embedding", [np.array(3), codes, scale, zero], attrs), dq[3])
    with pytest.raises(InputError, match="no reference for q\\.nothing; there is one for q\\.quantize"):
        numerics.evaluate("q.nothing", [x], attrs)
    with pytest.raises(InputError, match="q\\.linear needs 3 operands before the optional ones, got 2"):
        numerics.evaluate("q.linear", [x, codes, None], attrs)


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [F32, F16, BF16, F64], ids=str)
def test_nan_and_infinity_in_weights_are_counted(element: DType) -> None:
    x = np.ones((8, 16), element.storage)
    x[1, 3], x[7, 15], x[4, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(BadWeights, match="3 of 128 values are NaN or infinite") as caught:
        numerics.choose_qparams(x, scheme_of("int4 g16 sym", 1))
    assert (caught.value.count, caught.value.total) == (3, 128)


def test_activations_saturate_at_infinity_and_have_no_nan() -> None:
    scheme = parse_scheme("int8 asym")
    scale, zero = np.float32(0.5), np.int8(3)
    x = np.array([np.inf, -np.inf, 1e38, 0.0], np.float32)
    assert numerics.quantize(x, scale, zero, scheme).tolist() == [127, -128, 127, 3]
    with pytest.raises(InputError, match="1 of 4 values are NaN"):
        numerics.quantize(np.where(x == 0, np.float32(np.nan), x), scale, zero, scheme)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s, c: numerics.quantize(x, s * 0, None, parse_scheme("int8 sym")), "a scale is zero or not finite"),
        (lambda x, s, c: numerics.quantize(x, s / 0, None, parse_scheme("int8 sym")), "a scale is zero or not finite"),
        (lambda x, s, c: numerics.quantize(x, s, c[0, 0], parse_scheme("int8 sym")), "symmetric one has none, got a"),
        (lambda x, s, c: numerics.quantize(x, s, None, parse_scheme("int8 asym")), "a zero point .* got none"),
        (lambda x, s, c: numerics.quantize(c, s, None, parse_scheme("int8 sym")), "only floats are quantized"),
        (lambda x, s, c: numerics.choose_qparams(c, parse_scheme("int8 sym")), "only floats are quantized"),
        (lambda x, s, c: numerics.choose_qparams(x, parse_scheme("f16 sym")), "not f16"),
        (lambda x, s, c: numerics.choose_qparams(x, parse_scheme("int16 sym")), "not int16"),
        (
            lambda x, s, c: numerics.quantize(x, s[None], None, scheme_of("int8 channel sym", 0)),
            r"have shape \[4\], not \[1\]",
        ),
        (lambda x, s, c: numerics.dequantize(x, s, None, parse_scheme("int8 sym"), F32), "stored as int8, not float32"),
        (
            lambda x, s, c: numerics.q_linear(x[:, :5], c, s.reshape(1, 1), None, None, scheme_of("int8 sym", 1)),
            "does not end in K=6",
        ),
        (
            lambda x, s, c: numerics.q_linear(x, c, s.reshape(1, 1), None, x[0], scheme_of("int8 sym", 1)),
            r"bias has shape \[6\], the codes have N=4",
        ),
        (
            lambda x, s, c: numerics.q_linear(x, c, s, None, None, scheme_of("int8 channel sym", 1)),
            r"is \[4, 1\], not \[\]",
        ),
        (
            lambda x, s, c: numerics.q_linear(x, c[0], s, None, None, scheme_of("int8 sym", 1)),
            r"codes are \[N, K\], not \[6\]",
        ),
        (
            lambda x, s, c: numerics.q_embedding(np.array([4]), c, s.reshape(1, 1), None, scheme_of("int8 sym", 1)),
            "indices run from 4 to 4, the table has 4 rows",
        ),
    ],
)
def test_misfits_are_named(call: Any, message: str) -> None:
    x, codes = np.ones((4, 6), np.float32), np.ones((4, 6), np.int8)
    with np.errstate(divide="ignore"), pytest.raises(InputError, match=message):
        call(x, np.asarray(np.float32(0.5)), codes)
