"""What the stored numbers themselves say: NaN in weights, scales that are zero, not finite, or all alike.

Only what is stored is read, one tensor at a time; a constant that is still a recorded computation is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcompiler import dtypes
from qcompiler.backends.onnx.nodes import MS, LowBit, low_bit_nodes
from qcompiler.backends.onnx.qdq import DQ
from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import CHUNK, ComputedPayload, Payload, UnreadablePayload
from qcompiler.verify.findings import Finding
from qcompiler.verify.op_kinds import base_name, is_product

ALIKE = 64
"""From how many scales on it is suspicious that all are one number."""


def stored(value: Value | None) -> Payload | None:
    """The payload of a constant or of an input's default, when its bytes are there to be read."""
    payload = None if value is None else value.payload
    unread = isinstance(payload, ComputedPayload | UnreadablePayload)
    return None if payload is None or unread or payload.size == 0 else payload


def check_values(graph: Graph) -> list[Finding]:
    """Findings about the numbers in ``graph``: QC301, QC302, QC304."""
    out: list[Finding] = []
    for node in low_bit_nodes(graph):
        out += _scales(node.op, node.scales, lambda zero, n=node: _dead_block(n, zero))
        out += _cache_scales(node)
    for op in graph.walk():
        if op.name in DQ:
            out += _scales(op, op.operand(1), lambda zero, o=op: _dead_code(o, zero))
    seen: set[Value] = set()
    for op in graph.walk():
        for value in op.operands:
            if value is not None and value.is_const and value not in seen:
                seen.add(value)
                out += _floats(op, value)
    return list(dict.fromkeys(out))


def _pieces(payload: Payload) -> Iterator[Array]:
    """The values in runs of a few megabytes."""
    width = payload.dtype.storage.itemsize
    for piece in payload.chunks(CHUNK - CHUNK % width):
        yield np.frombuffer(piece, payload.dtype.storage)


def _floats(op: Op, value: Value) -> list[Finding]:
    payload = stored(value)
    if payload is None or not payload.dtype.is_float or payload.dtype.packed or payload.dtype.bits < 16:
        return []
    bad = sum(int(np.count_nonzero(np.isnan(p))) for p in _pieces(payload))
    what = "NaN"
    if not bad and is_product(op):
        bad, what = sum(int(np.count_nonzero(np.isinf(p))) for p in _pieces(payload)), "infinite"
    if not bad:
        return []
    message = f"'{value.name}' that {base_name(op)} reads holds values that are {what}"
    return [Finding("QC301", op.label, message, f"{bad} of {payload.size}", "repair the checkpoint")]


def _scales(op: Op, value: Value | None, matters: object) -> list[Finding]:
    payload = stored(value)
    if value is None or payload is None or not payload.dtype.is_float or payload.dtype.bits < 8:
        return []
    scales = payload.array().astype(np.float64)
    message = f"the scales '{value.name}' of {base_name(op)} are not usable"
    fix = "quantize the weight again"
    if (bad := int(np.count_nonzero(~np.isfinite(scales)))) > 0:
        return [Finding("QC302", op.label, message, f"{bad} of {scales.size} are not finite", fix)]
    zero = scales == 0
    if zero.any() and callable(matters) and matters(zero):
        reason = f"{np.count_nonzero(zero)} of {scales.size} are 0 where codes are not"
        return [Finding("QC302", op.label, message, reason, fix)]
    if scales.size >= ALIKE and not zero.all() and (scales == scales.flat[0]).all():
        message = f"all {scales.size} scales '{value.name}' of {base_name(op)} are {scales.flat[0]:g}"
        return [Finding("QC304", op.label, message, "", "check that these are trained weights", "warning")]
    return []


def _dead_block(node: LowBit, zero: Array) -> bool:
    """Whether a block with scale 0 has a code off its zero point; True where that cannot be told."""
    payload = stored(node.codes)
    if node.op.name != MS + "MatMulNBits" or node.block is None or payload is None or node.bits not in (2, 4, 8):
        return True
    count = -(-node.k // node.block)
    if payload.shape != (node.n, count, node.block * node.bits // 8) or zero.size != node.n * count:
        return True
    raw = payload.array().reshape(node.n * count, -1)[zero.reshape(-1)]
    codes = dtypes.unpack_bits(raw, node.bits, raw.size * 8 // node.bits, signed=False).reshape(len(raw), -1)
    middle = np.full(node.n * count, 1 << (node.bits - 1), np.uint8)
    zeros = stored(node.zeros)
    if node.zero == "int" and zeros is not None:
        middle = np.concatenate([dtypes.unpack_bits(r, node.bits, count, signed=False) for r in zeros.array()])
    return bool((codes != middle[zero.reshape(-1)][:, None]).any())


def _dead_code(op: Op, zero: Array) -> bool:
    """Whether a DequantizeLinear multiplies a code off its zero point by 0."""
    payload, zeros = stored(op.operand(0)), stored(op.operand(2))
    if payload is None or payload.dtype.kind != "int" or (zeros is not None and zeros.array().any()):
        return True
    codes, block, axis = payload.array(), op.attrs.get("block_size", 0), op.attrs.get("axis", 1)
    if zero.ndim == 1 and zero.size > 1:
        zero = zero.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
    elif block:
        zero = np.repeat(zero, block, axis).take(np.arange(codes.shape[axis]), axis)
    return bool((np.broadcast_to(zero, codes.shape) & (codes != 0)).any())


def _cache_scales(node: LowBit) -> list[Finding]:
    """Scales of a quantized key/value cache that nobody calibrated."""
    if node.kind != "cache":
        return []
    op, out = node.op, []
    for index in (12, 13):
        value = op.operand(index)
        payload = stored(value)
        if value is not None and payload is not None and payload.dtype.is_float and (payload.array() == 1).all():
            message = f"the cache scales '{value.name}' are all 1"
            out.append(Finding("QC304", op.label, message, "nobody calibrated them", "calibrate the cache", "warning"))
    return out
