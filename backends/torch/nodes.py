"""What torch's low-bit calls hold: which argument is the codes, their scheme, their sizes, in any aten graph.

``low_bit`` reads an op as such a call; it never raises, whatever arguments the program gives. Layouts as in
:mod:`qcompiler.backends.torch.layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qcompiler import dtypes
from qcompiler.backends.torch.held import INT4, INT8, LowBit, argument, computing, count, value_at
from qcompiler.backends.torch.nodes_triton import SLOTS, triton_call
from qcompiler.dtypes import DType
from qcompiler.errors import RecipeError
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ComputedPayload
from qcompiler.scheme import Scheme
from qcompiler.verify.flow import is_constant, source_of
from qcompiler.verify.op_kinds import CASTS, LOOKUPS, MOVES, is_arithmetic, is_dequantize, is_product, is_quantize

OURS = "qcompiler."
CANARY = "qcompiler_int4_canary"
"""The module whose constants are those of :mod:`qcompiler.backends.torch.canary`, whose product is no layer."""
UNKNOWN_CODES = 1024
"""Elements from which an 8-bit constant of an op that nobody knows is taken for a weight."""


@dataclass(frozen=True)
class Places:
    """Positions in the call of a low-bit op: activation, codes, their scales and zeros. None where there is none."""

    kind: str
    x: int
    codes: int
    scales: int | None = None
    zeros: int | None = None
    group: int | None = None
    turned: bool = False
    """The codes are ``[K, N]``."""
    halves: bool = False
    """Two codes a byte, along K."""


_ONEDNN = Places("linear", 0, 3, 4, 5, turned=True)
_ONEDNN_CONV = Places("conv", 0, 3, 4, 5)
PLACES: dict[str, Places] = {
    INT4: Places("linear", 0, 1, 3, None, 2, halves=True),
    "aten._weight_int4pack_mm": Places("linear", 0, 1, 3, None, 2),
    "aten._weight_int4pack_mm_with_scales_and_zeros": Places("linear", 0, 1, 3, 4, 2),
    "quantized.int4mm_packed_weight_cpu": Places("linear", 0, 1, 3, halves=True),
    INT8: Places("linear", 0, 1, 2),
    "aten._dyn_quant_matmul_4bit": Places("linear", 0, 1, None, None, 2),
    "aten._int_mm": Places("linear", 0, 1, turned=True),
    "aten._scaled_mm": Places("linear", 0, 1, 3, turned=True),
    "aten._scaled_mm_v2": Places("linear", 0, 1, 5, turned=True),
    "onednn.qlinear_pointwise": _ONEDNN,
    "onednn.qconv_pointwise": _ONEDNN_CONV,
    "onednn.qconv1d_pointwise": _ONEDNN_CONV,
    "onednn.qconv2d_pointwise": _ONEDNN_CONV,
    "onednn.qconv3d_pointwise": _ONEDNN_CONV,
    "qcompiler.qlinear": Places("linear", 0, 3, 4),
    "qcompiler.qconv": Places("conv", 0, 3, 4),
}
"""Every operator that keeps a weight in few bits, without its overload."""

BOTH_SIDES = frozenset({"aten._int_mm", "aten._scaled_mm", "aten._scaled_mm_v2"})
"""Products of codes, of which neither side need be a weight."""


def low_bit_nodes(graph: Graph) -> Iterator[LowBit]:
    """Every low-bit call of ``graph`` and its regions."""
    for op in graph.walk():
        found = low_bit(op)
        if found is not None:
            yield found


def low_bit(op: Op) -> LowBit | None:
    """``op`` as a low-bit call; None for anything else."""
    if not op.results:
        return None
    call = op.name.rpartition(".")[0]
    places = PLACES.get(call)
    if any(v is not None and v.is_const and v.name.startswith(f"{CANARY}.") for v in op.operands):
        return None
    if places is not None:
        return _placed(op, call, places)
    if call.startswith(OURS):
        return triton_call(op, call) if call in SLOTS else None
    if op.name in LOOKUPS:
        return _table(op)
    return _unknown(op)


# -- calls of PLACES -----------------------------------------------------------------------------------------------


def _placed(op: Op, call: str, places: Places) -> LowBit:
    x, codes = value_at(op, places.x), value_at(op, places.codes)
    rows, columns = _sizes(op, codes, places)
    n, k = _cut(op, rows), _unpadded(x, columns)
    scales, zeros = value_at(op, places.scales), value_at(op, places.zeros)
    scheme = _scheme_of(op, call, codes, scales, places)
    plain = codes
    if codes is not None and places.turned:
        plain = source_of(codes)[0]
    kind = places.kind
    if call in BOTH_SIDES and plain is not None and plain.payload is None and not is_constant(plain):
        kind = "matmul"
    return LowBit(op, kind, x, plain, scales, zeros, n, k, rows, columns, scheme)


def _sizes(op: Op, codes: Value | None, places: Places) -> tuple[int, int]:
    shape = None if codes is None else codes.tensor.static_shape
    if op.name.startswith("aten._dyn_quant_matmul_4bit"):
        k, n = argument(op, 3), argument(op, 4)
        return (n, k) if isinstance(n, int) and isinstance(k, int) else (0, 0)
    if not shape or len(shape) < 2:
        return 0, 0
    rows, columns = shape[0], math.prod(shape[1:])
    if places.turned:
        rows, columns = columns, rows
    return rows, columns * (2 if places.halves else 1)


def _scheme_of(op: Op, call: str, codes: Value | None, scales: Value | None, places: Places) -> Scheme | None:
    """What can be told of the scheme without reading weights that are not written yet."""
    group = argument(op, places.group) if places.group is not None else None
    if places.halves or call.startswith(("aten._weight_int4pack", "aten._dyn_quant")):
        return _scheme(dtypes.INT4, group, _centred(scales)) if isinstance(group, int) else None
    element = None if codes is None else codes.tensor.dtype
    if element is None or not (element == dtypes.INT8 or element.is_float):
        return None
    several = scales is not None and math.prod(scales.tensor.static_shape or (2,)) > 1
    return _scheme(element, "channel" if several or call == INT8 else "tensor", True)


def _scheme(element: DType, how: int | str, symmetric: bool) -> Scheme | None:
    """A scheme of groups of ``how``, or of that granularity; None for a group that no scheme has."""
    try:
        if isinstance(how, int):
            return Scheme(element, "group", symmetric, (how,))
        return Scheme(element, "channel" if how == "channel" else "tensor", symmetric)
    except RecipeError:
        return None


def _centred(both: Value | None) -> bool:
    """Whether the offsets beside the scales are all 0; False where that would have to be computed."""
    payload = None if both is None else both.payload
    if payload is None or isinstance(payload, ComputedPayload) or len(payload.shape) != 3:
        return False
    return not payload.array()[..., 1].any()


def _cut(op: Op, rows: int) -> int:
    """The columns of the result that are used: all users cut the padding off."""
    ends = set()
    for user in computing(op.results[0]):
        cut = argument(user, 1) in (1, -1) and argument(user, 2) in (0, None)
        ends.add(argument(user, 3) if user.name == "aten.slice.Tensor" and cut else None)
    end = ends.pop() if len(ends) == 1 else None
    return end if isinstance(end, int) and 0 < end < rows else rows


def _unpadded(x: Value | None, columns: int) -> int:
    """The length of the activation's rows before they were padded with zeros."""
    while x is not None and x.owner is not None:
        op = x.owner
        if op.name == "aten.constant_pad_nd.default":
            inner = op.operand(0)
            last = inner.tensor.shape[-1] if inner is not None and inner.tensor.shape else None
            return last if isinstance(last, int) else columns
        if op.name not in CASTS and op.name != "aten.contiguous.default":
            break
        x = op.operand(0)
    return columns


# -- tables --------------------------------------------------------------------------------------------------------


def _table(op: Op) -> LowBit | None:
    """A lookup by run-time indices in constant codes, of which floats are made behind it."""
    table = op.operand(0)
    shape = None if table is None else table.tensor.static_shape
    element = None if table is None else table.tensor.dtype
    index = op.operand(1)
    if table is None or element is None or shape is None or len(shape) != 2 or index is None:
        return None
    if element.bits > 8 or element.kind == "bool" or not is_constant(table):
        return None
    scales, zeros, halves, floats = _parameters_behind(op)
    if not floats:
        return None
    rows, columns = shape[0], shape[1] * (2 if halves else 1)
    code = dtypes.INT4 if halves and not (zeros is not None and zeros.tensor.dtype == dtypes.UINT8) else element
    code = dtypes.UINT4 if halves and code == dtypes.UINT8 else code
    per_row = 1 if scales is None else count(scales) // rows
    how: int | str = "channel" if per_row == 1 else columns // per_row if per_row else "tensor"
    scheme = _scheme(code, how, zeros is None) if code.is_integer and (code.signed or zeros is not None) else None
    source = source_of(table)[0]
    return LowBit(op, "embedding", None, source, scales, zeros, rows, columns, rows, columns, scheme)


def _parameters_behind(op: Op) -> tuple[Value | None, Value | None, bool, bool]:
    """Scales and zeros that the looked-up codes meet, whether they are halves of bytes, whether floats come of them."""
    scales = zeros = None
    halves = floats = False
    work, seen = [op.results[0]], {op.results[0]}
    while work and len(seen) < 32:
        value = work.pop()
        for user in value.users:
            if not user.results or user.results[0] in seen or is_product(user):
                continue
            base = user.name.split(".")[1] if "." in user.name else ""
            result = user.results[0]
            if is_dequantize(user):
                others = [v for v in user.operands if v is not None and v is not value]
                return next(iter(others), None), None, halves, True
            if user.name not in MOVES and not is_arithmetic(user):
                continue
            halves |= base in ("__rshift__", "bitwise_right_shift") and result.tensor.dtype == value.tensor.dtype
            element = result.tensor.dtype
            floats |= element is not None and element.is_float
            other = next((v for v in user.operands if v is not None and v is not value), None)
            found = None if other is None else source_of(other)[0]
            if is_arithmetic(user) and found is not None and found.is_const and floats:
                if base in ("mul", "mul_", "div", "div_"):
                    return found, zeros, halves, True
                if base in ("sub", "sub_"):
                    zeros = found
            seen.add(result)
            work.append(result)
    return scales, zeros, halves, floats


# -- others --------------------------------------------------------------------------------------------------------


def _unknown(op: Op) -> LowBit | None:
    """An operator of another library that reads constant codes of a matrix and gives floats."""
    namespace = op.name.partition(".")[0]
    element = op.results[0].tensor.dtype
    if namespace in ("aten", "prims", "py", "q", "higher_order", "export") or element is None or not element.is_float:
        return None
    if is_dequantize(op) or is_quantize(op) or op.name in MOVES or op.regions:
        return None
    for value in op.operands:
        source = None if value is None else source_of(value)[0]
        shape = None if source is None else source.tensor.static_shape
        kind = None if source is None else source.tensor.dtype
        if source is None or kind is None or shape is None or source.payload is None:
            continue
        if kind.bits <= 8 and kind.kind != "bool" and len(shape) >= 2 and math.prod(shape) >= UNKNOWN_CODES:
            n, k = shape[0], math.prod(shape[1:])
            return LowBit(op, "linear", op.operand(0), source, None, None, n, k, n, k, None, known=False)
    return None
