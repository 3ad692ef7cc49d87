"""Entry points: a ``q.linear`` or ``q.embedding`` written as calls of aten, the kernel that was chosen among them.

Each takes ``(op, choice)``, inserts the calls before ``op`` and returns the value that stands for its result. The call
that runs the kernel is called exactly like the site. Weights go to the kernel's layout as recorded computations:
nothing is read before the artifact is written. Every call is torch's own, so a program made of them runs without this
package; sizes stay open where they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qcompiler.backends.torch import layouts
from qcompiler.backends.torch.building import LAYOUTS, Builder
from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.dtypes import BF16, F32, INT8, UINT8, Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Dim, Op, OpaqueType, TensorType, Value
from qcompiler.payload import ComputedPayload, constant
from qcompiler.scheme import Scheme
from qcompiler.target import Choice

WIDTH = "qcompiler.int4pack"
"""Key of the metadata that says for which vector width the int4 weights of a program are packed."""
BLOCKS = (256, 128, 64, 32)
"""The groups that ``_weight_int4pack_mm_for_cpu`` takes."""


def int4_block(scheme: Scheme, k: int) -> int:
    """The kernel's group for a row of ``k``: a scheme's own, or a part of it where that takes fewer bytes.

    A scale that spans several blocks is repeated, which loses nothing; K is padded to whole blocks.
    """
    allowed = [b for b in BLOCKS if b <= (scheme.group_size or BLOCKS[0])]
    return min(allowed, key=lambda b: -(-k // b) * (b // 2 + 4))


def int4pack(op: Op, choice: Choice) -> Value:
    """q.linear(x, codes, s, z?, bias?)  ->  _weight_int4pack_mm_for_cpu(bf16 x, packed, block, scales and zeros) + bias

    ``x`` may have any rank from 1 and any layout in memory; N and K are padded where the kernel wants that. Raises
    InputError for weights that are no constants; reading the weights raises it for scales of more than 8 significant
    bits.
    """
    b, scheme, (n, k) = _matrix(op)
    scale, zero = b.payload(2, "scale"), [] if op.operand(3) is None else [b.payload(3, "zero point")]
    width, block = choice.row.layout.rpartition("_")[2], int4_block(scheme, k)
    rows, columns, label = layouts.padded(n, 16), layouts.padded(k, block), b.label
    _note(op, WIDTH, width)

    def pack(c: Array) -> Array:
        return layouts.int4pack(layouts.nibbles_of(c, rows, columns), width)

    def parameters(s: Array, z: Array | None = None) -> Array:
        return layouts.scales_and_zeros(s, z, scheme, (n, k, block), label)

    layout = f"int4_{width}"
    packed = _once(b, (layout, columns), f"weight_{layout}", pack, UINT8, (rows, columns // 2))

    def made() -> Value:
        return b.derived("weight_scales_zeros", [scale, *zero], parameters, BF16, (columns // block, rows, 2))

    both = b.laid_out(b.at(2), ("scales_zeros", block), made)
    x = b.at(0)
    flat = _rows(b, x, columns)
    kind = TensorType(BF16, (_count(x), rows))
    y: Value = b.call("aten._weight_int4pack_mm_for_cpu.default", flat, packed, block, both, type=kind)
    if rows != n:
        y = b.call("aten.slice.Tensor", y, 1, 0, n, type=TensorType(BF16, (_count(x), n)), suffix="cut")
    return _biased(b, b.cast(_unflattened(b, y, x), _element(op), "result"), op.operand(4))


def int8pack(op: Op, choice: Choice) -> Value:
    """q.linear(x, codes, s, bias?)  ->  _weight_int8pack_mm(bf16 x, codes, ones) * s + bias

    The kernel's scales are bf16. Scales of that type it gets itself; others are multiplied in f32 behind it, so that
    they stay what they are. ``x`` may have any rank from 1; K is padded to a multiple of 16. Raises InputError for
    weights that are no constants.
    """
    b, _, (n, k) = _matrix(op)
    scale, x, element = b.payload(2, "scale"), b.at(0), _element(op)
    inside = scale.dtype == BF16 and element == BF16

    def row(s: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(s.reshape(-1), (n,)))

    def wide(s: Array) -> Array:
        return row(s).astype(F32.storage)

    scales = b.derived("weight_scales", [scale], row if inside else wide, BF16 if inside else F32, (n,))
    ones = scales if inside else b.const("ones", constant(np.ones(n), BF16))
    flat = _rows(b, x, layouts.padded(k, 16))
    codes = _int8_codes(b, layouts.padded(k, 16))
    y: Value = b.call("aten._weight_int8pack_mm.default", flat, codes, ones, type=TensorType(BF16, (_count(x), n)))
    y = _unflattened(b, y, x)
    if inside:
        return _biased(b, y, op.operand(4))
    y = b.cast(y, F32, "wide")
    y = b.call("aten.mul.Tensor", y, scales, type=b.like(F32), suffix="scaled")
    return b.cast(_biased(b, y, op.operand(4)), element, "result")


def gather(op: Op, choice: Choice) -> Value:
    """q.embedding(i, codes, s, z?)  ->  (embedding(codes, i) - embedding(z, i)) * embedding(s, i)

    Only the rows asked for are dequantized. 8-bit codes are stored as they are, 4-bit ones two a byte. Raises
    InputError for weights that are no constants.
    """
    b, scheme, (_, k) = _matrix(op)
    scale, lead = b.payload(2, "scale"), b.at(0).tensor.shape
    element, size = scale.dtype, scheme.group_size
    columns = k if size is None else layouts.padded(k, size)
    found = _gathered_codes(b, scheme, columns, lead)
    found = b.cast(found, element, "floats")
    if size is not None:
        shape = None if lead is None else (*lead, columns // size, size)
        found = b.call(
            "aten.unflatten.int", found, -1, [columns // size, size], type=TensorType(element, shape), suffix="groups"
        )
    if op.operand(3) is not None:
        zero = b.cast(_gathered(b, 3, "zero", lead, size is not None), element, "zero_floats")
        found = b.call("aten.sub.Tensor", found, zero, type=found.type, suffix="centred")
    s = _gathered(b, 2, "scale", lead, size is not None)
    found = b.call("aten.mul.Tensor", found, s, type=found.type, suffix="scaled")
    if size is not None:
        kind = TensorType(element, None if lead is None else (*lead, columns))
        found = b.call("aten.flatten.using_ints", found, -2, -1, type=kind, suffix="joined")
    return b.cast(_cut(b, found, k), _element(op), "result")


# -- tables ------------------------------------------------------------------------------------------------------


def _gathered_codes(b: Builder, scheme: Scheme, columns: int, lead: tuple[Dim, ...] | None) -> Value:
    """The codes ``[.., columns]`` of the rows asked for, one a byte."""

    def kind(element: DType, *last: int) -> TensorType:
        return TensorType(element, None if lead is None else (*lead, *last))

    if scheme.bits == 8:
        stored = _byte_table(b, columns)
        width = int(stored.tensor.static_shape[1])  # type: ignore[index]  # a constant
        found: Value = b.call("aten.embedding.default", stored, b.at(0), type=kind(scheme.dtype, width))
        return _cut(b, found, columns, "codes")
    n, width = b.payload(1, "codes").shape[0], layouts.padded(columns, 2) // 2
    stored = _once(b, ("table", columns), "weight_int4", lambda c: layouts.table(c, columns), UINT8, (n, width))
    pairs = b.call("aten.embedding.default", stored, b.at(0), type=kind(UINT8, width))
    low = b.call("aten.bitwise_and.Scalar", pairs, 15, type=kind(UINT8, width), suffix="low")
    high = b.call("aten.__rshift__.Scalar", pairs, 4, type=kind(UINT8, width), suffix="high")
    both = b.call("aten.stack.default", [low, high], -1, type=kind(UINT8, width, 2), suffix="both")
    found = b.call("aten.flatten.using_ints", both, -2, -1, type=kind(UINT8, 2 * width), suffix="codes")
    found = _cut(b, found, columns, "whole")
    if not scheme.dtype.signed:
        return found
    found = b.cast(found, INT8, "bytes")
    result: Value = b.call("aten.sub.Scalar", found, layouts.MIDDLE, type=kind(INT8, columns), suffix="signed")
    return result


def _byte_table(b: Builder, columns: int) -> Value:
    """8-bit codes as a table of at least ``columns``; those that a linear layer reads too, where one does."""
    codes = b.at(1)
    k = b.payload(1, "codes").shape[1]
    known = dict(codes.meta.get(LAYOUTS, ()))
    if ("int8pack", layouts.padded(k, 16)) in known or any(u.name == "q.linear" for u in codes.users):
        return _int8_codes(b, layouts.padded(k, 16))
    if columns == k:
        return codes
    payload = b.payload(1, "codes")

    def pad(c: Array) -> Array:
        return np.pad(c, ((0, 0), (0, columns - k)))

    return _once(b, ("bytes", columns), "weight_int8", pad, payload.dtype, (payload.shape[0], columns))


def _gathered(b: Builder, index: int, what: str, lead: tuple[Dim, ...] | None, grouped: bool) -> Value:
    """The parameters of the rows asked for, so that they broadcast over their codes."""
    value = b.at(index)
    payload = b.payload(index, what)
    element = payload.dtype
    if element.packed:  # torch has no such type: one code a byte
        element = INT8 if element.signed else UINT8
    if payload.shape == (1, 1):
        return b.derived(f"weight_{what}", [payload], lambda p: p.reshape(()), element, ())
    if element != payload.dtype:
        value = b.derived(f"weight_{what}", [payload], lambda p: p, element, payload.shape)
    kind = TensorType(element, None if lead is None else (*lead, payload.shape[1]))
    found: Value = b.call("aten.embedding.default", value, b.at(0), type=kind, suffix=what)
    if grouped:
        kind = TensorType(element, None if lead is None else (*lead, payload.shape[1], 1))
        found = b.call("aten.unsqueeze.default", found, -1, type=kind, suffix=f"{what}_column")
    return found


def _cut(b: Builder, value: Value, k: int, suffix: str = "cut") -> Value:
    """The first ``k`` columns."""
    if _last(value) == k:
        return value
    shape = value.tensor.shape
    kind = TensorType(value.tensor.dtype, None if shape is None else (*shape[:-1], k))
    made: Value = b.call("aten.slice.Tensor", value, -1, 0, k, type=kind, suffix=suffix)
    return made


def _last(value: Value) -> int | None:
    shape = value.tensor.shape
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else None


# -- weights -----------------------------------------------------------------------------------------------------


def _matrix(op: Op) -> tuple[Builder, Scheme, tuple[int, int]]:
    b = Builder(op)
    n, k = b.payload(1, "codes").shape
    return b, op.attrs["scheme"], (n, k)


def _element(op: Op) -> DType:
    return op.result.tensor.dtype or F32


def _note(op: Op, key: str, value: str) -> None:
    """Make ``key`` part of what travels inside the artifact."""
    root = op.graph.root
    root.meta["metadata"] = tuple((dict(root.meta.get("metadata", ())) | {key: value}).items())


def _once(
    b: Builder, key: tuple[str, int], suffix: str, fn: Callable[[Array], Array], element: DType, shape: Sequence[int]
) -> Value:
    """``fn`` of the codes as a constant, one for all that ask with ``key``."""
    payload = b.payload(1, "codes")
    return b.laid_out(b.at(1), key, lambda: b.derived(suffix, [payload], fn, element, shape))


def _int8_codes(b: Builder, columns: int) -> Value:
    """int8 codes ``[N, columns]``: the canonical constant itself where nothing is padded and NumPy places it."""
    payload = b.payload(1, "codes")
    n, k = payload.shape
    if columns == k and isinstance(payload, ComputedPayload):
        return b.at(1)
    return _once(b, ("int8pack", columns), "weight_int8", layouts.int8pack, INT8, (n, columns))


# -- activations -------------------------------------------------------------------------------------------------


def _rows(b: Builder, x: Value, columns: int) -> Value:
    """``x[.., K]`` as contiguous bf16 rows ``[M, columns]``, made once for all layers that read ``x``."""

    def make() -> list[Value]:
        value, k, element = x, b.payload(1, "codes").shape[1], x.tensor.dtype or F32
        if x.tensor.rank != 2:
            kind = TensorType(element, (_count(x), k))
            value = b.call("aten.reshape.default", x, [-1, k], type=kind, suffix="rows")
        if columns != k:
            kind = TensorType(element, (_count(x), columns))
            pad = [0, columns - k]
            value = b.call("aten.constant_pad_nd.default", value, pad, type=kind, suffix="padded")
        kind = TensorType(BF16, (_count(x), columns))
        # The kernels refuse rows that are not contiguous, and int8pack crashes where they do not begin at a multiple of
        # 32 bytes: what reaches it is always memory of torch's own.
        form = torch.contiguous_format
        if element == BF16 and columns != k:
            return [value]
        if element == BF16:
            return [b.call("aten.clone.default", value, type=kind, suffix="bf16", memory_format=form)]
        to: Any = TO_TORCH[BF16]
        return [b.call("aten.to.dtype", value, to, type=kind, suffix="bf16", memory_format=form)]

    return b.shared(x, ("rows", columns), make)[0]


def _unflattened(b: Builder, y: Value, x: Value) -> Value:
    """``y[M, N]`` with the leading sizes of ``x``."""
    lead = _known(x)[:-1]
    if len(lead) == 1:
        return y
    open_sizes = [i for i, d in enumerate(lead) if not isinstance(d, int)]

    def size(i: int) -> Any:
        if isinstance(lead[i], int):
            return lead[i]
        if len(open_sizes) == 1:
            return -1
        kind = OpaqueType(f"SymInt {lead[i]}")
        return b.shared(x, ("size", i), lambda: [b.call("aten.sym_size.int", x, i, type=kind, suffix=f"size{i}")])[0]

    n = _known(y)[-1]
    sizes = [*(size(i) for i in range(len(lead))), n]
    shaped: Value = b.call("aten.view.default", y, sizes, type=TensorType(y.tensor.dtype, (*lead, n)), suffix="shaped")
    return shaped


def _biased(b: Builder, y: Value, bias: Value | None) -> Value:
    """``y`` plus ``bias``, in the type of ``y``."""
    if bias is None:
        return y
    element = y.tensor.dtype or F32
    if bias.tensor.dtype != element and bias.payload is not None:
        bias = b.derived("bias", [bias.payload], lambda a: a.astype(element.storage), element, bias.payload.shape)
    made: Value = b.call("aten.add.Tensor", y, bias, type=y.type, suffix="bias")
    return made


def _known(x: Value) -> tuple[Dim, ...]:
    shape = x.tensor.shape
    if not shape:
        raise InputError(f"the shape of {x!r} is not known, and a kernel of torch cannot be called on it")
    return shape


def _count(x: Value) -> Dim:
    """The product of all sizes but the last."""
    lead = _known(x)[:-1]
    fixed = math.prod(d for d in lead if isinstance(d, int))
    texts = [f"({d})" if set(d) & set("+-* ") else d for d in lead if isinstance(d, str)]
    if not texts:
        return fixed
    return "*".join([*([str(fixed)] if fixed != 1 else []), *texts])
