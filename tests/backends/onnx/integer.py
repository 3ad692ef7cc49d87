"""Graphs of one integer ``q.*`` op each, with random codes, and what the reference says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.dtypes import Array, DType, dtype_of
from qcompiler.ir import Attr, Graph, Op, TensorType, Value
from qcompiler.payload import ArrayPayload, constant
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
    dynamic_shapes: bool = False
    """Leave the inputs' leading dimension open."""
    types: dict[int, DType] = field(default_factory=dict)

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
        shape: tuple[Any, ...] = want.shape
        if self.dynamic_shapes and shape:
            shape = ("m", *shape[1:])
        made = graph.create(self.name, operands, self.attrs, [("y", TensorType(dtype_of(want.dtype), shape))])
        graph.add_output(made.result)
        check(graph)
        return graph

    def _operand(self, graph: Graph, i: int, array: Array | None) -> Value | None:
        if array is None:
            return None
        if i in self.inputs:
            shape: tuple[Any, ...] = array.shape
            if self.dynamic_shapes and shape:
                shape = ("m", *shape[1:])
            return graph.add_input(f"x{i}", TensorType(dtype_of(array.dtype), shape))
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
        given = rng.standard_normal((batch, channels, *size)).astype(np.float32)
        more["x_scheme"] = scheme("uint8 tensor asym dynamic")
        return Case("q.conv_dyn", [given, *weight], more)
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


def const_of(array: Array) -> ArrayPayload:
    return constant(array)
