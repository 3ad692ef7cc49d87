"""Graphs of one integer ``q.*`` op each, with random codes, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler import numerics
from qcompiler.dtypes import Array, dtype_of
from qcompiler.integer_numerics import Integer, call, convolve, dynamic_params
from qcompiler.ir import Attr, Graph, Op, TensorType, Value
from qcompiler.payload import ArrayPayload
from qcompiler.scheme import Scheme, parse_scheme
from qcompiler.spec import check
from tests.backends.onnx.proof import Seen, lower, run


def scheme(text: str, axis: int | None = None) -> Scheme:
    return parse_scheme(text).with_axis(axis)


def codes(rng: np.random.Generator, s: Scheme, shape: Sequence[int]) -> Array:
    """Random codes over the whole range of the type; some zero points and codes lie at its ends."""
    return rng.integers(s.dtype.qmin, s.dtype.qmax + 1, tuple(shape)).astype(s.dtype.storage)


def zero(rng: np.random.Generator, s: Scheme, shape: Sequence[int] = ()) -> Array | None:
    return None if s.symmetric else np.asarray(codes(rng, s, shape))


def scales(rng: np.random.Generator, shape: Sequence[int] = (), size: float = 0.02) -> Array:
    return np.asarray(rng.uniform(0.5, 1.5, tuple(shape)) * size, np.float32)


@dataclass
class Case:
    """One op: the arrays of its operands, and which of them (by index) are graph inputs."""

    name: str
    arrays: list[Array | None]
    attrs: dict[str, Attr]
    inputs: tuple[int, ...] = (0,)

    @property
    def wanted(self) -> Array:
        return numerics.evaluate(self.name, self.arrays, self.attrs)

    @property
    def feed(self) -> dict[str, Array]:
        return {f"x{i}": a for i, a in enumerate(self.arrays) if i in self.inputs and a is not None}

    def graph(self, opset: int = 17) -> Graph:
        graph = Graph()
        graph.meta["opset_import"] = (("", opset),)
        want = self.wanted
        operands = [self._operand(graph, i, a) for i, a in enumerate(self.arrays)]
        while operands and operands[-1] is None:
            operands.pop()
        made = graph.create(self.name, operands, self.attrs, [("y", TensorType(dtype_of(want.dtype), want.shape))])
        graph.add_output(made.result)
        check(graph)
        return graph

    def _operand(self, graph: Graph, i: int, array: Array | None) -> Value | None:
        if array is None:
            return None
        if i in self.inputs:
            return graph.add_input(f"x{i}", TensorType(dtype_of(array.dtype), array.shape))
        return graph.add_const(f"c{i}", ArrayPayload(np.array(array, order="C"), dtype_of(array.dtype)))


@dataclass
class Ran:
    """The lowered graph, its result, and what the runtime said of it."""

    graph: Graph
    result: Array
    seen: Seen

    def node(self, name: str) -> Op:
        found = [op for op in self.graph if op.name == name]
        assert len(found) == 1, f"{name} is there {len(found)} times: {[op.name for op in self.graph]}"
        return found[0]


def ran(case: Case, spec: str = "ort-cpu", kernel: str = "", opset: int = 17) -> Ran:
    """``case`` lowered for ``spec`` and run."""
    graph = lower(case.graph(opset), spec, kernel)
    seen = run(graph, [case.feed])
    return Ran(graph, seen.outputs[0][0], seen)


def linear_static(
    rng: np.random.Generator,
    n: int,
    k: int,
    lead: Sequence[int] = (3,),
    *,
    x: str = "uint8 tensor asym",
    w: str = "int8 channel sym",
    y: str | None = None,
    bias: bool = True,
) -> Case:
    xs, ws = scheme(x), scheme(w, 1)
    shape = (1, 1) if ws.granularity == "tensor" else (n, 1)
    out: list[Array | None] = [None, None]
    attrs: dict[str, Attr] = {"scheme": ws, "x_scheme": xs, "site": "head"}
    if y is not None:
        ys = attrs["y_scheme"] = scheme(y)
        out = [scales(rng, (), 0.02 * float(np.sqrt(k))), zero(rng, ys)]
    arrays = [
        codes(rng, xs, (*lead, k)),
        scales(rng),
        zero(rng, xs),
        codes(rng, ws, (n, k)),
        scales(rng, shape),
        zero(rng, ws, shape),
        rng.standard_normal(n).astype(np.float32) if bias else None,
        *out,
    ]
    return Case("q.linear_static", arrays, attrs)


def linear_dyn(
    rng: np.random.Generator,
    n: int,
    k: int,
    lead: Sequence[int] = (3,),
    *,
    w: str = "int8 channel sym",
    bias: bool = True,
) -> Case:
    ws = scheme(w, 1)
    shape = (1, 1) if ws.granularity == "tensor" else (n, 1)
    arrays = [
        rng.standard_normal((*lead, k)).astype(np.float32),
        codes(rng, ws, (n, k)),
        scales(rng, shape),
        zero(rng, ws, shape),
        rng.standard_normal(n).astype(np.float32) if bias else None,
    ]
    attrs: dict[str, Attr] = {"scheme": ws, "x_scheme": scheme("uint8 tensor asym dynamic"), "site": "head"}
    return Case("q.linear_dyn", arrays, attrs)


def conv(
    rng: np.random.Generator,
    out: int,
    channels: int,
    kernel: Sequence[int],
    size: Sequence[int],
    *,
    x: str = "uint8 tensor asym",
    w: str = "int8 channel sym",
    bias: bool = True,
    batch: int = 2,
    dynamic: bool = False,
    coded: bool = True,
    attrs: Mapping[str, Attr] | None = None,
) -> Case:
    more = dict(attrs or {})
    group = int(more.get("group", 1))
    xs, ws = scheme(x), scheme(w)
    ws = ws.with_axis(0) if ws.granularity == "channel" else ws
    shape = (out,) if ws.granularity == "channel" else ()
    weight: list[Array | None] = [
        codes(rng, ws, (out, channels // group, *kernel)),
        scales(rng, shape),
        zero(rng, ws, shape),
        rng.standard_normal(out).astype(np.float32) if bias else None,
    ]
    more |= {"scheme": ws, "x_scheme": xs, "site": "conv", "kernel_shape": tuple(kernel)}
    if dynamic:
        more["x_scheme"] = scheme("uint8 tensor asym dynamic")
        return Case("q.conv_dyn", [rng.standard_normal((batch, channels, *size)).astype(np.float32), *weight], more)
    given = [codes(rng, xs, (batch, channels, *size)), scales(rng), zero(rng, xs), *weight]
    if not coded:
        return Case("q.conv", given, more)
    ys = more["y_scheme"] = scheme(x)
    terms = float(np.sqrt(np.prod([channels // group, *kernel])))
    result: list[Array | None] = [scales(rng, (), 0.02 * terms), zero(rng, ys)]
    return Case(
        "q.conv", [codes(rng, xs, (batch, channels, *size)), scales(rng), zero(rng, xs), *weight, *result], more
    )


def matmul(
    rng: np.random.Generator,
    left: Sequence[int],
    right: Sequence[int],
    *,
    a: str = "uint8 tensor asym",
    b: str = "uint8 tensor asym",
    y: str | None = None,
    inputs: tuple[int, ...] = (0, 3),
) -> Case:
    sa, sb = scheme(a), scheme(b)
    attrs: dict[str, Attr] = {"a_scheme": sa, "b_scheme": sb, "site": "product"}
    out: list[Array | None] = [None, None]
    if y is not None:
        ys = attrs["y_scheme"] = scheme(y)
        out = [scales(rng, (), 0.02 * float(np.sqrt(left[-1]))), zero(rng, ys)]
    arrays = [codes(rng, sa, left), scales(rng), zero(rng, sa), codes(rng, sb, right), scales(rng), zero(rng, sb), *out]
    return Case("q.matmul", arrays, attrs, inputs)


def apply(
    rng: np.random.Generator,
    fn: str,
    shapes: Sequence[Sequence[int]],
    *,
    x: str = "uint8 tensor asym",
    size: float = 0.02,
    y_size: float = 0.03,
    inputs: Sequence[int] = (),
    attrs: Mapping[str, Attr] | None = None,
) -> Case:
    xs = scheme(x)
    arrays: list[Array | None] = []
    for shape in shapes:
        arrays += [codes(rng, xs, shape), scales(rng, (), size), zero(rng, xs)]
    arrays += [scales(rng, (), y_size), zero(rng, xs)]
    more: dict[str, Attr] = {"fn": fn, "x_scheme": xs, "y_scheme": xs, **dict(attrs or {})}
    return Case("q.apply", arrays, more, tuple(inputs) or tuple(range(0, 3 * len(shapes), 3)))


# -- how right a kernel must be ------------------------------------------------------------------------------

EPS = 2.0**-24
EPS64 = 2.0**-26
"""Of the sum of magnitudes: what the float64 reference itself may be off, in units of :data:`EPS`."""


def exact(case: Case) -> tuple[Array, Array]:
    """The result in float64 before it is rounded or quantized, and the magnitude of what is summed for each element.

    A kernel adds codes in int32, which is exact, so the magnitude counts what it scales and adds in float32.
    """
    it = Integer(case.arrays, case.attrs, numerics.quantize, numerics.dequantize)
    match case.name:
        case "q.linear_static" | "q.linear_dyn":
            x, first = (it.activation(0, "x_scheme"), 3) if case.name == "q.linear_static" else (it.dynamic(), 1)
            bias = 0.0 if it.at(first + 3) is None else it.need(first + 3).astype(np.float64)
            product = x @ it.weight(first).T
            return product + bias, np.abs(product) + np.abs(bias) + EPS64 * (np.abs(x) @ np.abs(it.weight(first)).T)
        case "q.conv" | "q.conv_dyn":
            x, first = (it.activation(0, "x_scheme"), 3) if case.name == "q.conv" else (it.dynamic(), 1)
            y = convolve(x, it.weight(first), it.at(first + 3), case.attrs)
            bias = 0.0 if it.at(first + 3) is None else np.abs(it.need(first + 3)).max()
            return y, np.abs(y) + 2 * bias + EPS64 * convolve(np.abs(x), np.abs(it.weight(first)), None, case.attrs)
        case "q.matmul":
            a, b = it.activation(0, "a_scheme"), it.activation(3, "b_scheme")
            return a @ b, np.abs(a @ b) + EPS64 * (np.abs(a) @ np.abs(b))
        case "q.apply":
            xs = [it.activation(3 * i, "x_scheme") for i in range((len(case.arrays) - 1) // 3)]
            y = call(str(case.attrs["fn"]), xs, case.attrs)
            size = max(float(np.abs(x).max(initial=0.0)) for x in xs)
            return y, np.abs(y) + size
    raise AssertionError(case.name)


def wrong(case: Case, got: Array) -> float:
    """How far ``got`` is outside what the row allows, in units of that: at most 1 is right.

    Floats: eight roundings of the magnitude (int32 to f32, two scales, their product, the bias, the result). Codes:
    half a step of the real value, and those roundings in steps; an int32 bias adds half of its own step. Dynamic codes
    of the activation may sit on the other side of a tie, since the reference chooses their scale in float64.
    """
    real, magnitude = exact(case)
    assert got.shape == real.shape, (got.shape, real.shape)
    slack = 8 * EPS * magnitude
    if case.attrs.get("x_scheme") is not None and case.attrs["x_scheme"].dynamic:
        slack = slack + _ties(case)
    if "y_scheme" not in case.attrs:
        return float((np.abs(got - real) / (slack + 1e-30)).max(initial=0.0))
    scheme, place = case.attrs["y_scheme"], {"q.matmul": 6, "q.apply": len(case.arrays) - 2}.get(case.name, 7)
    step, zero = (0.0 if a is None else float(a) for a in case.arrays[place : place + 2])
    wanted = np.clip(real / step + zero, scheme.dtype.qmin, scheme.dtype.qmax)
    allowed = 0.5 + 8 * EPS * (magnitude / step + abs(zero)) + _bias_step(case) / step
    if case.attrs.get("fn") == "Softmax":
        allowed = allowed + 1.0  # a table of exponentials, divided in integers: one code more or less
    return float((np.abs(got - wanted) / allowed).max(initial=0.0))


def _bias_step(case: Case) -> float:
    """Half the largest step of an int32 bias: x scale times w scale."""
    if case.name not in ("q.conv", "q.linear_static") or case.arrays[6] is None:
        return 0.0
    x_scale, w_scale = case.arrays[1], case.arrays[4]
    assert x_scale is not None and w_scale is not None
    return 0.5 * float(x_scale) * float(w_scale.max())


def _ties(case: Case) -> Array:
    """What the activations near a tie may add to the result, were each of them one step off."""
    it = Integer(case.arrays, case.attrs, numerics.quantize, numerics.dequantize)
    x = it.need(0)
    scale, _ = dynamic_params(x, case.attrs["x_scheme"])
    part = np.abs(x.astype(np.float64)) / float(scale)
    near = (np.abs(part - np.floor(part) - 0.5) < 1e-4) * float(scale)
    weight = np.abs(it.weight(1))
    if case.name == "q.linear_dyn":
        return np.asarray(near @ weight.T)
    return convolve(near, weight, None, case.attrs)
