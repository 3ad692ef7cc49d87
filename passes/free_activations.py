"""Leave activations in float whose quantize and dequantize no kernel takes as the graph states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.ir import Graph
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import apply_rules
from qcompiler.spellings import products, torch_fit


@dataclass(frozen=True)
class FreeActivations(Pass):
    """Pairs of 16-bit codes, and pairs before a product whose weight is scaled in blocks  ->  a clip to their range.

    A value moves by at most half a step of its pair. What saturated in the codes is still cut off. Of aten graphs the
    scales of 4-bit weights are rounded as torch's kernel keeps them, and their sites say so.
    """

    name: ClassVar[str] = "free-activations"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "lossy"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, products.FREE, target=ctx.target, phases=ctx.phases, log=ctx.refusals)
        if graph.dialect != "aten":
            return
        apply_rules(graph, torch_fit.ROUND, target=ctx.target, phases=ctx.phases, log=ctx.refusals)
        for op in graph.walk():
            site = str(op.meta.get("site", ""))
            if op.meta.get(torch_fit.ROUNDED) and site in ctx.ledger:
                ctx.ledger[site].reason = torch_fit.WHY_ROUNDED
