"""What a ``q.*`` op asks of a kernel, as data for the rows of :mod:`qcompiler.target`.

The traits are what only some kernels do. A row serves a request only when it has all of the request's traits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.dtypes import F32, INT8, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, Value
from qcompiler.scheme import Scheme
from qcompiler.target import Request

BATCHED = "more than two axes"
LEFT = "a constant left-hand operand"
SIGNED_RIGHT = "an int8 activation on the right"
MANY_AXES = "more than three spatial axes"
DILATED = "a dilated pool"
NOT_LAST = "softmax over another axis than the last"
SHORT = "softmax over an axis that may be shorter than 1 / (148 y scale)"
PADDED_CEIL = "ceil_mode with padding that counts"
SHARED = "an activation that other ops quantize too"

_BIAS = {"q.linear": 4, "q.linear_static": 6, "q.linear_dyn": 4, "q.conv": 6, "q.conv_dyn": 4}
_CODES = {"q.linear": 1, "q.embedding": 1, "q.linear_static": 3, "q.linear_dyn": 1, "q.conv": 3, "q.conv_dyn": 1}
"""Where the codes of a weight stand."""

REQUESTABLE = frozenset(_CODES) | {"q.matmul", "q.apply", "q.scale", "q.quantize", "q.dequantize", "q.choose_qparams"}
"""Ops that some kernel row serves."""
_QUANTIZERS = frozenset({"q.linear_dyn", "q.conv_dyn", "q.choose_qparams", "onnx.DynamicQuantizeLinear"})
"""Ops that choose the parameters of their operand 0 at run time."""


def opset_of_graph(graph: Graph) -> int:
    """The version of the default domain that an ONNX graph imports; 0 where it says none."""
    return int(dict(graph.root.meta.get("opset_import", ())).get("", 0))


def request_of(op: Op) -> Request:
    """The request that a fused op makes of a kernel."""
    return request_for(op.name, op.operands, op.attrs)


def request_for(name: str, operands: Sequence[Value | None], attrs: Mapping[str, Any]) -> Request:
    """The request that an op called ``name`` would make with these operands and attributes.

    ``name`` is one of :data:`REQUESTABLE`; raises InputError for another. Only types, shapes and whether a value is
    constant are looked at.
    """
    if name not in REQUESTABLE:
        raise InputError(f"no kernel row is asked for {name}; rows serve {', '.join(sorted(REQUESTABLE))}")
    given = next((v.graph for v in operands if v is not None), None)
    opset = 0 if given is None else opset_of_graph(given)
    if name == "q.matmul":
        return _matmul(operands, attrs, opset)
    if name == "q.apply":
        return _apply(operands, attrs, opset)
    if name not in _CODES:
        scheme = attrs.get("scheme") or Scheme(INT8)
        place = 1 if name == "q.dequantize" else 0
        return Request(name, scheme, 1, 1, _element(_at(operands, place)), opset=opset)
    codes, bias = _at(operands, _CODES[name]), _at(operands, _BIAS.get(name))
    shape = (None if codes is None else codes.tensor.static_shape) or (0, 0)
    traits = set()
    x = _at(operands, 0)
    if name in ("q.linear_static", "q.linear_dyn") and (x is None or x.tensor.rank != 2):
        traits.add(BATCHED)
    if name == "q.linear_dyn" and x is not None and sum(u.name in _QUANTIZERS for u in x.users) > 1:
        traits.add(SHARED)
    if name in ("q.conv", "q.conv_dyn") and len(shape) > 5:
        traits.add(MANY_AXES)
    return Request(
        name,
        attrs["scheme"],
        shape[0],
        math.prod(shape[1:]),
        _activation(name, operands),
        bias is not None,
        attrs.get("x_scheme"),
        attrs.get("y_scheme"),
        traits=frozenset(traits),
        opset=opset,
    )


def _at(operands: Sequence[Value | None], index: int | None) -> Value | None:
    return operands[index] if index is not None and index < len(operands) else None


def _element(value: Value | None) -> DType:
    """The type of a float value; f32 where unknown."""
    return (None if value is None else value.tensor.dtype) or F32


def _activation(name: str, operands: Sequence[Value | None]) -> DType:
    """The float type that an op computes in: of its activation, or of the scale that codes are dequantized with."""
    if name == "q.embedding":
        return _element(_at(operands, 2))
    return _element(_at(operands, 0 if name in ("q.linear", "q.linear_dyn", "q.conv_dyn") else 1))


def _matmul(operands: Sequence[Value | None], attrs: Mapping[str, Any], opset: int) -> Request:
    a, b = _at(operands, 0), _at(operands, 3)
    left: Scheme = attrs["a_scheme"]
    right: Scheme = attrs["b_scheme"]
    shape = () if b is None or b.tensor.shape is None else b.tensor.shape
    n, k = (d if isinstance(d, int) else 1 for d in ((1, 1, *shape)[-1], (1, 1, *shape)[-2]))
    traits = set()
    if a is not None and a.is_const:
        traits.add(LEFT)
    if right.dtype.signed and not (b is not None and b.is_const):
        traits.add(SIGNED_RIGHT)
    activation = _element(_at(operands, 1))
    return Request(
        "q.matmul", right, n, k, activation, x=left, y=attrs.get("y_scheme"), traits=frozenset(traits), opset=opset
    )


def _apply(operands: Sequence[Value | None], attrs: Mapping[str, Any], opset: int) -> Request:
    fn, scheme = str(attrs["fn"]), attrs["x_scheme"]
    x = _at(operands, 0)
    rank = None if x is None else x.tensor.rank
    traits = set()
    if fn == "Softmax":
        axis = attrs.get("axis", -1 if not 0 < opset < 13 else 1)
        if axis != -1 and (rank is None or axis != rank - 1):
            traits.add(NOT_LAST)
        if _short(x, _at(operands, 3)):
            traits.add(SHORT)
    if fn == "AveragePool":
        if any(d != 1 for d in attrs.get("dilations") or ()):
            traits.add(DILATED)
        padded = any(attrs.get("pads") or ()) or str(attrs.get("auto_pad", "")).startswith("SAME")
        if attrs.get("ceil_mode", 0) and attrs.get("count_include_pad", 0) and padded:
            traits.add(PADDED_CEIL)
    if fn.endswith("Pool") and rank is not None and rank > 5:
        traits.add(MANY_AXES)
    y = attrs["y_scheme"]
    return Request(
        "q.apply", scheme, 1, 1, _element(_at(operands, 1)), x=scheme, y=y, fn=fn, traits=frozenset(traits), opset=opset
    )


def _short(x: Value | None, scale: Value | None) -> bool:
    """The last axis of ``x`` may have fewer elements than the integer softmax needs for codes in steps of ``scale``.

    Measured on ONNX Runtime 1.31: with less than ``1 / (e^5 y scale)`` elements its products overflow 32 bits.
    """
    last = None if x is None or not x.tensor.shape else x.tensor.shape[-1]
    payload = None if scale is None or not scale.is_const else scale.payload
    if not isinstance(last, int) or payload is None or payload.size != 1:
        return True
    return float(payload.array().reshape(-1)[0]) * 148 * last < 1
