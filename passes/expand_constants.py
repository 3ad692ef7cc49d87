"""Write constants that no kernel reads as codes in float: biases, factors of element-wise ops, tables of positions.

The weights of products, convolutions and lookups are never expanded: those are what kernels read as codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.dtypes import F32, Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.movement import movement_kind
from qcompiler.numerics import dequantize
from qcompiler.payload import Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.views import kind_of


def _reads_weight(op: Op, seen: frozenset[Op] = frozenset()) -> bool:
    """``op`` is a product or the like, or moves what one reads."""
    if movement_kind(op) is not None and op.name != "onnx.Gather":
        return any(_reads_weight(u, seen | {op}) for r in op.results for u in r.users if u not in seen)
    return kind_of(op) is not None or op.name.startswith("q.")


@rule("q.dequantize")
def expand_constant(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(const, s, z)  ->  the float constant   for one that nothing multiplies as a weight"""
    codes, scale, zero = op.operand(0), op.operand(1), op.operand(2)
    known = [v for v in (codes, scale, zero) if v is not None]
    if codes is None or not all(v.is_const and v.payload is not None for v in known) or op.result.is_output:
        raise rw.declined("no constant codes", quiet=True)
    shape = codes.tensor.static_shape or ()
    if len(shape) >= 2 and any(_reads_weight(u) for u in op.result.users):
        raise rw.declined("a weight keeps its codes", quiet=True)
    scheme: Scheme = op.attrs["scheme"]
    element = op.result.tensor.dtype or F32

    def run(*parts: Payload) -> Array:
        arrays = [p.array() for p in parts]
        return dequantize(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, scheme, element)

    payloads = [v.payload for v in known if v.payload is not None]
    return rw.const(f"{codes.name}.float", computed(f"dequantize<{scheme}>", run, payloads, element, shape))


@dataclass(frozen=True)
class ExpandConstants(Pass):
    """Dequantized constants that no kernel took, and that are no weights  ->  float constants; exact."""

    name: ClassVar[str] = "expand-constants"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [expand_constant], log=ctx.refusals)
