"""Reference semantics of ops on codes, against torch in float64 and against the plain formulas."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.dtypes import F64, Array
from qcompiler.errors import InputError
from qcompiler.integer_numerics import average_pool, call, convolve, dynamic_params
from qcompiler.scheme import Scheme, parse_scheme

U8 = parse_scheme("uint8 tensor asym")
S8 = parse_scheme("int8 tensor sym")
W8 = parse_scheme("int8 channel sym")
DYNAMIC = parse_scheme("uint8 tensor asym dynamic")
TINY = 1e-9  # float64 sums of at most a thousand products of size 1


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def coded(x: Array, scheme: Scheme) -> tuple[list[Array | None], Array]:
    """Codes, scale, zero of ``x``, and what they mean in float64."""
    scale, zero = numerics.choose_qparams(x, scheme)
    codes = numerics.quantize(x, scale, zero, scheme)
    return [codes, scale, zero], numerics.dequantize(codes, scale, zero, scheme, F64)


@st.composite
def conv_cases(draw: st.DrawFn) -> tuple[Array, Array, Array, dict[str, object]]:
    d, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    size = draw(st.lists(st.integers(5, 9), min_size=d, max_size=d))
    kernel = draw(st.lists(st.integers(1, 3), min_size=d, max_size=d))
    r = rng(draw(st.integers(0, 99)))
    attrs = {
        "group": group,
        "strides": tuple(draw(st.lists(st.integers(1, 3), min_size=d, max_size=d))),
        "dilations": tuple(draw(st.lists(st.integers(1, 2), min_size=d, max_size=d))),
    }
    pads = draw(st.lists(st.integers(0, 2), min_size=d, max_size=d))
    attrs["pads"] = (*pads, *pads)
    x = r.standard_normal((2, 2 * group, *size)).astype(np.float32)
    w = r.standard_normal((3 * group, 2, *kernel)).astype(np.float32)
    return x, w, r.standard_normal(3 * group).astype(np.float32), attrs


@settings(max_examples=40, deadline=None)
@given(case=conv_cases())
def test_convolution_is_torchs(case: tuple[Array, Array, Array, dict[str, object]]) -> None:
    x, w, b, attrs = case
    d = x.ndim - 2
    fn = (torch.conv1d, torch.conv2d, torch.conv3d)[d - 1]
    padding = attrs["pads"][:d]  # type: ignore[index]
    tensors = [torch.tensor(a, dtype=torch.float64) for a in (x, w, b)]
    want = fn(*tensors, attrs["strides"], padding, attrs["dilations"], attrs["group"]).numpy()
    assert np.allclose(convolve(x, w, b, attrs), want, rtol=TINY, atol=TINY)


@pytest.mark.parametrize(("auto", "begin", "end"), [("SAME_UPPER", 0, 1), ("SAME_LOWER", 1, 0), ("VALID", 0, 0)])
def test_auto_pad_puts_the_odd_one_where_it_says(auto: str, begin: int, end: int) -> None:
    x, w = rng(0).standard_normal((1, 1, 6)), rng(1).standard_normal((1, 1, 2))
    got = convolve(x, w, None, {"auto_pad": auto})
    want = np.convolve(np.pad(x[0, 0], (begin, end)), w[0, 0, ::-1], "valid")
    assert np.allclose(got[0, 0], want, rtol=TINY, atol=TINY)


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 3, 2)])
def test_average_pool_is_torchs(ceil: int, include: int, kernel: int, stride: int, pad: int) -> None:
    x = rng(kernel).standard_normal((2, 3, 8, 11))
    attrs = {"kernel_shape": (kernel,) * 2, "strides": (stride,) * 2, "pads": (pad,) * 4}
    got = average_pool(x, attrs | {"ceil_mode": ceil, "count_include_pad": include})
    want = torch.nn.functional.avg_pool2d(torch.tensor(x), kernel, stride, pad, bool(ceil), bool(include)).numpy()
    assert np.allclose(got, want, rtol=TINY, atol=TINY)


def test_functions_are_torchs() -> None:
    x, y = rng(3).standard_normal((2, 3, 4)) * 9, rng(4).standard_normal((2, 3, 4))
    t = torch.tensor(x)
    f = torch.nn.functional
    pairs = [
        (call("Add", [x, y], {}), x + y),
        (call("Mul", [x, y], {}), x * y),
        (call("Concat", [x, y, x], {"axis": 1}), np.concatenate([x, y, x], 1)),
        (call("Sigmoid", [x * 200], {}), torch.sigmoid(t * 200).numpy()),
        (call("LeakyRelu", [x], {"alpha": 0.3}), f.leaky_relu(t, 0.3).numpy()),
        (call("LeakyRelu", [x], {}), f.leaky_relu(t, 0.01).numpy()),
        (call("Softmax", [x], {"axis": 1}), torch.softmax(t, 1).numpy()),
        (call("GlobalAveragePool", [x], {}), x.mean(2, keepdims=True)),
    ]
    for got, want in pairs:
        assert got.shape == want.shape
        assert np.allclose(got, want, rtol=TINY, atol=TINY)
    with pytest.raises(InputError, match=r"no reference for q\.apply of 'Tanh'"):
        call("Tanh", [x], {})


@pytest.mark.parametrize("out", [None, U8, S8], ids=str)
def test_linear_static(out: Scheme | None) -> None:
    x, w = rng(5).standard_normal((3, 4, 16)).astype(np.float32), rng(6).standard_normal((8, 16)).astype(np.float32)
    b = rng(7).standard_normal(8).astype(np.float32)
    xq, xv = coded(x, U8)
    wq, wv = coded(w, W8.with_axis(0))
    want = xv @ wv.T + b.astype(np.float64)
    attrs = {"x_scheme": U8, "scheme": W8.with_axis(1), "site": "s"}
    operands: list[Array | None] = [*xq, wq[0], wq[1].reshape(8, 1), None, b]  # type: ignore[union-attr]
    if out is None:
        got = numerics.evaluate("q.linear_static", operands, attrs)
        assert got.dtype == np.float32
        assert np.array_equal(got, want.astype(np.float32))
        return
    scale, zero = numerics.choose_qparams(want.astype(np.float32), out)
    got = numerics.evaluate("q.linear_static", [*operands, scale, zero], attrs | {"y_scheme": out})
    codes = np.rint(want / np.float64(scale)) + (0 if zero is None else np.float64(zero))
    assert np.array_equal(got, np.clip(codes, out.dtype.qmin, out.dtype.qmax).astype(out.dtype.storage))


def test_linear_dyn_quantizes_inside() -> None:
    x, w = rng(8).standard_normal((5, 16)).astype(np.float32), rng(9).standard_normal((8, 16)).astype(np.float32)
    wq, wv = coded(w, parse_scheme("int8 tensor sym"))
    xq, xv = coded(x, U8)
    attrs = {"x_scheme": DYNAMIC, "scheme": S8.with_axis(1)}
    got = numerics.evaluate("q.linear_dyn", [x, wq[0], wq[1].reshape(1, 1), None, None], attrs)  # type: ignore[union-attr]
    assert np.array_equal(got, (xv @ wv.T).astype(np.float32))
    assert numerics.evaluate_all("q.choose_qparams", [x], {"scheme": DYNAMIC}) == [xq[1], xq[2]]


def test_dynamic_params_per_token_are_those_of_each_row() -> None:
    x = rng(10).standard_normal((2, 3, 16)).astype(np.float32)
    scheme = parse_scheme("int8 token asym dynamic")
    scale, zero = dynamic_params(x, scheme)
    assert zero is not None
    assert scale.shape == zero.shape == (2, 3, 1)
    one, one_zero = dynamic_params(x[1, 2], parse_scheme("int8 tensor asym dynamic"))
    assert (scale[1, 2, 0], zero[1, 2, 0]) == (one, one_zero)
    codes = numerics.quantize(x, scale, zero, scheme)
    back = numerics.dequantize(codes, scale, zero, scheme, F64)
    assert (np.abs(back - x) <= scale * 0.5000001).all()  # half a step, and the rounding of the scale itself


def test_conv_and_matmul_on_codes() -> None:
    x, w = rng(11).standard_normal((2, 4, 6, 6)).astype(np.float32), rng(12).standard_normal((8, 2, 3, 3))
    xq, xv = coded(x, U8)
    wq, wv = coded(w.astype(np.float32), W8.with_axis(0))
    want = convolve(xv, wv, None, {"group": 2})
    scale, zero = numerics.choose_qparams(want, U8)
    attrs = {"x_scheme": U8, "scheme": W8.with_axis(0), "y_scheme": U8, "group": 2}
    got = numerics.evaluate("q.conv", [*xq, *wq, None, scale, zero], attrs)
    assert np.array_equal(got, numerics.quantize(want, scale, zero, U8))
    dynamic = numerics.evaluate("q.conv_dyn", [x, *wq, None], attrs | {"x_scheme": DYNAMIC})
    assert np.array_equal(dynamic, want.astype(np.float32))
    a, av = coded(rng(13).standard_normal((2, 3, 5)).astype(np.float32), U8)
    b, bv = coded(rng(14).standard_normal((2, 5, 4)).astype(np.float32), S8)
    got = numerics.evaluate("q.matmul", [*a, *b], {"a_scheme": U8, "b_scheme": S8})
    assert np.array_equal(got, (av @ bv).astype(np.float32))


def test_apply_counts_its_operands() -> None:
    parts = [coded(rng(s).standard_normal((2, 3)).astype(np.float32), U8) for s in (15, 16, 17)]
    want = np.concatenate([v for _, v in parts], 1)
    scale, zero = numerics.choose_qparams(want, U8)
    attrs = {"fn": "Concat", "axis": 1, "x_scheme": U8, "y_scheme": U8}
    got = numerics.evaluate("q.apply", [a for q, _ in parts for a in q] + [scale, zero], attrs)
    assert np.array_equal(got, numerics.quantize(want, scale, zero, U8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shape=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_scale_multiplies_the_last_axis(seed: int, shape: list[int]) -> None:
    x, s = rng(seed).standard_normal(shape).astype(np.float32), rng(seed + 1).standard_normal(shape[-1])
    got = numerics.evaluate("q.scale", [x, s.astype(np.float32)], {})
    assert np.array_equal(got, x * s.astype(np.float32))


def test_the_steps_of_strides_are_the_windows_numbers() -> None:
    x = np.arange(20.0).reshape(1, 1, 20)
    got = convolve(x, np.ones((1, 1, 1)), None, {"strides": (3,)})[0, 0]
    assert all(b - a == 3 for a, b in pairwise(got))
