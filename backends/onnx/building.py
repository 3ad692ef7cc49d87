"""What the entry points of integer kernels share: host ops beside a q op, and constants in a kernel's layout.

Nothing is read here: a constant that is made of others is a recorded computation on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.backends.lowering import Lowering
from qcompiler.backends.onnx.layouts import higher
from qcompiler.dtypes import INT32, UINT8, Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Attr, Loc, Op, TensorType, Type, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.scheme import Scheme
from qcompiler.target import Choice

CODE = "ort.code"
"""Key in the ``meta`` of a constant that is one code, made once and read by many ops."""


@dataclass(frozen=True)
class Builder(Lowering):
    """Writes host ops right before ``op``, whose node will be called ``label``."""

    choice: Choice | None = None

    @property
    def flips(self) -> bool:
        """The chosen kernel wants its weight in uint8."""
        return self.choice is not None and ".u8u8" in self.choice.row.name

    # -- constants -------------------------------------------------------------------------------------------

    def derived(
        self, suffix: str, source: Payload, fn: Callable[[Array], Array], element: DType, shape: Sequence[int]
    ) -> Value:
        """``fn`` of a constant, not computed yet."""
        return self.const(suffix, computed(suffix, lambda p: fn(p.array()), [source], element, tuple(shape)))

    def code(self, element: DType, value: int) -> Value:
        """One code, rank 0; the same constant for all that ask."""
        root, key = self.op.graph.root, f"{element}_{value}"
        found = dict(root.meta.get(CODE, ())).get(key)
        known = None if found is None else root.local(found)
        if known is not None and known.is_const:
            return known
        made = root.add_const(root.fresh(key), constant(value, element))
        root.meta[CODE] = (*root.meta.get(CODE, ()), (key, made.name))
        return made

    def zero(self, index: int, scheme: Scheme) -> Value:
        """The zero point of an activation in operand ``index``; a constant 0 for a symmetric scheme."""
        return self.op.operand(index) or self.code(scheme.dtype, 0)

    def weight_zero(self, index: int, scheme: Scheme, shape: tuple[int, ...], *, explicit: bool) -> Value | None:
        """The zero points of the weight in ``shape``, 128 higher where the codes are; without ``explicit`` none where
        all are 0."""
        flip = self.flips and scheme.dtype.signed
        if self.op.operand(index) is None:
            if not flip and not explicit:
                return None
            element, value = (UINT8, 128) if flip else (scheme.dtype, 0)
            if not shape:
                return self.code(element, value)
            return self.const("weight_zero", constant(np.full(shape, value), element))
        payload = self.payload(index, "zero point")
        element = UINT8 if flip else scheme.dtype
        return self.derived("weight_zero", payload, lambda z: _flipped(z, flip).reshape(shape), element, shape)

    def bias_codes(self, bias: int, x_scale: int, w_scale: int, n: int) -> Value:
        """The float bias ``[n]`` in int32, in steps of x scale times w scale.

        Reading it raises InputError for a channel whose bias is beyond int32.
        """
        parts = [self.payload(i, w) for i, w in ((bias, "bias"), (x_scale, "scale"), (w_scale, "weight's scale"))]
        site = self.label

        def fn(b: Payload, x: Payload, w: Payload) -> Array:
            return int32_bias(b.array(), x.array(), w.array(), site)

        return self.const("bias_codes", computed("bias_codes", fn, parts, INT32, (n,)))

    # -- ops -------------------------------------------------------------------------------------------------

    def node(
        self,
        name: str,
        operands: Sequence[Value | None],
        attrs: Mapping[str, Attr] | None = None,
        *,
        suffix: str = "",
        label: str = "",
        types: Mapping[str, Type] | None = None,
    ) -> Op:
        """A host op called ``label``, by default ``<label>`` or ``<label>.<suffix>`` of this builder.

        ``types``: name hint -> type of each result; by default one like the q op's.
        """
        op, given = self.op, list(operands)
        while given and given[-1] is None:
            given.pop()
        wanted = types or {f"{op.results[0].name}_{suffix or 'q'}": op.results[0].type}
        results = [(op.graph.fresh(hint), type) for hint, type in wanted.items()]
        label = label or (f"{self.label}.{suffix}" if suffix else self.label)
        loc = Loc(label, op.loc.scope, op.loc.source)
        return op.graph.create(name, given, dict(attrs or {}), results, loc=loc, before=op)

    def step(
        self,
        name: str,
        operands: Sequence[Value | None],
        suffix: str,
        type: Type,
        attrs: Mapping[str, Attr] | None = None,
    ) -> Value:
        """The one result, of ``type``, of a host op called ``<label>.<suffix>``."""
        hint = f"{self.op.results[0].name}_{suffix or 'q'}"
        return self.node(name, operands, attrs, suffix=suffix, types={hint: type}).result

    def like(self, element: DType | None) -> TensorType:
        """The type of the q op's result with another element type."""
        return TensorType(element, self.op.results[0].tensor.shape)


def _flipped(zeros: Array, flip: bool) -> Array:
    return higher(zeros) if flip else zeros


def int32_bias(bias: Array, x_scale: Array, w_scale: Array, site: str) -> Array:
    """``round(bias / (x scale * w scale))`` ``[n]``, w scale one or ``[n]``; raises InputError beyond int32."""
    step = x_scale.astype(np.float64).reshape(()) * w_scale.astype(np.float64).reshape(-1)
    codes = np.rint(bias.astype(np.float64) / step)
    wide = np.abs(codes) > np.iinfo(np.int32).max
    if wide.any():
        at = int(np.argmax(wide))
        size = float(np.broadcast_to(step, codes.shape)[at])
        raise InputError(
            f"'{site}': the bias {float(bias[at]):g} of channel {at} is {codes[at]:.0f} steps of {size:g} (x scale "
            f"times w scale), and int32 ends at {np.iinfo(np.int32).max}; {int(wide.sum())} of {codes.size} "
            "channels are so. Quantize this weight again with a lower bound on its scales, or skip this site"
        )
    return codes.astype(np.int32)
