"""A dequantize without its name: low-bit codes that are cast, shifted, looked up in a codebook, scaled.

Every spelling has a *root*, the op that makes floats of integers: a cast, arithmetic of integers with floats, a lookup
whose indices are codes. In front of it there may be integer arithmetic (unpacking, a zero point), behind it scales.
"""

from __future__ import annotations

from qcompiler.ir import Op, Value
from qcompiler.verify.flow import Reached, count, is_constant, source_of
from qcompiler.verify.op_kinds import CASTS, LOOKUPS, MOVES, is_arithmetic, is_factor, is_product, takes_codes_out

STEPS = 64
"""How many ops back the codes behind a value are looked for."""
CODEBOOK = 1 << 20
"""Elements of the largest table that is a codebook: 65536 vectors of 16."""
LEVELS = 256
"""Entries of the largest table of numbers whose constant indices are codes, however wide they are stored."""


def root_codes(op: Op) -> Value | None:
    """The constant codes of which ``op`` makes floats, as a cast, by arithmetic or by a lookup; None otherwise."""
    result = op.results[0].tensor.dtype
    if op.name in CASTS:
        codes = op.operand(0)
        known = None if codes is None else codes.tensor.dtype
        widened = known is not None and known.is_float and known.bits > 8  # a cast of what is float already
        if codes is None or widened or (result is not None and not result.is_float):
            return None
        return low_bit_source(codes)
    if op.name in LOOKUPS:
        return _codebook(op)
    if is_arithmetic(op) and result is not None and result.is_float:
        size = count(op.results[0])  # what is smaller is a zero point
        found = (low_bit_source(v) for v in op.operands if v is not None and _is_integer(v) and count(v) == size)
        return next((v for v in found if v is not None), None)
    return None


def _is_integer(value: Value) -> bool:
    return value.tensor.dtype is not None and value.tensor.dtype.is_integer


def _codebook(op: Op) -> Value | None:
    """The codes in ``table[codes]``: of few bits, or constants that look into a short list of numbers."""
    table, index = op.operand(0), op.operands[-1]
    element = None if table is None else table.tensor.dtype
    if table is None or index is None or element is None or not element.is_float or not is_constant(table):
        return None
    if not 0 < count(table) <= CODEBOOK:
        return None
    source = low_bit_source(index)
    if source is not None:
        return source
    plain, looked_up = source_of(index)
    short = table.tensor.rank == 1 and count(table) <= LEVELS < count(plain)
    return plain if short and plain.is_const and not looked_up else None


def low_bit_source(value: Value) -> Value | None:
    """The constant of at most 8 bits an element behind data movement and integer arithmetic, if there is one.

    Wider integers count where codes are taken out of them by shifts and masks.
    """
    unpacked = False
    for _ in range(STEPS):
        value, looked_up = source_of(value)
        element = value.tensor.dtype
        if looked_up:
            return None
        if value.payload is not None and element is not None:
            narrow = element.bits <= 8 and (element.is_integer or element.is_float)
            return value if narrow or (unpacked and element.is_integer) else None
        op = value.owner
        if op is None or not is_arithmetic(op):
            return None
        unpacked = unpacked or takes_codes_out(op)
        following = next((v for v in op.operands if v is not None and not _small(v) and not _is_bool(v)), None)
        if following is None:
            return None
        value = following
    return None


def _small(value: Value) -> bool:
    return 0 < count(value) <= 8 and value.is_const


def _is_bool(value: Value) -> bool:
    return value.tensor.dtype is not None and value.tensor.dtype.kind == "bool"


def spread(root: Op) -> tuple[bool, list[Reached]]:
    """Follow the result of ``root`` through arithmetic with scales: whether all of that was constant, the products (and
    lookups) that it reaches."""
    constant, out = True, []
    work: list[tuple[Value, tuple[Op, ...]]] = [(root.results[0], (root,))]
    seen = {root.results[0]}
    while work:
        value, path = work.pop()
        for use in value.uses:
            op = use.user
            if not isinstance(op, Op):
                continue
            if is_product(op):
                if is_factor(op, use.slot):
                    out.append(Reached(op, use.slot, path))
            elif op.name in LOOKUPS and op.operand(0) is value:
                out.append(Reached(op, use.slot, path))
            elif (op.name in MOVES or _scales(op, value)) and op.results and op.results[0] not in seen:
                constant = constant and all(v is None or v is value or is_constant(v) for v in op.operands)
                seen.add(op.results[0])
                work.append((op.results[0], (*path, op)))
    return constant, out


def _scales(op: Op, value: Value) -> bool:
    """Arithmetic of ``value`` with constants or with something a quarter of its size or less: a scale.

    A matrix may also meet a tensor of unknown shape: activations are not what constants are multiplied with.
    """
    others = [v for v in op.operands if v is not None and v is not value]
    free = (value.tensor.rank or 9) <= 2
    return is_arithmetic(op) and all(
        is_constant(v) or (free if v.tensor.static_shape is None else count(v) * 4 <= count(value)) for v in others
    )
