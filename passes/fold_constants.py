"""Turn a quantize of a constant into constant codes. Nothing is read here: the codes are a recorded computation.

A dequantize of a constant is never folded: that would write the float weight back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Op, Value
from qcompiler.numerics import quantize
from qcompiler.payload import ComputedPayload, Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.weights import WeightQuantization


def _codes(x: Payload, scale: Payload, zero: Payload | None, scheme: Scheme) -> Payload:
    """The codes of ``x``: a result of the computation that made the scale, where that is how it was made."""
    if isinstance(scale, ComputedPayload) and isinstance(scale.computation, WeightQuantization):
        if scale.computation.weight is x and scale.computation.scheme == scheme and not scale.computation.flip:
            return scale.computation.outputs()[0]
    inputs = [x, scale] if zero is None else [x, scale, zero]

    def run(x: Payload, scale: Payload, zero: Payload | None = None):  # type: ignore[no-untyped-def]
        return quantize(x.array(), scale.array(), None if zero is None else zero.array(), scheme)

    return computed(f"quantize<{scheme}>", run, inputs, scheme.dtype, x.shape)


@rule("q.quantize")
def fold_quantize(op: Op, rw: Rewriter) -> Value:
    """q.quantize(const, s, z)  ->  const codes"""
    x, scale, zero = op.operand(0), op.operand(1), op.operand(2)
    for value in (x, scale, zero):
        if value is not None and not value.is_const:
            raise rw.declined(f"{value!r} is no constant", quiet=True)
    if x is None or scale is None or x.payload is None or scale.payload is None:
        raise rw.declined("no constant operands", quiet=True)
    zeros = None if zero is None else zero.payload
    return rw.const(op.result.name, _codes(x.payload, scale.payload, zeros, op.attrs["scheme"]), x.graph)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Quantize constants, lazily; the float original goes when nothing else reads it."""

    name: ClassVar[str] = "fold-constants"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [fold_quantize], log=ctx.refusals)
