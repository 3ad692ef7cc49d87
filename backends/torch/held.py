"""A low-bit call of torch and what it holds: the arguments of a call, their sizes in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qcompiler.dtypes import DType
from qcompiler.ir import Hole, Op, Value
from qcompiler.scheme import Scheme
from qcompiler.verify.op_kinds import MOVES

INT4 = "aten._weight_int4pack_mm_for_cpu"
INT8 = "aten._weight_int8pack_mm"


@dataclass(frozen=True)
class LowBit:
    """A low-bit call. ``n`` and ``k`` are those of the layer where the graph shows padding cut off, ``rows`` and
    ``columns`` those of the stored codes; 0 where unknown. ``packed``: codes, scales and zeros in bytes."""

    op: Op
    kind: str
    x: Value | None
    codes: Value | None
    scales: Value | None
    zeros: Value | None
    n: int
    k: int
    rows: int
    columns: int
    scheme: Scheme | None
    known: bool = True
    """Whether :data:`PLACES`, or a lookup of codes, says how it is read."""
    whole: Value | None = None
    """One factor for the whole weight, beside the scales."""

    @property
    def short(self) -> str:
        """The operator without namespace and overload."""
        return self.op.name.split(".")[1] if self.op.name.count(".") >= 2 else self.op.name

    @property
    def call(self) -> str:
        """The operator without its overload."""
        return self.op.name.rpartition(".")[0]

    @property
    def scheme_text(self) -> str:
        if self.scheme is not None:
            return str(self.scheme)
        element = None if self.codes is None else self.codes.tensor.dtype
        return str(element or "low-bit")

    @property
    def activation(self) -> DType | None:
        return None if self.x is None else self.x.tensor.dtype

    def sizes(self) -> dict[str, int]:
        """Bytes of codes, scales and zeros as they are stored."""
        out = {"codes": nbytes(self.codes), "scales": 0, "zeros": 0}
        if self.call == INT4:  # one tensor holds both
            both = nbytes(self.scales)
            return out | {"scales": both // 2, "zeros": both - both // 2}
        out["scales"] = nbytes(self.scales) + nbytes(self.whole) + sum(nbytes(v) for v in _factors_behind(self))
        return out | {"zeros": nbytes(self.zeros)}


def argument(op: Op, index: int) -> Any:
    """Positional argument ``index`` of a call: a value, or what stands there; None where there is none."""
    args = op.attrs.get("args")
    if args is None:
        return op.operand(index)
    if index >= len(args):
        return None
    given = args[index]
    return op.operands[given.index] if isinstance(given, Hole) else given


def value_at(op: Op, index: int | None) -> Value | None:
    found = None if index is None else argument(op, index)
    return found if isinstance(found, Value) else None


def count(value: Value) -> int:
    return math.prod(value.tensor.static_shape or (0,))


def nbytes(value: Value | None) -> int:
    element = None if value is None else value.tensor.dtype
    shape = None if value is None else value.tensor.static_shape
    return 0 if element is None or shape is None else element.nbytes(math.prod(shape))


def computing(value: Value) -> list[Op]:
    """The ops that compute with ``value``; one without results only checks."""
    return [op for op in value.users if op.results]


def _factors_behind(node: LowBit) -> list[Value]:
    """Constant scales that the result is multiplied with right behind the kernel."""
    if node.call != INT8:
        return []
    value, out = node.op.results[0], []
    for _ in range(6):
        users = computing(value)
        if len(users) != 1:
            break
        user = users[0]
        others = [v for v in user.operands if v is not None and v is not value]
        if user.name == "aten.mul.Tensor" and len(others) == 1 and others[0].is_const:
            out.append(others[0])
            break
        if user.name not in MOVES or not user.results:
            break
        value = user.results[0]
    return out
