"""One low-bit node cut out of its graph, with its constants and made-up activations: a model of a single node.

What is constant in the graph stays constant here, what can change stays an input: that decides which kernel runs. A
weight of more than ``LIMIT`` elements is represented by its first output rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from qcompiler.backends.onnx.attributes import attribute_proto
from qcompiler.backends.onnx.load import opset_of
from qcompiler.backends.onnx.nodes import DEFAULT, MS, LowBit
from qcompiler.backends.onnx.tensors import tensor_proto
from qcompiler.backends.onnx.typemap import dtype_to_onnx
from qcompiler.backends.onnx.values import stored
from qcompiler.dtypes import Array, DType
from qcompiler.ir import Value
from qcompiler.payload import ArrayPayload, Payload

LIMIT = 1 << 19
"""Weight elements above which only the first rows are probed; the float64 reference takes 8 bytes an element."""
NAME = "probe"

PROBED = frozenset(
    MS + n
    for n in (
        "MatMulNBits",
        "MatMulBnb4",
        "GatherBlockQuantized",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
    )
) | {DEFAULT + n for n in ("QLinearMatMul", "MatMulInteger", "QLinearConv", "ConvInteger")}
"""Ops that can be run alone and compared with :mod:`qcompiler.backends.onnx.reference`."""


@dataclass
class Alone:
    """A model with the one node :data:`NAME`, what to feed it, and the values of all its operands, unpacked."""

    node: LowBit
    model: onnx.ModelProto
    feed: dict[str, Array]
    operands: list[Array | None]
    n: int
    m: int
    made_up: bool = False
    """Its weight was not at hand, and random codes stand for it."""


def cut_out(node: LowBit, m: int, seed: int = 0) -> Alone | None:
    """``node`` alone with ``m`` rows of random activations; None for a node that cannot be run that way."""
    if node.op.name not in PROBED or not node.n or not node.k or node.activation is None:
        return None
    if node.activation.name not in ("f16", "f32"):
        return None
    rows = _rows(node)
    cut = _Cut(node, m, rows, np.random.default_rng(seed))
    inputs = [cut.operand(i, v) for i, v in enumerate(node.op.operands)]
    if cut.impossible:
        return None
    attrs = dict(node.op.attrs)
    if rows < node.n and "N" in attrs:
        attrs["N"] = rows
    domain = "" if node.op.name.startswith(DEFAULT) else "com.microsoft"
    proto = helper.make_node(node.short, inputs, [f"y{i}" for i in range(len(node.op.results))], NAME, domain=domain)
    proto.attribute.extend(attribute_proto(k, v, NAME) for k, v in attrs.items())
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output[:1]]
    del proto.output[1:]
    graph = helper.make_graph([proto], "alone", cut.inputs, outputs, cut.consts)
    opsets = [helper.make_opsetid("", max(opset_of(node.op.graph), 13)), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if opsets[0].version < 25 else 13)
    return Alone(node, model, cut.feed, cut.arrays, rows, m, cut.made_up)


def _pixels(node: LowBit, m: int) -> tuple[int, ...] | None:
    """The shape of an input of which a convolution makes three positions along each axis, of one image or of two."""
    weight = None if node.codes is None else node.codes.tensor.static_shape
    if weight is None or len(weight) < 3:
        return None
    axes = len(weight) - 2

    def each(name: str) -> list[int]:
        found = node.op.attrs.get(name)
        return [int(i) for i in found] if isinstance(found, (tuple, list)) and len(found) == axes else [1] * axes

    size = [(k - 1) * d + 1 + 2 * s for k, d, s in zip(weight[2:], each("dilations"), each("strides"), strict=True)]
    images, channels = min(m, 2), weight[1] * node.attr("group", 1)
    return (images, *size, channels) if node.attr("channels_last", 0) else (images, channels, *size)


def _rows(node: LowBit) -> int:
    """How many output rows are kept: all, or as many as :data:`LIMIT` elements are, rounded to the kernels' tiles."""
    payload = None if node.codes is None else node.codes.payload
    sliceable = node.op.name in (MS + "MatMulNBits", MS + "GatherBlockQuantized")
    if payload is None or not sliceable or node.n * node.k <= LIMIT or payload.shape[0] != node.n:
        return node.n
    kept = LIMIT // node.k
    return min(node.n, max(128, kept - kept % 128))


@dataclass
class _Cut:
    """Operands of the node as inputs and initializers of the new model."""

    node: LowBit
    m: int
    rows: int
    rng: np.random.Generator
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    consts: list[onnx.TensorProto] = field(default_factory=list)
    feed: dict[str, Array] = field(default_factory=dict)
    arrays: list[Array | None] = field(default_factory=list)
    impossible: bool = False
    made_up: bool = False

    def operand(self, index: int, value: Value | None) -> str:
        """The name under which operand ``index`` is known in the new model."""
        if value is None:
            self.arrays.append(None)
            return ""
        name = f"i{index}"
        payload = stored(value)
        if payload is not None and (value.is_const or value.is_input):
            self._constant(name, index, payload, fixed=value.is_const)
        elif value.is_const:
            self._unreadable(name, index, value)
        else:
            self._changing(name, index, value)
        return name

    def _constant(self, name: str, index: int, payload: Payload, *, fixed: bool) -> None:
        element = payload.dtype
        array = payload.rows(0, self.rows) if self._by_row(index, payload) else payload.array()
        if (
            self.rows < self.node.n
            and index == self.node.places.scales
            and payload.shape == (self.node.n * self._groups(),)
        ):
            array = array[: self.rows * self._groups()]
        self.arrays.append(array)
        self.consts.append(tensor_proto(name, ArrayPayload(np.ascontiguousarray(array), element)))
        if not fixed:
            self.inputs.append(helper.make_tensor_value_info(name, dtype_to_onnx(element, name), list(array.shape)))

    def _unreadable(self, name: str, index: int, value: Value) -> None:
        """A constant that the runtime computed and whose bytes nobody kept: made-up values in its place."""
        element, shape = value.tensor.dtype, value.tensor.static_shape
        if shape is not None and self.rows < self.node.n and shape[:1] == (self.node.n,):
            shape = (self.rows, *shape[1:])
        elif shape is not None and self.rows < self.node.n and shape == (self.node.n * self._groups(),):
            shape = (self.rows * self._groups(),)
        made = None if element is None else self._made_up(index, shape, element)
        if element is None or made is None:
            self.impossible = True
            return
        self.made_up = True
        self.arrays.append(made)
        self.consts.append(tensor_proto(name, ArrayPayload(made, element)))

    def _groups(self) -> int:
        return -(-self.node.k // (self.node.block or self.node.k))

    def _by_row(self, index: int, payload: Payload) -> bool:
        p = self.node.places
        cut = self.rows < self.node.n and index in (p.codes, p.scales, p.zeros, p.bias)
        return cut and bool(payload.shape) and payload.shape[0] == self.node.n

    def _changing(self, name: str, index: int, value: Value) -> None:
        """An input of made-up values of the role that the operand has."""
        element = value.tensor.dtype or self._likely(index)
        made = None if element is None else self._made_up(index, value.tensor.static_shape, element)
        if element is None or made is None:
            self.impossible = True
            return
        self.arrays.append(made)
        self.feed[name] = made
        self.inputs.append(helper.make_tensor_value_info(name, dtype_to_onnx(element, name), list(made.shape)))

    def _likely(self, index: int) -> DType | None:
        """The type of an activation that was not inferred: its zero point's, else that of the float results."""
        if index != self.node.places.x:
            return None
        zero = self.node.at(self.node.places.x_zero)
        return zero.tensor.dtype if zero is not None else self.node.activation

    def _made_up(self, index: int, shape: tuple[int, ...] | None, element: DType) -> Array | None:
        """Random values of the role that operand ``index`` has; ``shape`` counts where the role does not tell it."""
        p = self.node.places
        if index == p.x and p.kind == "embedding":
            return self.rng.integers(0, self.rows, (self.m,)).astype(element.storage)
        if index == p.x:
            shape = _pixels(self.node, self.m) if p.kind == "conv" else (self.m, self.node.k)
            if shape is None:
                return None
        elif index in (p.x_scale, p.x_zero):
            shape = ()
        if shape is None or element.packed:
            return None
        if element.is_integer:
            return self.rng.integers(element.qmin, element.qmax + 1, shape).astype(element.storage)
        if index in (p.scales, p.x_scale):
            return self.rng.uniform(0.002, 0.02, shape).astype(element.storage)
        return self.rng.standard_normal(shape).astype(element.storage)
