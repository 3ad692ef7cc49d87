"""Float and codebook codes against casts of other libraries, against tables, and against scales worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import float_codes, numerics
from qcompiler.clipping import affine_params
from qcompiler.dtypes import BF16, F16, F32, F64, TABLE, Array, DType
from qcompiler.errors import InputError
from qcompiler.scheme import parse_scheme

FLOATS = ("f8e4m3", "f8e5m2", "f4e2m1")
E8M0, E4M3 = TABLE["f8e8m0"], TABLE["f8e4m3"]

BNB_THRESHOLDS = (
    (-0.8480964004993439, 0),
    (-0.6106329262256622, 1),
    (-0.4599952697753906, 2),
    (-0.33967943489551544, 3),
    (-0.23460740596055984, 4),
    (-0.13791173323988914, 5),
    (-0.045525018125772476, 6),
    (0.03979014977812767, 7),
    (0.1202552504837513, 8),
    (0.2035212516784668, 9),
    (0.2920137718319893, 10),
    (0.3893125355243683, 11),
    (0.5016634166240692, 12),
    (0.6427869200706482, 13),
    (0.8614784181118011, 14),
)
"""Where bitsandbytes goes from one code of NF4 to the next."""


def encoded(steps: Array, element: DType) -> tuple[Array, Array]:
    """Values and bits."""
    values, codes = np.empty_like(steps), np.empty(steps.shape, np.uint8)
    float_codes.encode(steps, element, values, codes)
    return values, codes


def grid(element: DType) -> Array:
    """All the numbers of f16, and what lies around every tie and every value of ``element``, float32."""
    known = float_codes.table(element)
    known = np.sort(known[~np.isnan(known)])
    middles = (known[1:] + known[:-1]) / 2
    near = np.concatenate([known, middles]).astype(np.float32)
    inf = np.float32(np.inf)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    out = np.concatenate([near, np.nextafter(near, inf), np.nextafter(near, -inf), halves, -near])
    finite: Array = out[np.isfinite(out)]
    return finite


# -- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_that_of_ml_dtypes(name: str) -> None:
    element, steps = TABLE[name], grid(TABLE[name])
    largest = float(ml_dtypes.finfo(element.storage).max)  # type: ignore[no-untyped-call]
    expected = steps.clip(-largest, largest).astype(element.storage)
    values, codes = encoded(steps, element)
    assert np.array_equal(codes, expected.view(np.uint8))
    assert np.array_equal(values.view(np.uint32), expected.astype(np.float32).view(np.uint32))  # signs of zeros too


@pytest.mark.parametrize("name", ["f8e4m3", "f8e5m2"])
def test_rounding_is_that_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    kind = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}[name]
    steps = grid(TABLE[name])
    largest = torch.finfo(kind).max
    expected = torch.from_numpy(steps.clip(-largest, largest)).to(kind).view(torch.uint8).numpy()
    assert np.array_equal(encoded(steps, TABLE[name])[1], expected)


@pytest.mark.parametrize("name", float_codes.KINDS)
@pytest.mark.parametrize("work", [np.float32, np.float64])
def test_the_fast_way_is_the_clear_one(name: str, work: Any) -> None:
    element = TABLE[name]
    steps = np.concatenate([grid(element), [np.inf, -np.inf, 1e30, -1e-45]]).astype(work)
    values, codes = encoded(steps, element)
    clear = float_codes.nearest(steps, element)
    assert clear.dtype == element.storage
    assert np.array_equal(codes, clear.view(np.uint8))
    assert np.array_equal(values, float_codes.decode(clear, element).astype(work))


@given(st.sampled_from(float_codes.KINDS), st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_other_value_is_nearer(name: str, numbers: list[float]) -> None:
    element = TABLE[name]
    known = float_codes.table(element)
    steps = np.array(numbers, np.float64).clip(-1e5, 1e5)
    found = float_codes.decode(float_codes.nearest(steps, element), element)
    best = np.nanmin(np.abs(steps[:, None] - known), axis=1, initial=np.inf)
    assert (np.abs(steps - found) == best).all()
    assert (np.abs(steps - found) <= float_codes.reach(steps, element)).all()


def test_f64_is_rounded_once() -> None:
    """1 + 1/16 + 2^-40 lies above the middle of 1 and 1.125; f32 would put it there, and ties to even back to 1."""
    steps = np.array([1 + 1 / 16 + 2.0**-40, 1 + 1 / 16, 1 + 1 / 16 - 2.0**-40])
    for found in (encoded(steps, E4M3)[0], float_codes.decode(float_codes.nearest(steps, E4M3), E4M3)):
        assert found.tolist() == [1.125, 1.0, 1.0]


def test_ties_go_to_the_even_code_and_minus_zero_stays() -> None:
    steps = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -0.25, -0.0, -5.0], np.float32)
    values, codes = encoded(steps, TABLE["f4e2m1"])
    assert values.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, 0, -4]
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 8, 14]


# -- nf4 -----------------------------------------------------------------------------------------------------------


def test_every_entry_of_nf4_is_its_own_code() -> None:
    assert encoded(float_codes.NF4.copy(), TABLE["nf4"])[1].tolist() == list(range(16))
    assert float_codes.NF4[7] == 0.0


@pytest.mark.parametrize("work", [np.float32, np.float64])
def test_nf4_changes_codes_where_bitsandbytes_does(work: Any) -> None:
    ends = np.array([t for t, _ in BNB_THRESHOLDS], work)
    below, above = (encoded(ends + work(d), TABLE["nf4"])[1].tolist() for d in (-1e-7, 1e-7))
    assert below == [c for _, c in BNB_THRESHOLDS]
    assert above == [c + 1 for _, c in BNB_THRESHOLDS]


def test_nf4_has_16_codes() -> None:
    with pytest.raises(InputError, match="the codes of nf4 are 0 to 15, not 16"):
        float_codes.decode(np.array([3, 16], np.uint8), TABLE["nf4"])


def test_the_middle_of_two_entries_has_the_lower_code() -> None:
    """Of those whose middle is a number of f32, which -1 and 1 decide: 0 and its neighbours."""
    wide = float_codes.NF4.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    assert float_codes.nearest(middles, TABLE["nf4"]).tolist() == list(range(15))
    assert encoded(middles, TABLE["nf4"])[1].tolist() == list(range(15))
    exact = middles.astype(np.float32)
    same = exact.astype(np.float64) == middles
    assert same.any()
    assert encoded(exact[same], TABLE["nf4"])[1].tolist() == np.arange(15)[same].tolist()


# -- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "absmax", "scale"),
    [
        ("f8e4m3 channel sym", 896.0, 2.0),
        ("f8e5m2 channel sym", 57344.0, 1.0),
        ("f4e2m1 g64 sym", 3.0, 0.5),
        ("nf4 g64 sym", 0.75, 0.75),
        ("nf4 g64 sym", 1 + 2.0**-7 + 2.0**-8, 1 + 2.0**-6),  # 8 significant bits, ties to even
        ("f4e2m1 g64 sym", 6 * (1 + 2.0**-9), 1.0),
        ("f8e4m3 channel sym", 0.0, 1.0),
        ("nf4 g64 sym", 0.0, 1.0),
        ("f8e4m3 channel sym", 1e-44, float(np.finfo(np.float32).smallest_normal)),
    ],
)
def test_scales_are_the_range_over_the_largest_code(text: str, absmax: float, scale: float) -> None:
    for lo, hi in ((-absmax, absmax / 2), (-absmax / 2, absmax)):
        found, zero = affine_params(np.array([lo]), np.array([hi]), parse_scheme(text).with_axis(0), F32)
        assert (found.tolist(), zero) == ([scale], None)


@pytest.mark.parametrize(
    ("codes", "absmax", "exponent"),
    [
        ("f4e2m1", 6.0, 0),
        ("f4e2m1", 7.999, 0),  # its elements above 6 saturate
        ("f4e2m1", 8.0, 1),
        ("f4e2m1", 4.0, 0),
        ("f4e2m1", 3.999, -1),
        ("f4e2m1", 1.0, -2),
        ("f4e2m1", 1e-44, -127),
        ("f4e2m1", 3e38, 125),
        ("f8e4m3", 448.0, 0),
        ("f8e4m3", 255.9, -1),
        ("f8e5m2", 57344.0, 0),
        ("f8e5m2", 1.0, -15),
    ],
)
def test_shared_exponents_of_the_ocp_specification(codes: str, absmax: float, exponent: int) -> None:
    """Section 6.3: the largest power of two up to the largest magnitude, over the largest of the element type."""
    found = float_codes.typed_scales(np.array([absmax]), TABLE[codes], E8M0)
    assert found.tolist() == [2.0**exponent]


def test_a_block_of_mxfp4_by_hand() -> None:
    """absmax 7 has the exponent 2, so the scale is 1: 7 saturates at 6, 2.5 and 0.25 are ties."""
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [7.0, -2.5, 0.25, 0.75, -0.3, 5.1, 3.5, 1.0]
    scheme = parse_scheme("f4e2m1 g32 sym scale=f8e8m0 axis=1")
    scale, zero = numerics.choose_qparams(x, scheme)
    codes = numerics.quantize(x, scale, zero, scheme)
    assert scale.tolist() == [[1.0]]
    assert codes.view(np.uint8)[0, :8].tolist() == [7, 12, 0, 2, 9, 7, 6, 2]
    assert codes.astype(np.float32)[0, :8].tolist() == [6, -2, 0, 1, -0.5, 6, 4, 1]
    assert float_codes.split_scales(scale, E8M0)[0].view(np.uint8).tolist() == [[127]]


@pytest.mark.parametrize(
    ("most", "factor"),
    [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (225.0, 1.0), (1.0, 2.0**-8), (0.0, 1.0), (1e-300, 2.0**-117)],
)
def test_the_common_factor_is_the_smallest_that_holds_the_largest_scale(most: float, factor: float) -> None:
    assert float_codes.common_factor(most) == factor


def test_groups_of_nvfp4_by_hand() -> None:
    """Largest magnitudes 2688 = 6 * 448, 6.5, 6 * 2^-9, next to nothing, and nothing."""
    absmax = np.array([2688.0, 6.5, 6 * 2.0**-9, 1e-9, 0.0])
    found = float_codes.typed_scales(absmax, TABLE["f4e2m1"], E4M3)
    assert found.tolist() == [448.0, 1.125, 2.0**-9, 2.0**-9, 1.0]
    assert float_codes.typed_scales(np.zeros(3), TABLE["f4e2m1"], E4M3).tolist() == [1.0, 1.0, 1.0]
    half = float_codes.typed_scales(absmax / 2, TABLE["f4e2m1"], E4M3)
    assert np.array_equal(half * 2, found)  # the same codes of scales, with half the factor


@given(
    st.sampled_from(["f8e8m0", "f8e4m3"]),
    st.sampled_from([F32, BF16, F16, F64]),
    st.lists(st.floats(-160, 127), min_size=1, max_size=20),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_typed_scales_are_codes_of_their_type_in_every_dtype(
    name: str, element: DType, logs: list[float], zeros: bool
) -> None:
    absmax = np.exp2(np.array(logs))
    if element is F16:
        absmax = np.exp2(np.array(logs).clip(-24, 15.9))
    if zeros:
        absmax[::3] = 0.0
    text = {"f8e8m0": "f4e2m1 g32 sym scale=f8e8m0", "f8e4m3": "f4e2m1 g16 sym scale=f8e4m3"}[name]
    scale, _ = affine_params(-absmax, absmax / 2, parse_scheme(text).with_axis(0), element)
    codes, factor = float_codes.split_scales(scale, TABLE[name])
    assert (scale.dtype, codes.dtype) == (element.storage, TABLE[name].storage)
    assert np.array_equal(codes.astype(np.float64) * factor, scale.astype(np.float64))
    assert math.frexp(factor)[0] == 0.5
    assert (scale > 0).all()


def test_other_scales_are_no_codes() -> None:
    with pytest.raises(InputError, match=r"1 of 2 scales, 0\.3 among them, are no f8e8m0 times 1"):
        float_codes.split_scales(np.array([0.5, 0.3]), E8M0)
    with pytest.raises(InputError, match="are no f8e4m3 times"):
        float_codes.split_scales(np.array([448.0, 1.01]), E4M3)


# -- the ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["f8e4m3 b3x8 sym", "f8e5m2 b2x16 sym", "int8 b3x8 asym"])
def test_a_linear_in_blocks(text: str) -> None:
    """Against the weight expanded by a Kronecker product; its last blocks are short."""
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((7, 20)).astype(np.float32), rng.standard_normal((2, 20)).astype(np.float32)
    scheme = parse_scheme(text).with_axis(1)
    scale, zero = numerics.choose_qparams(w, scheme)
    codes = numerics.quantize(w, scale, zero, scheme)
    high, wide = scheme.group
    assert scale.shape == (-(-7 // high), -(-20 // wide))

    def expanded(params: Array) -> Array:
        out: Array = np.kron(params.astype(np.float64), np.ones((high, wide)))[:7, :20]
        return out

    dense = codes.astype(np.float64) - (0.0 if zero is None else expanded(zero))
    expected = (x.astype(np.float64) @ (dense * expanded(scale)).T).astype(np.float32)
    assert np.array_equal(numerics.q_linear(x, codes, scale, zero, None, scheme), expected)
    block = np.abs(w[:high, :wide]).max()
    if zero is None:
        assert scale[0, 0] == np.float32(np.float64(block) / float_codes.largest(scheme.dtype))
    ids = np.array([6, 0, 3])
    table = numerics.q_embedding(ids, codes, scale, zero, scheme)
    assert np.array_equal(table, (dense * expanded(scale))[ids].astype(np.float32))


@pytest.mark.parametrize("text", ["f8e4m3 token sym dynamic", "f8e5m2 token sym dynamic"])
def test_a_linear_with_a_float_code_an_activation(text: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 3, 16)).astype(np.float32)
    x[1, 2] = 0.0
    w = rng.standard_normal((5, 16)).astype(np.float32)
    scheme, weights = parse_scheme(text), parse_scheme("f8e4m3 channel sym")
    ws, _ = numerics.choose_qparams(w, weights.with_axis(0))
    wq = numerics.quantize(w, ws, None, weights.with_axis(0))
    attrs = {"scheme": weights.with_axis(1), "x_scheme": scheme}
    found = numerics.evaluate("q.linear_dyn", [x, wq, ws.reshape(-1, 1), None, None], attrs)
    absmax = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    most = float(ml_dtypes.finfo(scheme.dtype.storage).max)  # type: ignore[no-untyped-call]
    scale = np.where(absmax > 0, absmax / most, 1.0).astype(np.float32)
    codes = (x / scale).clip(-most, most).astype(scheme.dtype.storage)
    rounded = codes.astype(np.float64) * scale.astype(np.float64)
    expected = rounded @ (wq.astype(np.float64) * ws.astype(np.float64)[:, None]).T
    assert np.array_equal(found, expected.astype(np.float32))
    chosen = numerics.evaluate_all("q.choose_qparams", [x], {"scheme": scheme})
    assert len(chosen) == 1
    assert np.array_equal(chosen[0], scale)


@pytest.mark.parametrize("element", [F32, BF16])
def test_a_linear_on_float_codes_gives_floats(element: DType) -> None:
    """The codes are floats too, and not those that the result is rounded to."""
    rng = np.random.default_rng(4)
    static, weights = parse_scheme("f8e4m3 tensor sym"), parse_scheme("f8e4m3 tensor sym")
    x, w = (rng.standard_normal(s).astype(static.dtype.storage) for s in ((3, 16), (5, 16)))
    xs, ws = np.array(0.5, element.storage), np.array([[2.0]], element.storage)
    attrs = {"scheme": weights.with_axis(1), "x_scheme": static}
    found = numerics.evaluate("q.linear_static", [x, xs, None, w, ws, None, None], attrs)
    assert np.array_equal(found, (x.astype(np.float64) @ w.astype(np.float64).T).astype(element.storage))
    codes = numerics.evaluate(
        "q.linear_static",
        [x, xs, None, w, ws, None, None, np.array(0.25, element.storage), None],
        attrs | {"y_scheme": static},
    )
    exact = (x.astype(np.float64) @ w.astype(np.float64).T) / 0.25
    assert codes.dtype == static.dtype.storage
    assert np.array_equal(codes.astype(float), exact.astype(np.float32).astype(static.dtype.storage).astype(float))


def test_activations_in_blocks_of_a_row() -> None:
    x = np.arange(-5, 19, dtype=np.float32).reshape(2, 12) / 8
    scheme = parse_scheme("f8e4m3 b1x8 sym dynamic")
    (scale,) = numerics.evaluate_all("q.choose_qparams", [x], {"scheme": scheme})
    ends = [[5, 6], [14, 18]]
    assert np.array_equal(scale, (np.array(ends) / 8 / 448).astype(np.float32))
    codes = numerics.quantize(x, scale, None, scheme)
    back = numerics.dequantize(codes, scale, None, scheme, F64)
    spread = np.repeat(scale, 8, 1)[:, :12]
    assert np.array_equal(back, (x / spread).astype(E4M3.storage).astype(np.float64) * spread.astype(np.float64))


def test_nan_has_no_code_and_infinity_saturates() -> None:
    scheme, one = parse_scheme("f8e4m3 tensor sym"), np.array(1.0, np.float32)
    assert numerics.quantize(np.array([np.inf, -np.inf], np.float32), one, None, scheme).astype(float).tolist() == [
        448.0,
        -448.0,
    ]
    with pytest.raises(InputError, match="1 of 2 values are NaN"):
        numerics.quantize(np.array([np.nan, 1.0], np.float32), one, None, scheme)
