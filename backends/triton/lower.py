"""Entry points: ``q.linear`` and ``q.embedding`` as calls of ``qcompiler::wn_linear`` and ``qcompiler::wn_embedding``.

Each takes ``(op, choice)``, inserts the calls before ``op`` and returns the value that stands for its result. The call
that runs the kernel is called exactly like the site. Weights go to the fragment layout as recorded computations:
nothing is read before the artifact is written. A layer and a table that are tied share one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.backends.torch.building import Builder
from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.backends.triton import layouts
from qcompiler.backends.triton import ops as _registered  # noqa: F401  (the calls name its operators)
from qcompiler.backends.triton.forms import form_called
from qcompiler.backends.triton.scheme_forms import form_of, group_of
from qcompiler.dtypes import BF16, F32, INT32, TABLE, UINT8, Array, DType
from qcompiler.errors import InputError
from qcompiler.float_codes import split_scales
from qcompiler.ir import Op, Value
from qcompiler.payload import ComputedPayload, Payload
from qcompiler.scheme import Scheme
from qcompiler.target import Choice
from qcompiler.weights import WeightQuantization


def linear(op: Op, choice: Choice) -> Value:
    """q.linear(x, codes, s, z?, bias?)  ->  wn_linear(x, fragments, s, z?, global?, bias?, n, group, form)

    ``x`` may have any rank from 1; N and K are padded in the weight alone. Raises InputError for weights that are no
    constants, and for a scheme without a form.
    """
    w = Weight.of(Builder(op), 1)
    made: Value = w.builder.call(
        "qcompiler.wn_linear.default",
        w.builder.at(0),
        *w.tensors(),
        op.operand(4),
        None,
        None,
        w.n,
        w.group,
        w.form,
        "none",
        type=op.result.type,
    )
    return made


def embedding(op: Op, choice: Choice) -> Value:
    """q.embedding(i, codes, s, z?)  ->  wn_embedding(i, fragments, s, z?, global?, k, group, form, out)"""
    w = Weight.of(Builder(op), 1)
    out: Any = TO_TORCH[op.result.tensor.dtype or F32]
    made: Value = w.builder.call(
        "qcompiler.wn_embedding.default",
        w.builder.at(0),
        *w.tensors(),
        w.k,
        w.group,
        w.form,
        out,
        type=op.result.type,
    )
    return made


@dataclass(frozen=True)
class Weight:
    """Codes, scales and zero points in operands ``first`` on, ``[n, k]``, on their way to the fragment layout."""

    builder: Builder
    first: int
    scheme: Scheme
    form: str
    group: int
    n: int
    k: int

    @classmethod
    def of(cls, builder: Builder, first: int) -> Weight:
        """That of ``builder.op``; raises InputError for codes that are no constant, or have no form."""
        scheme: Scheme = builder.op.attrs["scheme"]
        n, k = builder.payload(first, "codes").shape
        return cls(builder, first, scheme, form_of(scheme), group_of(scheme), n, k)

    def tensors(self) -> tuple[Value, Value, Value | None, Value | None]:
        """Fragments, scales, zero points, and the factor of the whole tensor."""
        return self.codes(), self.scales(), self.zeros(), self.whole()

    def codes(self) -> Value:
        """int32 fragments."""
        b, form = self.builder, self.form
        payload = b.payload(self.first, "codes")

        def pack(codes: Array) -> Array:
            return layouts.pack_codes(codes, form)

        shape = layouts.fragment_shape(self.n, self.k, form)
        key = ("fragments", form)
        return b.laid_out(b.at(self.first), key, lambda: b.derived("weight_fragments", [payload], pack, INT32, shape))

    def scales(self, element: DType | None = None) -> Value:
        """``[G', N']``, in ``element``, else the shortest type that holds them exactly; e8m0 as bits, in uint8."""
        b, (n, k, group), label = self.builder, (self.n, self.k, self.group), self.builder.label
        payload, height, own = b.payload(self.first + 1, "scale"), self._height, self._own
        stored = element or own or (BF16 if self._short(payload) else payload.dtype)

        def pack(scales: Array) -> Array:
            if own is not None:
                return layouts.pack_scales(split_scales(scales, own)[0], n, k, group)
            laid = layouts.pack_scales(_by_row(scales, height, n), n, k, group)
            return laid if laid.dtype == stored.storage else exactly(laid, stored, label)

        def bits(scales: Array) -> Array:
            return pack(scales).view(np.uint8)

        shape = (layouts.scale_rows(k, group), layouts.padded(n, layouts.ROWS))
        key, source = ("scales", group, stored.name), b.at(self.first + 1)
        how, kind = (bits, UINT8) if stored.name == "f8e8m0" else (pack, stored)
        return b.laid_out(source, key, lambda: b.derived("weight_scales", [payload], how, kind, shape))

    def zeros(self) -> Value | None:
        """``[G', N']`` in int16, or floats; None where the scheme has none."""
        b, (n, k, group, form) = self.builder, (self.n, self.k, self.group, self.form)
        if b.op.operand(self.first + 2) is None:
            return None
        payload, height = b.payload(self.first + 2, "zero point"), self._height

        def pack(zeros: Array) -> Array:
            return layouts.pack_zeros(_by_row(zeros, height, n), n, k, group, form)

        stored = TABLE["int16"] if payload.dtype.is_integer else payload.dtype
        shape = (layouts.scale_rows(k, group), layouts.padded(n, layouts.ROWS))
        key = ("zeros", group, form)
        source = b.at(self.first + 2)
        return b.laid_out(source, key, lambda: b.derived("weight_zeros", [payload], pack, stored, shape))

    def whole(self) -> Value | None:
        """The factor of the whole tensor, f32 ``[1]``; None for a form without one."""
        own, b = self._own, self.builder
        if own is None or own.name != "f8e4m3":
            return None
        payload = b.payload(self.first + 1, "scale")

        def factor(scales: Array) -> Array:
            return np.full(1, split_scales(scales, own)[1], np.float32)

        source = b.at(self.first + 1)
        return b.laid_out(source, ("factor",), lambda: b.derived("weight_factor", [payload], factor, F32, (1,)))

    @property
    def _own(self) -> DType | None:
        """The type in which the kernel keeps the scales, where that is not the weight's."""
        return self.scheme.scale if self.form in ("mxfp4", "nvfp4") else None

    @property
    def _height(self) -> int:
        """Rows that share a scale; 1 but for blocks."""
        return self.scheme.group[0] if self.scheme.granularity == "block" else 1

    def _short(self, payload: Payload) -> bool:
        """True for f32 scales that bf16 holds exactly, by the law of scales of codes of up to 4 bits."""
        small = form_called(self.form).bits <= 4 and self.scheme.scale is None
        return small and payload.dtype == F32 and _ours(payload)


def _by_row(given: Array, height: int, n: int) -> Array:
    """Scales or zero points of blocks ``height`` rows high, one a row.

    What a recorded computation calls must be a plain function: a method would carry the op with it, and every
    compilation would take the same weight for another one and pack it again.
    """
    return given if height == 1 else np.repeat(given, height, axis=0)[:n]


def _ours(payload: Payload) -> bool:
    """Whether a quantizer of this package computes it, so that its law holds."""
    while isinstance(payload, ComputedPayload):
        if isinstance(payload.computation, WeightQuantization):
            return True
        if len(payload.computation.inputs) != 1:
            return False
        payload = payload.computation.inputs[0]
    return False


def exactly(values: Array, element: DType, label: str) -> Array:
    """``values`` in ``element``; raises InputError where one of them is not the same there."""
    out: Array = values.astype(element.storage)
    wrong = out.astype(np.float64) != values.astype(np.float64)
    if wrong.any():
        first = float(values[wrong].flat[0])
        raise InputError(
            f"'{label}': {int(wrong.sum())} of {values.size} scales, such as {first!r}, are not exact in {element} "
            "(QC205); quantize this weight again, or skip the site"
        )
    return out
