"""Entry points: codes made of floats and floats of codes, element-wise ops and pools on codes, explicit rescales."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qcompiler.backends.onnx.building import Builder
from qcompiler.dtypes import F32, UINT8
from qcompiler.errors import InputError
from qcompiler.integer_spec import apply_arity
from qcompiler.ir import Op, TensorType, Value
from qcompiler.requests import opset_of_graph
from qcompiler.target import Choice

DYNAMIC = "onnx.DynamicQuantizeLinear"
SHARED_BY_ALL = "ort.dynamic"
"""Key in the ``meta`` of a DynamicQuantizeLinear that was made here."""
OPSET_OF_LINEAR = 10
"""From this opset on ONNX itself has QuantizeLinear and DequantizeLinear; ``com.microsoft`` always does."""


def _named(b: Builder, word: str) -> str:
    """``onnx.<word>``, or the same op of ``com.microsoft`` in a model that is too old for it."""
    opset = opset_of_graph(b.op.graph)
    return f"com.microsoft.{word}" if 0 < opset < OPSET_OF_LINEAR else f"onnx.{word}"


def quantize_node(b: Builder, x: Value, scale: Value, zero: Value, *, suffix: str = "") -> Value:
    """The codes of ``x``, of the type of ``zero``."""
    name, attrs = _named(b, "QuantizeLinear"), {}
    if name.startswith("com."):
        attrs = {"axis": 0}  # its schema has no default, and the kernel asks for it; without meaning for one scale
    return b.step(name, [x, scale, zero], suffix, b.like(zero.tensor.dtype), attrs)


def dynamic_codes(b: Builder, x: Value) -> Sequence[Value]:
    """uint8 codes of ``x``, their scale and zero point: results of a DynamicQuantizeLinear that is there, or made."""
    for user in x.users:
        if user.name == DYNAMIC and _reaches(user, b.op):
            return user.results
    types = {"codes": TensorType(UINT8, x.tensor.shape), "scale": TensorType(F32, ()), "zero": TensorType(UINT8, ())}
    hints = {f"{x.name}_{word}": type for word, type in types.items()}
    made = b.node(DYNAMIC, [x], label=f"{x.name}.quantize", types=hints)
    made.meta[SHARED_BY_ALL] = True
    return made.results


def _reaches(maker: Op, reader: Op) -> bool:
    """``maker`` stands before ``reader``, in its graph or in an enclosing one.

    What was made here stands before the first op that asked for it, and ops ask in their order.
    """
    while reader.graph is not maker.graph:
        if reader.graph.parent is None:
            return False
        reader = reader.graph.parent
    if maker.meta.get(SHARED_BY_ALL):
        return True
    return any(op is reader for op in itertools.dropwhile(lambda op: op is not maker, maker.graph))


def quantize(op: Op, choice: Choice) -> Value:
    """q.quantize(x, s, z?)  ->  QuantizeLinear(x, s, z), or the codes of the DynamicQuantizeLinear that made s and z"""
    b, scale = Builder(op, choice), op.operand(1)
    maker = None if scale is None else scale.owner
    if (
        maker is not None
        and maker.name == DYNAMIC
        and maker.operand(0) is b.at(0)
        and op.operand(2) is maker.results[2]
    ):
        return maker.results[0]
    return quantize_node(b, b.at(0), b.at(1), b.zero(2, op.attrs["scheme"]))


def dequantize(op: Op, choice: Choice) -> Value:
    """q.dequantize(c, s, z?)  ->  DequantizeLinear(c, s, z?)"""
    b = Builder(op, choice)
    name = _named(b, "DequantizeLinear")
    attrs = {"axis": 0} if name.startswith("com.") else {}
    return b.node(name, [b.at(0), b.at(1), op.operand(2)], attrs).result


def choose_qparams(op: Op, choice: Choice) -> Sequence[Value]:
    """q.choose_qparams(x)  ->  the scale and the zero point of DynamicQuantizeLinear(x)"""
    b = Builder(op, choice)
    return dynamic_codes(b, b.at(0))[1:]


def scale(op: Op, choice: Choice) -> Value:
    """q.scale(x, s)  ->  Mul(x, s)"""
    b = Builder(op, choice)
    return b.node("onnx.Mul", [b.at(0), b.at(1)]).result


_ATTRS = {
    "Concat": ("axis",),
    "AveragePool": ("kernel_shape", "strides", "pads", "auto_pad", "ceil_mode", "count_include_pad"),
    "LeakyRelu": ("alpha",),
    "Softmax": ("axis",),
}
"""What the kernels of a ``q.apply`` read of the host op's attributes."""


def apply(op: Op, choice: Choice) -> Value:
    """q.apply(c, s, z?, .., ys, yz?) {fn}  ->  com.microsoft.QLinear<fn>"""
    b, fn, count = Builder(op, choice), str(op.attrs["fn"]), apply_arity(op)
    given = [v for i in range(count) for v in (b.at(3 * i), b.at(3 * i + 1), b.zero(3 * i + 2, op.attrs["x_scheme"]))]
    result = [b.at(3 * count), b.zero(3 * count + 1, op.attrs["y_scheme"])]
    attrs = {key: op.attrs[key] for key in _ATTRS.get(fn, ()) if key in op.attrs}
    if fn == "Softmax":
        axis = attrs.get("axis", -1)
        if axis not in (-1, (given[0].tensor.rank or 0) - 1):
            raise InputError(f"q.apply '{b.label}': QLinearSoftmax saturates along the last axis only, not {axis}")
        attrs = {"axis": -1, "opset": max(opset_of_graph(op.graph), 13)}
    operands = [*result, *given] if fn == "Concat" else [*given, *result]
    return b.node(f"com.microsoft.QLinear{fn}", operands, attrs).result
