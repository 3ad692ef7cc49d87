"""Low-bit weights in the layouts of com.microsoft's weight-only ops: MatMulNBits and GatherBlockQuantized.

The packing (``[N, blocks, bytes of a block]``, low bits first, zero points in rows of whole bytes) was measured on ONNX
Runtime 1.31; without zero points the middle code means 0.
"""

from __future__ import annotations

import numpy as np

from qcompiler.dtypes import INT64, TABLE, Array, DType, unpack_bits
from qcompiler.ir import Op, TensorType, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.parts import (
    constant_codes,
    dequantized,
    int_attr,
    once,
    parameters,
    transposed,
    whole,
)

MS = "com.microsoft."
KERNEL = "kernel"
"""Key in the ``meta`` of a product: the last part of the name of the kernel that computes as its source did."""


def unpacked(
    packed: Payload, bits: int, rows: int, columns: int, element: DType, order: Array | None = None
) -> Payload:
    """Codes ``[rows, columns]`` of packed rows, in the columns' ``order``; signed ones count from the middle."""
    label = f"unpack{bits}" + ("" if order is None else ", reorder")

    def run(p: Payload) -> Array:
        raw = np.ascontiguousarray(p.array()).reshape(-1).view(np.uint8)
        width = raw.size * 8 // bits // rows
        codes = unpack_bits(raw, bits, rows * width, signed=False).reshape(rows, width)[:, :columns]
        if order is not None:
            codes = codes[:, order]
        if element.signed:
            return np.ascontiguousarray(codes - np.uint8(1 << (bits - 1))).view(np.int8)
        return np.ascontiguousarray(codes)

    return computed(label, run, [packed], element, (rows, columns))


def _zeros(rw: Rewriter, zeros: Value | None, bits: int, rows: int, groups: int) -> Value | None:
    """Zero points ``[rows, groups]`` as unsigned codes; float ones must be whole numbers."""
    if zeros is None:
        return None
    zeros, element = constant_codes(rw, zeros, "zero points"), TABLE[f"uint{bits}"]
    assert zeros.payload is not None
    if zeros.tensor.dtype is not None and zeros.tensor.dtype.is_float:
        whole(rw, zeros.payload.array(), element)

        def cast(p: Payload) -> Payload:
            return constant(p.array().reshape(rows, groups).astype(element.storage), element)

        return once(rw, zeros, f"u{bits}", cast)
    need = rows * -(-groups * bits // 8)
    if zeros.payload.nbytes != need:
        have = list(zeros.payload.shape)
        raise rw.declined(f"its packed zero points are {have}, {rows} rows of {groups} take {need} bytes", code="QC205")
    return once(rw, zeros, f"u{bits}", lambda p: unpacked(p, bits, rows, groups, element))


def _order(rw: Rewriter, index: Value | None, k: int, block: int) -> Array | None:
    """The order of the columns in which groups are blocks; None where they are so already."""
    if index is None:
        return None
    index = constant_codes(rw, index, "g_idx")
    assert index.payload is not None
    groups = index.payload.array().astype(np.int64).reshape(-1)[:k]
    if np.array_equal(groups, np.arange(k) // block):
        return None
    order = np.argsort(groups, kind="stable")
    if groups.size != k or not np.array_equal(groups[order], np.arange(k) // block):
        sizes = np.bincount(np.clip(groups, 0, None))
        raise rw.declined(
            f"g_idx puts {int(sizes.max())} columns into one group and {int(sizes.min())} into another, and blocks of "
            f"{block} hold {block} each",
            code="QC205",
        )
    return order


@rule(MS + "MatMulNBits")
def lift_nbits(op: Op, rw: Rewriter) -> Value:
    """MatMulNBits(x, b, s, z, g_idx, bias)  ->  x @ transpose(q.dequantize(c, s, z)) + bias

    where g_idx becomes an order of the columns of codes and ``x``.
    """
    k, n, block = (int_attr(op, a, 0) for a in ("K", "N", "block_size"))
    bits, x = int_attr(op, "bits", 4), op.operand(0)
    if min(k, n, block) < 1 or x is None:
        raise rw.declined("its attributes K, N, block_size or its input are absent", code="QC205")
    if bits not in (2, 4, 8):
        raise rw.declined(f"no kernel ever read {bits}-bit blocks, so their layout is not known", code="QC201")
    if int_attr(op, "weight_prepacked", 0):
        raise rw.declined("weight_prepacked says that its codes are in a layout of one CUDA kernel", code="QC205")
    packed = constant_codes(rw, op.operand(1))
    groups = -(-k // block)
    assert packed.payload is not None
    if packed.payload.nbytes * 8 != n * groups * block * bits:
        have = list(packed.payload.shape)
        raise rw.declined(f"its codes are {have}, N={n}, K={k}, block_size={block} ask for others", code="QC205")
    order = _order(rw, op.operand(4), k, block)
    zeros = _zeros(rw, op.operand(3), bits, n, groups)
    element = TABLE[f"{'int' if zeros is None else 'uint'}{bits}"]
    codes = rw.const(f"{packed.name}.codes", unpacked(packed.payload, bits, n, k, element, order), packed.graph)
    scale = op.operand(2)
    if scale is not None:
        scale = constant_codes(rw, scale, "scales")
        scale = once(rw, scale, "ng", lambda p: _matrix(p, n, groups))
    weight = dequantized(rw, codes, parameters(rw, codes, element, scale, zeros, axis=1, block=block))
    if order is not None:
        at = rw.const(f"{packed.name}.order", constant(order, INT64), packed.graph)
        x = rw.op("onnx.Gather", x, at, type=x.type, axis=-1, hint=f"{x.name}_ordered")
    bias = op.operand(5)
    out = op.result.type
    y = rw.op("onnx.MatMul", x, transposed(rw, weight), type=out)
    if bits == 4 and int_attr(op, "accuracy_level", 0) < 4 and y.owner is not None:
        y.owner.meta[KERNEL] = "MatMulNBits.fp32"
    return y if bias is None else rw.op("onnx.Add", y, settle(rw, bias), type=out)


def _matrix(scales: Payload, n: int, groups: int) -> Payload:
    return computed("scales", lambda p: p.array().reshape(n, groups), [scales], scales.dtype, (n, groups))


@rule(MS + "GatherBlockQuantized")
def lift_table(op: Op, rw: Rewriter) -> Value:
    """GatherBlockQuantized(table, i, s, z)  ->  gather(q.dequantize(c, s, z), i)   for rows of a matrix"""
    indices, scale, zero = op.operand(1), op.operand(2), op.operand(3)
    table = constant_codes(rw, op.operand(0), "table")
    block = int_attr(op, "block_size", 128)
    assert table.payload is not None
    shape, element = table.payload.shape, table.payload.dtype
    axis = int_attr(op, "quantize_axis", 1)
    if len(shape) != 2 or axis % 2 != 1 or int_attr(op, "gather_axis", 0) != 0 or indices is None or scale is None:
        raise rw.declined("only rows of a matrix in blocks along its columns are looked up in codes", code="QC205")
    rows, columns, groups = shape[0], shape[1], static_columns(scale)
    if element.name == "uint8":
        bits = int_attr(op, "bits", 4)
        if bits not in (2, 4, 8):
            raise rw.declined(f"no kernel reads {bits}-bit rows", code="QC201")
        columns = columns * 8 // bits
        zero = _zeros(rw, zero, bits, rows, groups)
        element = TABLE[f"{'int' if zero is None else 'uint'}{bits}"]
        table = rw.const(f"{table.name}.codes", unpacked(table.payload, bits, rows, columns, element), table.graph)
    p = parameters(rw, table, element, constant_codes(rw, scale, "scales"), zero, axis=1, block=block)
    found = TensorType(p.scale.tensor.dtype, op.result.tensor.shape)
    return rw.op("onnx.Gather", dequantized(rw, table, p), indices, type=found, axis=0)


def static_columns(value: Value) -> int:
    """The last size of ``value``; 0 where it is not known."""
    shape = value.tensor.static_shape
    return shape[-1] if shape else 0


@rule(MS + "MatMulBnb4")
def refuse_bnb4(op: Op, rw: Rewriter) -> Value:
    """MatMulBnb4 stays: its codes name values of a table (NF4, FP4) that are no multiples of a step"""
    raise rw.declined(
        "its codes stand for the values of NF4 or FP4, which are no multiples of one step: no fused kernel reads them, "
        "and integer codes would round the weight again",
        code="QC104",
        fix="compile the float original with w4a16",
    )


RULES = (lift_nbits, lift_table, refuse_bnb4)
