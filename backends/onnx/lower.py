"""Entry points: a ``q.linear`` or ``q.embedding`` written as the ONNX Runtime node of the kernel that was chosen.

Each takes ``(op, choice)``, inserts the host ops before ``op`` and returns the value that stands for its result. The
node that runs the kernel is called exactly like the site. Weights go to the kernel's layout as recorded computations:
nothing is read before the artifact is written, then codes, scales and zeros in that order.

One stored copy of a tied table serves both kernels: ``MatMulNBits`` wants blocks, and ``GatherBlockQuantized`` reads
the same bytes as a rank-3 table whose rows it gives back block by block, which a Reshape joins. Measured: neither
expands the table. The two want their scales in different ranks, so those small tensors are stored once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompiler.backends.onnx import layouts
from qcompiler.backends.onnx.kernels import CPU_ROWS, CUDA_ROWS, accuracy_level
from qcompiler.dtypes import INT32, INT64, UINT8, Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Dim, Loc, Op, TensorType, Type, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.scheme import Scheme
from qcompiler.target import Choice, KernelRow

LAYOUTS = "ort.layouts"
"""Key in the ``meta`` of a canonical constant with several readers: what was derived from it, as
``((block, *shape), name)``, so that the next reader takes the same stored constant."""


@dataclass(frozen=True)
class _Weight:
    """The constants of one q op, canonical."""

    op: Op
    codes: Value
    scale: Value
    zero: Value | None
    scheme: Scheme
    n: int
    k: int

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def site(self) -> str:
        return str(self.op.attrs["site"])

    def blocks_a_group(self, block: int) -> int:
        """How many blocks one scale spans."""
        return (self.scheme.group_size or block) // block

    @property
    def explicit_zeros(self) -> bool:
        """The kernels take the middle code for zero where none is given; unsigned symmetric codes mean 0."""
        return self.zero is not None or not self.scheme.dtype.signed


def block_size(scheme: Scheme, k: int, allowed: frozenset[int]) -> int:
    """The kernel's block for a row of ``k``: the group, or a part of it where that takes fewer bytes.

    A scale that spans several blocks is repeated, which loses nothing. So the rows of channel and tensor schemes, and
    rows shorter than their group or with a short last one, get the block of the fewest bytes, padding counted. Blocks
    over 128 are not considered for channel and tensor: kernels with int8 activations quantize those a block at a time,
    and the larger the block, the more an outlier costs its neighbours.
    """
    largest = scheme.group_size or 128
    sizes = sorted((b for b in allowed if b <= largest), reverse=True)
    return min(sizes, key=lambda b: layouts.block_count(k, b) * (b * scheme.bits + 32 + scheme.bits))


def _weight(op: Op) -> _Weight:
    """The constants of ``op``; raises InputError for one that is not constant or of the wrong type."""
    codes, scale, zero = op.operand(1), op.operand(2), op.operand(3)
    for what, value in (("codes", codes), ("scale", scale), ("zero point", zero)):
        if value is not None and (not value.is_const or value.payload is None):
            raise InputError(
                f"{op.name} '{op.attrs['site']}': the {what} {value!r} is no constant, and ONNX Runtime's kernel "
                "would expand the weight or compute wrong numbers; fold the constants first"
            )
    if codes is None or scale is None or codes.payload is None or len(codes.payload.shape) != 2:
        raise InputError(f"{op.name} '{op.attrs['site']}': codes [N, K] and scales are needed")
    n, k = codes.payload.shape
    return _Weight(op, codes, scale, zero, op.attrs["scheme"], n, k)


def _payload(value: Value) -> Payload:
    assert value.payload is not None
    return value.payload


def _const(w: _Weight, suffix: str, payload: Payload) -> Value:
    """``payload`` as the constant ``<site>.<suffix>``, beside the canonical codes."""
    return w.codes.graph.add_const(w.op.graph.fresh(f"{w.site}.{suffix}"), payload)


def _derived(
    w: _Weight, suffix: str, source: Value, block: int, fn: Callable[[Array], Array], t: DType, *shape: int
) -> Value:
    """``fn`` of a canonical constant, not computed yet; the constant that was derived in the same way, if there is one.

    ``block`` and ``shape`` say in which way.
    """
    key = (block, *shape)
    known = source.meta.get(LAYOUTS, ())
    for found in (w.op.graph.lookup(name) for k, name in known if k == key):
        if found is not None and found.is_const:
            return found
    made = _const(w, suffix, computed(suffix, lambda p: fn(p.array()), [_payload(source)], t, shape))
    if len(source.users) > 1:
        source.meta[LAYOUTS] = (*known, (key, made.name))
    return made


def _scales(w: _Weight, block: int, *rank: int) -> Value:
    """Scales ``[N, blocks, *rank]``."""
    count, each = layouts.block_count(w.k, block), w.blocks_a_group(block)

    def fn(s: Array) -> Array:
        return layouts.spread(s, w.n, count, each).reshape(w.n, count, *rank)

    assert w.scale.tensor.dtype is not None
    return _derived(w, "weight_scales", w.scale, block, fn, w.scale.tensor.dtype, w.n, count, *rank)


def _zeros(w: _Weight, block: int, write: Callable[[Array, int], Array], *shape: int) -> Value | None:
    """Zero points by ``write``; None where the kernel's own default, the middle code, is meant."""
    if not w.explicit_zeros:
        return None
    count, each = layouts.block_count(w.k, block), w.blocks_a_group(block)
    if w.zero is None:
        return _const(w, "weight_zeros", computed("weight_zeros", lambda: np.zeros(shape, np.uint8), [], UINT8, shape))

    def fn(z: Array) -> Array:
        return write(layouts.spread(z, w.n, count, each), w.bits)

    return _derived(w, "weight_zeros", w.zero, block, fn, UINT8, *shape)


def _blocks(w: _Weight, block: int) -> Value:
    """The codes in blocks ``[N, blocks, bytes of a block]``."""
    count, blob = layouts.block_count(w.k, block), block * w.bits // 8

    def fn(codes: Array) -> Array:
        return layouts.blocks(codes, w.bits, block)

    return _derived(w, f"weight_q{w.bits}", w.codes, block, fn, UINT8, w.n, count, blob)


def _row(op: Op, choice: Choice) -> KernelRow:
    """The one kernel that a single node can be; raises InputError when the phases ask for several."""
    levels = {accuracy_level(row) for _, row in choice.rows}
    if len(levels) > 1:
        names = ", ".join(f"{row.name} ({phase.name})" for phase, row in choice.rows)
        raise InputError(f"{op.name} '{op.attrs['site']}': one node cannot be {names}; force one kernel")
    return choice.row


def matmul_nbits(op: Op, choice: Choice) -> Value:
    """q.linear(x, codes, s, z?, bias?)  ->  com.microsoft.MatMulNBits(x, blocks, scales, zeros?, none, bias?)

    ``x`` may have any rank from 1. Raises InputError for weights that are no constants and for a scale or bias whose
    type is not the activation's.
    """
    w, row = _weight(op), _row(op, choice)
    x, bias = op.operand(0), op.operand(4)
    assert x is not None
    for what, value in (("scale", w.scale), ("bias", bias)):
        if value is not None and None not in (x.tensor.dtype, value.tensor.dtype):
            if value.tensor.dtype != x.tensor.dtype:
                raise InputError(
                    f"q.linear '{w.site}': MatMulNBits takes a {what} of the activation's type {x.tensor.dtype}, "
                    f"not {value.tensor.dtype}; cast it"
                )
    block = block_size(w.scheme, w.k, row.groups)
    count = layouts.block_count(w.k, block)
    codes, scales = _blocks(w, block), _scales(w, block)
    zeros = _zeros(w, block, layouts.pack_zeros, w.n, -(-count * w.bits // 8))
    operands: list[Value | None] = [x, codes, scales, zeros, None, bias]
    while operands[-1] is None:
        operands.pop()
    attrs = {"K": w.k, "N": w.n, "bits": w.bits, "block_size": block, "accuracy_level": accuracy_level(row)}
    return _host(w, "com.microsoft.MatMulNBits", w.site, operands, attrs, op.result.type)


def gather_block_quantized(op: Op, choice: Choice) -> Value:
    """q.embedding(i, codes, s, z?)  ->  com.microsoft.GatherBlockQuantized(table, i, scales, zeros?)

    A tied table is read in the blocks of its other kernel, followed by a Reshape, and by a Slice where the last block
    is padded. A row whose codes do not fill whole bytes is followed by a Slice. Raises InputError for weights that are
    no constants and for indices that are neither int32 nor int64.
    """
    w, indices = _weight(op), op.operand(0)
    assert indices is not None
    if indices.tensor.dtype not in (None, INT32, INT64):
        raise InputError(
            f"q.embedding '{w.site}': GatherBlockQuantized takes int32 or int64 indices, not {indices.tensor.dtype}"
        )
    lead, block = indices.tensor.shape, _tied_block(w, choice.row)
    if lead is None or block is None:
        value, columns = _gather_rows(w, indices, _row_block(w, choice.row))
    else:
        value, columns = _gather_blocks(w, indices, lead, block)
    return value if columns == w.k else _cut(w, value, lead)


def _tied_block(w: _Weight, row: KernelRow) -> int | None:
    """The block in which a linear layer reads the same codes; None for a table that is not tied.

    Where that layer is not lowered yet, the first kernel of the same runtime that takes such codes is what it will get.
    """
    for (block, *shape), _ in w.codes.meta.get(LAYOUTS, ()):
        if len(shape) == 3:
            return int(block)
    if any(u.name == "q.linear" for u in w.codes.users):
        rows = CUDA_ROWS if row in CUDA_ROWS else CPU_ROWS
        taken = [r.groups for r in rows if r.op == "q.linear" and w.scheme.dtype.name in r.codes]
        return block_size(w.scheme, w.k, taken[0])
    return None


def _row_block(w: _Weight, row: KernelRow) -> int:
    """The group; for channel and tensor the smallest block that spans the row, else the largest there is."""
    return w.scheme.group_size or min((g for g in row.groups if g >= w.k), default=max(row.groups))


def _gather_rows(w: _Weight, indices: Value, block: int) -> tuple[Value, int]:
    """Lookup in a table ``[V, bytes of a row]``, and how many columns it gives: as many as the bytes have codes."""
    count, width = layouts.block_count(w.k, block), -(-w.k * w.bits // 8)
    columns = width * 8 // w.bits

    def fn(codes: Array) -> Array:
        return layouts.rows(codes, w.bits)

    table = _derived(w, f"weight_q{w.bits}", w.codes, 0, fn, UINT8, w.n, width)
    scales = _scales(w, block)
    zeros = _zeros(w, block, layouts.pack_zeros, w.n, -(-count * w.bits // 8))
    return _gather(w, [table, indices, scales, zeros], block, 1, (columns,)), columns


def _gather_blocks(w: _Weight, indices: Value, lead: tuple[Dim, ...], block: int) -> tuple[Value, int]:
    """Lookup in a table ``[V, blocks, bytes of a block]``, joined to rows, and how many columns they have."""
    count = layouts.block_count(w.k, block)
    table, scales = _blocks(w, block), _scales(w, block, 1)
    zeros = _zeros(w, block, layouts.byte_zeros, w.n, count, 1)
    found = _gather(w, [table, indices, scales, zeros], block, 2, (count, block))
    if found.owner is not None:
        found.owner.meta["shares"] = table.name
    shape = _const(w, "row", constant([0] * len(lead) + [count * block], INT64))
    type = TensorType(found.tensor.dtype, (*lead, count * block))
    return _host(w, "onnx.Reshape", f"{w.site}.join", [found, shape], {}, type), count * block


def _gather(w: _Weight, operands: list[Value | None], block: int, axis: int, columns: tuple[int, ...]) -> Value:
    table, indices, scales, *zeros = operands
    lead = None if indices is None else indices.tensor.shape
    attrs = {"bits": w.bits, "block_size": block, "gather_axis": 0, "quantize_axis": axis}
    type = TensorType(w.scale.tensor.dtype, None if lead is None else (*lead, *columns))
    given = [table, indices, scales, *(z for z in zeros if z is not None)]
    return _host(w, "com.microsoft.GatherBlockQuantized", w.site, given, attrs, type)


def _cut(w: _Weight, value: Value, lead: tuple[Dim, ...] | None) -> Value:
    """The first K columns."""
    bounds = [_const(w, what, constant([at], INT64)) for what, at in (("start", 0), ("end", w.k), ("axis", -1))]
    type = TensorType(value.tensor.dtype, None if lead is None else (*lead, w.k))
    return _host(w, "onnx.Slice", f"{w.site}.cut", [value, *bounds], {}, type)


def _host(w: _Weight, op: str, name: str, operands: list[Value | None], attrs: dict[str, int], type: Type) -> Value:
    """A host op before the q op, called ``name``, with one result."""
    graph, loc = w.op.graph, w.op.loc
    results = [(graph.fresh(f"{w.op.result.name}_q"), type)]
    made = graph.create(op, operands, attrs, results, loc=Loc(name, loc.scope, loc.source), before=w.op)
    return made.result
