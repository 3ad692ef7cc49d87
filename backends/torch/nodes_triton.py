"""What calls of our own Triton operators hold: where their arguments stand, which scheme these tell of, whose rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompiler import dtypes
from qcompiler.backends.torch.held import LowBit, argument
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.layouts import TILE
from qcompiler.backends.triton.scheme_forms import scheme_told
from qcompiler.errors import RecipeError
from qcompiler.ir import Op, Value
from qcompiler.scheme import Granularity, Scheme, ZeroKind
from qcompiler.target import Request
from qcompiler.verify.flow import source_of


@dataclass(frozen=True)
class Slots:
    """Positions of arguments in a call: those of tensors, then of plain numbers. -1 where there is none."""

    kind: str
    x: int
    codes: int
    zeros: int
    whole: int
    n: int
    group: int
    form: int

    @property
    def scales(self) -> int:
        return self.codes + 1


WN_LINEAR, WN_EMBEDDING, WN_GROUPED = "qcompiler.wn_linear", "qcompiler.wn_embedding", "qcompiler.wn_grouped"
A8_LINEAR = "qcompiler.a8_linear"
SLOTS: dict[str, Slots] = {
    WN_LINEAR: Slots("linear", 0, 1, 3, 4, 8, 9, 10),
    WN_EMBEDDING: Slots("embedding", -1, 1, 3, 4, 5, 6, 7),
    WN_GROUPED: Slots("experts", 0, 2, 4, 5, 7, 8, 9),
    A8_LINEAR: Slots("linear", 0, 2, 4, -1, 8, 9, 11),
}
"""Operators that hold a weight, without overload."""
BIAS, MUL, RESIDUAL = 5, 6, 7
"""Where both linears have what is computed behind the product."""
BLOCK = 128
"""Rows and columns that share a scale of a weight in 8-bit codes, where it has blocks."""


def tensor_at(op: Op, index: int) -> Value | None:
    """The tensor that stands there, behind what only moves it; None where there is none."""
    found = argument(op, index) if index >= 0 else None
    return source_of(found)[0] if isinstance(found, Value) else None


def number_at(op: Op, index: int) -> int:
    """The whole number that stands there; -1 where there is none."""
    found = argument(op, index)
    return found if isinstance(found, int) and not isinstance(found, bool) else -1


def form_at(op: Op, slots: Slots) -> str:
    """The form that the call names; empty where it names none."""
    found = argument(op, slots.form)
    return found if isinstance(found, str) else ""


def fragments(slots: Slots, call: str, form: str) -> bool:
    """Whether the codes lie in the fragment layout, and not row by row."""
    return call != A8_LINEAR or (form in FORMS and FORMS[form].bits < 8)


def triton_call(op: Op, call: str) -> LowBit:
    """``op``, a call of one of :data:`SLOTS`, as a low-bit call."""
    slots = SLOTS[call]
    codes, scales, zeros = (tensor_at(op, i) for i in (slots.codes, slots.scales, slots.zeros))
    form = form_at(op, slots)
    shape = (None if codes is None else codes.tensor.static_shape) or ()
    rows = columns = 0
    if fragments(slots, call, form) and len(shape) in (3, 4):
        rows, columns = shape[-2] * math.prod(shape[:-3]), shape[-3] * TILE
    elif len(shape) == 2:
        rows, columns = shape
    given = number_at(op, slots.n)
    x = tensor_at(op, slots.x) if slots.x >= 0 else None
    if slots.kind == "embedding":
        n, k = _table_rows(op, rows), given
    else:
        n, k = given, _last(argument(op, slots.x), columns)
    extra = tensor_at(op, slots.whole)
    return LowBit(op, slots.kind, x, codes, scales, zeros, n, k, rows, columns, _scheme(op, call, form), whole=extra)


def _table_rows(op: Op, rows: int) -> int:
    """Rows of a table: those of the layer that is tied to it where one tells, since its own are padded."""
    codes = tensor_at(op, 1)
    for user in [] if codes is None else codes.users:
        if user.name.rpartition(".")[0] == WN_LINEAR:
            return number_at(user, SLOTS[WN_LINEAR].n)
    return rows


def _last(x: object, columns: int) -> int:
    shape = x.tensor.shape if isinstance(x, Value) else None
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else columns


def _scheme(op: Op, call: str, form: str) -> Scheme | None:
    slots = SLOTS[call]
    zeros, scales = tensor_at(op, slots.zeros), tensor_at(op, slots.scales)
    zero: ZeroKind = "none"
    if zeros is not None:
        zero = "float" if zeros.tensor.dtype is not None and zeros.tensor.dtype.is_float else "int"
    several = scales is None or math.prod(scales.tensor.static_shape or (2,)) > 1
    per: Granularity = "channel" if several else "tensor"
    return scheme_told(form, max(number_at(op, slots.group), 0), zero, per)


def activation_codes(op: Op) -> Scheme | None:
    """How the codes of the activation of a ``a8_linear`` are scaled, as its arguments tell it."""
    x, scale, block = argument(op, 0), argument(op, 1), number_at(op, 10)
    element = x.tensor.dtype if isinstance(x, Value) else None
    if element is None or not isinstance(scale, Value):
        return None
    try:
        if block > 0:
            return Scheme(element, "block", group=(1, block), dynamic=True)
        one = scale.tensor.static_shape is not None and math.prod(scale.tensor.static_shape) == 1
        constant = scale.payload is not None
        return Scheme(element, "tensor") if one and constant else Scheme(element, "token", dynamic=True)
    except RecipeError:
        return None


def request_told(node: LowBit) -> Request:
    """What the call asks of a kernel, as far as its arguments tell it."""
    scheme, op = node.scheme or Scheme(dtypes.INT8), node.op
    element = op.results[0].tensor.dtype or dtypes.BF16
    if node.call == A8_LINEAR:
        x = activation_codes(op)
        name = "q.linear_static" if x is not None and not x.dynamic else "q.linear_dyn"
        if x is not None and x.granularity == "block" and node.scales is not None:
            blocks = node.scales.tensor.rank == 2
            scheme = Scheme(scheme.dtype, "block", group=(BLOCK, BLOCK)) if blocks else scheme
        return Request(name, scheme.with_axis(1), max(node.n, 1), max(node.k, 1), element, x=x)
    name = {"embedding": "q.embedding", "experts": "q.experts"}.get(node.kind, "q.linear")
    activation = element if node.kind == "embedding" else node.activation or element
    return Request(name, scheme.with_axis(1), max(node.n, 1), max(node.k, 1), activation)


def row_keys(node: LowBit) -> tuple[str, ...]:
    """The kernels that the operator chooses among, by M; empty for a call that is none of ours."""
    slots = SLOTS.get(node.call)
    if slots is None:
        return ()
    form = form_at(node.op, slots)
    if node.call == WN_EMBEDDING:
        return ("gather",)
    if node.call == WN_GROUPED:
        return (f"grouped.{form}",)
    if node.call == A8_LINEAR:
        return ("a8.gemm.w4" if form in ("int4", "uint4") else "a8.gemm.int8" if form == "int8" else "a8.gemm.f8",)
    return f"wn.gemv.{form}", f"wn.gemm.{form}"
