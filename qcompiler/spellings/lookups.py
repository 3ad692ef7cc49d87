"""Tables of codes that are looked up before they are scaled: rows of codes and of scales, gathered by the same ids."""

from __future__ import annotations

from qcompiler.dtypes import F32, TABLE
from qcompiler.ir import Hole, Op, TensorType, Value
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.arithmetic import CASTS
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.parts import constant_codes, dequantized, parameters, reshaped
from qcompiler.views import call_args

LOOKUPS = ("aten.embedding.default", "aten.index.Tensor", "aten.index_select.default")


@rule("aten.mul.Tensor")
def lift_late_scale(op: Op, rw: Rewriter) -> Value:
    """mul(cast(embedding(c, i)), embedding(s, i))  ->  embedding(q.dequantize(c, s), i)   for a table of codes"""
    for codes, scale in (op.operands[:2], op.operands[1::-1]):
        rows, factors = _lookup(_before_cast(codes)), _lookup(scale)
        if rows is None or factors is None or rows[1] is not factors[1]:
            continue
        table, element = settle(rw, rows[0]), rows[0].tensor.dtype
        shape = table.tensor.static_shape if table.payload is not None else None
        if element is None or not element.is_integer or element.bits > 8 or shape is None or len(shape) != 2:
            continue
        scales = settle(rw, factors[0])
        if scales.tensor.static_shape not in ((shape[0], 1), (shape[0],)):
            raise rw.declined("its scales are not one a row of the table", code="QC202")
        table, scales = constant_codes(rw, table), reshaped(rw, constant_codes(rw, scales, "scales"), (shape[0],))
        p = parameters(rw, table, TABLE[element.name], scales, None, axis=0)
        made = dequantized(rw, table, p, op.result.tensor.dtype or F32)
        kind = TensorType(op.result.tensor.dtype, op.result.tensor.shape)
        return rw.op("aten.embedding.default", made, rows[1], type=kind, args=(Hole(0), Hole(1)))
    raise rw.declined("it scales no looked up codes", quiet=True)


def _before_cast(value: Value | None) -> Value | None:
    op = None if value is None else value.owner
    return op.operand(0) if op is not None and op.name in CASTS else None


def _lookup(value: Value | None) -> tuple[Value, Value] | None:
    """The table and the ids of a lookup of rows."""
    op = None if value is None else value.owner
    if op is None or op.name not in LOOKUPS:
        return None
    args = call_args(op)
    ids = args[2] if op.name == "aten.index_select.default" else args[1]
    if op.name == "aten.index_select.default" and args[1] != 0:
        return None
    ids = ids[0] if isinstance(ids, list) and len(ids) == 1 else ids
    table = args[0]
    return (table, ids) if isinstance(table, Value) and isinstance(ids, Value) else None


RULES = (lift_late_scale,)
