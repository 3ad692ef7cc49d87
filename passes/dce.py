"""Dead code elimination: ops and constants that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import erase_dead


@dataclass(frozen=True)
class Dce(Pass):
    """Erase pure ops without used results, last first, then unused constants."""

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, ctx: Context) -> None:
        for g in reversed(list(graph.graphs())):
            for op in reversed(g):
                if not op.erased:
                    erase_dead(op)
        for g in graph.graphs():
            for value in list(g.consts.values()):
                if not value.uses:
                    g.remove_const(value)
