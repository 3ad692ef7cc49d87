"""What the entry points of every backend share: the operands of a q op, and constants beside it."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.errors import InputError
from qcompiler.ir import Op, Value
from qcompiler.payload import Payload


@dataclass(frozen=True)
class Lowering:
    """A q op that is being written as its kernel's own node."""

    op: Op

    @property
    def label(self) -> str:
        """The site, else the name of the op."""
        return str(self.op.attrs.get("site") or self.op.label)

    def at(self, index: int) -> Value:
        """Operand ``index``, which is there."""
        value = self.op.operand(index)
        if value is None:
            raise InputError(f"{self.op.name} '{self.label}' has no operand {index}")
        return value

    def payload(self, index: int, what: str) -> Payload:
        """The constant in operand ``index``; raises InputError for what is computed at run time."""
        value = self.at(index)
        if not value.is_const or value.payload is None:
            raise InputError(
                f"{self.op.name} '{self.label}': the {what} {value!r} is no constant, and the kernel would not pack "
                "it; fold the constants first"
            )
        return value.payload

    # -- constants -------------------------------------------------------------------------------------------

    def const(self, suffix: str, payload: Payload) -> Value:
        """``payload`` as the constant ``<site>.<suffix>``."""
        root = self.op.graph.root
        return root.add_const(root.fresh(f"{self.label}.{suffix}"), payload)
