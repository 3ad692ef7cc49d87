"""Every integer row: the lowered node runs in ONNX Runtime on ragged shapes, is right, and expands no weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends.onnx.kernels import CPU_ROWS, target
from qcompiler.backends.onnx.kernels_integer import INTEGER_ROWS
from qcompiler.dtypes import F16, F32
from qcompiler.requests import request_of
from qcompiler.target import KernelRow
from tests.backends.onnx.integer import Case, apply, conv, linear_dyn, linear_static, matmul, ran, wrong

SOME = settings(max_examples=25, deadline=None, derandomize=True)
ROWS = {r.name: r for r in INTEGER_ROWS}
ANY_CHIP = "ort-cpu:avx512vnni"
"""This chip computes u8s8 exactly or not at all; the rows for others run on it too (see test_chips_integer.py)."""


def rows(op: str) -> list[str]:
    return [name for name, r in ROWS.items() if r.op == op]


def kind(row: KernelRow) -> str:
    return next(w for w in row.name.split(".")[1:] if w[:2] in ("u8", "s8"))


def x_scheme(row: KernelRow, draw: Callable) -> str:  # type: ignore[type-arg]
    name = "uint8" if kind(row)[0] == "u" else "int8"
    return f"{name} tensor {draw(st.sampled_from(['asym', 'sym']))}"


def w_scheme(row: KernelRow, draw: Callable) -> str:  # type: ignore[type-arg]
    code = draw(st.sampled_from(sorted(row.codes)))
    size = draw(st.sampled_from(sorted(row.granularities)))
    zeros = "sym" if row.one_zero and size == "channel" else draw(st.sampled_from(["sym", "asym"]))
    return f"{code} {size} {zeros}"


def runs_right(case: Case, row: KernelRow, spec: str = ANY_CHIP) -> None:
    """The row's node is there under the site's name, and its numbers are within what the row states."""
    done = ran(case, spec, row.name)
    node = row.name.partition("/")[2].partition(".")[0]
    made = [op for op in done.graph if op.name.endswith("." + node)]
    assert [op.loc.name for op in made] == [case.attrs["site"]], [op.name for op in done.graph]
    labels = [op.label for op in done.graph]
    assert len(set(labels)) == len(labels)
    assert wrong(case, done.result) <= 1
    assert done.result.dtype == case.wanted.dtype
    assert max(done.seen.temp[0].values()) <= temp_bound(case)  # the runtime may rename a convolution


def temp_bound(case: Case) -> int:
    """Bytes that grow with the activations alone: their codes, int32 sums, what a convolution's windows see."""
    positions = int(np.prod(case.wanted.shape)) // max(1, case.wanted.shape[1 if "conv" in case.name else -1])
    x = case.arrays[0]
    assert x is not None
    terms = int(np.prod(case.arrays[3].shape[1:])) if case.name == "q.conv" and case.arrays[3] is not None else 0
    return x.size + 4 * case.wanted.size + 2 * positions * (terms + 64) * int(case.attrs.get("group", 1)) + 8 * 127


@st.composite
def lead(draw: Callable, most: int = 3) -> tuple[int, ...]:  # type: ignore[type-arg]
    return tuple(draw(st.lists(st.integers(1, 5), max_size=most)))


@pytest.mark.parametrize("name", rows("q.linear_static"))
@SOME
@given(data=st.data())
def test_static_linear(name: str, data: st.DataObject) -> None:
    row, draw = ROWS[name], data.draw
    x = x_scheme(row, draw)
    bias = row.bias and draw(st.booleans())
    results = [None if y == "float" else f"{y} tensor asym" for y in sorted(row.y_codes)]
    y = draw(st.sampled_from(results))
    shape = draw(lead()) if row.traits else (draw(st.integers(1, 9)),)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    case = linear_static(rng, n, k, shape, x=x, w=w_scheme(row, draw), y=y, bias=bias)
    runs_right(case, row)


@pytest.mark.parametrize("name", rows("q.linear_dyn"))
@SOME
@given(data=st.data())
def test_dynamic_linear(name: str, data: st.DataObject) -> None:
    row, draw = ROWS[name], data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    runs_right(linear_dyn(rng, n, k, draw(lead()), w=w_scheme(row, draw), bias=draw(st.booleans())), row)


@st.composite
def convolution(draw: Callable, row: KernelRow) -> Case:  # type: ignore[type-arg]
    axes = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    per, each = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):  # depthwise
        group, per = draw(st.sampled_from([4, 7, 16])), 1
    some = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, strides, dilations = draw(some), draw(some), draw(some)
    attrs: dict[str, object] = {"group": group, "strides": tuple(strides)}
    how = draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID", "none"]))
    if how == "pads":
        attrs["pads"] = tuple(draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes)))
    elif how != "none":
        attrs["auto_pad"] = how
    if not how.startswith("SAME"):
        attrs["dilations"] = tuple(dilations)
    size = [(k - 1) * d + draw(st.integers(1, 6)) for k, d in zip(kernel, dilations, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dynamic = row.dynamic
    x = "" if dynamic else x_scheme(row, draw)
    return conv(
        rng,
        group * each,
        group * per,
        kernel,
        size,
        x=x or "uint8 tensor asym",
        w=w_scheme(row, draw),
        bias=draw(st.booleans()),
        batch=draw(st.integers(1, 2)),
        dynamic=dynamic,
        coded="float" not in row.y_codes,
        attrs=attrs,
    )


@pytest.mark.parametrize("name", rows("q.conv") + rows("q.conv_dyn"))
@settings(SOME, max_examples=60)
@given(data=st.data())
def test_convolution(name: str, data: st.DataObject) -> None:
    row = ROWS[name]
    runs_right(data.draw(convolution(row)), row)


@pytest.mark.parametrize("name", rows("q.matmul"))
@SOME
@given(data=st.data())
def test_product(name: str, data: st.DataObject) -> None:
    row, draw = ROWS[name], data.draw
    m, k, n = (draw(st.integers(1, 40)) for _ in range(3))
    batch, more = draw(lead(2)), draw(lead(1))
    left, right = (*batch, m, k), (*draw(st.sampled_from([batch, (), more if not batch else batch[-1:]])), k, n)
    left_is_constant = "a constant left-hand operand" in row.traits
    zeros = st.sampled_from(["asym", "sym"])
    if left_is_constant:
        inputs: tuple[int, ...] = (3,)
        a = f"{draw(st.sampled_from(sorted(row.x_codes)))} tensor {draw(zeros)}"
        b = f"{'uint8' if kind(row) == 'u8u8' else 'int8'} tensor {draw(zeros)}"
    else:
        a, b = x_scheme(row, draw), f"{draw(st.sampled_from(sorted(row.codes)))} tensor {draw(zeros)}"
        constant = kind(row) == "u8u8" and b.startswith("int8")  # an activation cannot be stored otherwise
        inputs = (0,) if constant or draw(st.booleans()) else (0, 3)
    y = None if row.y_codes == {"float"} else f"{min(row.y_codes)} tensor {draw(zeros)}"
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    runs_right(matmul(rng, left, right, a=a, b=b, y=y, inputs=inputs), row)


@st.composite
def pool(draw: Callable, rng: np.random.Generator, x: str) -> Case:  # type: ignore[type-arg]
    axes = draw(st.integers(1, 3))
    some = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, strides = draw(some), draw(some)
    attrs: dict[str, object] = {"kernel_shape": tuple(kernel), "strides": tuple(strides)}
    how = draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID", "ceil", "none"]))
    if how == "pads":
        attrs["pads"] = tuple(draw(st.integers(0, k - 1)) for k in (*kernel, *kernel))
        attrs["count_include_pad"] = draw(st.integers(0, 1))
    elif how == "ceil":
        attrs["ceil_mode"] = 1
    elif how != "none":
        attrs["auto_pad"] = how
    size = [k + draw(st.integers(0, 6)) for k in kernel]
    return apply(rng, "AveragePool", [(draw(st.integers(1, 2)), draw(st.integers(1, 5)), *size)], x=x, attrs=attrs)


@pytest.mark.parametrize("name", rows("q.apply"))
@settings(SOME, max_examples=40)
@given(data=st.data())
def test_function_of_codes(name: str, data: st.DataObject) -> None:
    row, draw = ROWS[name], data.draw
    (fn,) = row.fns
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = x_scheme(row, draw)
    shape = draw(lead(4))
    if fn in ("Add", "Mul"):
        other = tuple(1 if draw(st.booleans()) else d for d in shape)[draw(st.integers(0, len(shape))) :]
        shapes = [shape, other] if draw(st.booleans()) else [other, shape]
        inputs = draw(st.sampled_from([(0, 3), (0,), (3,)]))
        case = apply(rng, fn, shapes, x=x, inputs=inputs)
    elif fn == "Concat":
        shape = (*shape, 2)
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        parts = [list(shape) for _ in range(draw(st.integers(1, 4)))]
        for part in parts:
            part[axis] = draw(st.integers(1, 4))
        case = apply(rng, fn, parts, x=x, attrs={"axis": axis})
    elif fn == "AveragePool":
        case = draw(pool(rng, x))
    elif fn == "GlobalAveragePool":
        size = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        case = apply(rng, fn, [(2, draw(st.integers(1, 40)), *size)], x=x, y_size=0.01)
    elif fn == "Softmax":
        length = draw(st.integers(5, 300))  # of 1 to 4 the kernel has overflows: below
        case = apply(rng, fn, [(*shape, length)], x=x, size=0.05, y_size=1 / 256, attrs={"axis": -1})
    else:
        case = apply(rng, fn, [shape], x=x, size=0.05, attrs={"alpha": 0.125} if fn == "LeakyRelu" else {})
    done = ran(case, ANY_CHIP, row.name)
    assert [op.name for op in done.graph] == [f"com.microsoft.QLinear{fn}"]
    assert done.result.dtype == case.wanted.dtype
    assert wrong(case, done.result) <= 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 40])
def test_a_short_softmax_overflows_and_is_refused_in_time(length: int) -> None:
    """A code of the result is exponential / y scale / sum in 32 bits: below ``1 / (e^5 y scale)`` elements it wraps."""
    for steps in (140, 150, 256, 300, 600, 1500, 6000):
        case = apply(np.random.default_rng(0), "Softmax", [(2, length)], size=0.5, attrs={"axis": -1})
        x = case.arrays[0] = np.zeros((2, length), np.uint8)
        x[:, 0], case.arrays[3], case.arrays[4] = 255, np.float32(1 / steps) * np.ones(()), np.zeros((), np.uint8)
        case.arrays[3] = np.asarray(case.arrays[3], np.float32)
        graph = case.graph()
        (op,) = list(graph)
        if target(ANY_CHIP).why_not(request_of(op)):
            assert steps > 148 * length
            continue
        assert wrong(case, ran(case, ANY_CHIP).result) <= 1


def test_every_row_stands_in_one_of_these_tests() -> None:
    tested = {"q.linear_static", "q.linear_dyn", "q.conv", "q.conv_dyn", "q.matmul", "q.apply"}
    edges = {"q.quantize", "q.dequantize", "q.choose_qparams", "q.scale"}
    assert {r.op for r in INTEGER_ROWS} == tested | edges
    assert set(INTEGER_ROWS) <= set(CPU_ROWS)


# -- memory --------------------------------------------------------------------------------------------------

N, K, M = 256, 1024, 3


@pytest.mark.parametrize("name", rows("q.linear_static") + rows("q.linear_dyn"))
def test_no_weight_is_expanded(name: str) -> None:
    """What the node allocates is far under the float weight, and for MatMulIntegerToFloat nothing."""
    row, rng = ROWS[name], np.random.default_rng(0)
    y = None if "float" in row.y_codes or row.dynamic else f"{min(row.y_codes)} tensor asym"
    x = "uint8 tensor asym" if kind(row)[0] == "u" else "int8 tensor sym"
    case = linear_dyn(rng, N, K, (M,)) if row.dynamic else linear_static(rng, N, K, (M,), x=x, y=y, bias=row.bias)
    temp = ran(case, ANY_CHIP, row.name).seen.temp[0]["head"]
    assert temp <= M * (K + 4 * N) + 127 < 4 * N * K
    if row.name.startswith("ort-cpu/MatMulIntegerToFloat.") and not row.dynamic:
        assert temp == 0


# -- what is refused -----------------------------------------------------------------------------------------


def test_cuda_says_plainly_that_there_is_no_such_kernel() -> None:
    rng = np.random.default_rng(0)
    cuda = target("ort-cuda:sm_90")
    cases = [
        linear_static(rng, 8, 16),
        linear_dyn(rng, 8, 16),
        conv(rng, 4, 2, (3,), (9,)),
        matmul(rng, (3, 4), (4, 5)),
    ]
    for case in [*cases, apply(rng, "Add", [(3,), (3,)])]:
        (op,) = list(case.graph())
        (reason,) = cuda.why_not(request_of(op))
        assert reason.code == "QC201"
        assert "no kernel that computes on int8 activations" in reason.message
        assert "w4a16" in reason.fix


def refused(case: Case, opset: int = 17, spec: str = ANY_CHIP) -> set[tuple[str, str]]:
    (op,) = list(case.graph(opset))
    return {(r.code, r.message + "; " + r.fix) for r in target(spec).why_not(request_of(op))}


def test_a_scale_for_each_token_is_refused_and_the_nearest_named() -> None:
    rng = np.random.default_rng(0)
    case = linear_dyn(rng, 8, 16)
    case.attrs["x_scheme"] = case.attrs["x_scheme"].__class__(
        case.attrs["x_scheme"].dtype, "token", False, dynamic=True
    )
    (only,) = refused(case)
    assert only[0] == "QC201"
    assert "per tensor, not per token" in only[1]
    assert "uint8 tensor asym dynamic" in only[1]


def test_what_else_no_row_serves() -> None:
    rng = np.random.default_rng(0)
    other = conv(rng, 4, 2, (3,), (9,), w="int8 channel asym")
    assert any("one zero point for all channels" in m for c, m in refused(other) if c == "QC204")
    case = apply(rng, "Softmax", [(3, 4, 5)], attrs={"axis": 1})
    assert any("another axis than the last" in m for c, m in refused(case) if c == "QC203")
    case = apply(rng, "Softmax", [(3, 4, 1)], y_size=1 / 256, attrs={"axis": -1})
    assert any("may be shorter than" in m for c, m in refused(case) if c == "QC203")
    case = apply(rng, "AveragePool", [(1, 2, 9)], attrs={"kernel_shape": (3,), "dilations": (2,)})
    assert any("dilated" in m for c, m in refused(case) if c == "QC203")
    attrs = {"kernel_shape": (3,), "ceil_mode": 1, "count_include_pad": 1, "pads": (1, 1), "strides": (2,)}
    case = apply(rng, "AveragePool", [(1, 2, 10)], attrs=attrs)
    assert any("padding that counts" in m for c, m in refused(case) if c == "QC203")
    case = conv(rng, 4, 2, (3,), (9,), dynamic=True)
    assert any("opset 11" in m for c, m in refused(case, opset=10) if c == "QC207")
    assert not refused(case, opset=11)
    assert {c for c, _ in refused(linear_static(rng, 8, 16), spec="ort-cpu:arm64")} == {"QC206"}


def test_half_precision_models_are_refused() -> None:
    case = linear_dyn(np.random.default_rng(0), 8, 16)
    case.arrays = [None if a is None else a.astype(np.float16) if a.dtype == np.float32 else a for a in case.arrays]
    assert any(f"not {F16}" in m and f"takes {F32}" in m for c, m in refused(case) if c == "QC201")
