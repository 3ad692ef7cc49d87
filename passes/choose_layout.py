"""Write every fused op as its kernel's own node, weights in the kernel's layout (a lossless function of the codes)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.dtypes import F32
from qcompiler.errors import RecipeError
from qcompiler.ir import Graph, Op, Value
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import erase_dead, take_name
from qcompiler.target import Choice, Request, Target

Entry = Callable[[Op, Choice], Value]


def entry_point(choice: Choice) -> Entry:
    """The function ``module:name`` that writes the kernel's node."""
    module, _, name = choice.row.entry.partition(":")
    found: Entry = getattr(importlib.import_module(module), name)
    return found


def asked(op: Op) -> Request:
    """The request that a fused op makes of a kernel."""
    x, codes = op.operands[0], op.operands[1]
    assert x is not None and codes is not None
    n, k = codes.tensor.static_shape or (0, 0)
    activation = x.tensor.dtype if op.name == "q.linear" else op.result.tensor.dtype
    return Request(op.name, op.attrs["scheme"], n, k, activation or F32, op.operand(4) is not None)


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Lower ``q.linear`` and ``q.embedding``. ``kernel`` names the row to use; when empty, the ranks decide."""

    name: ClassVar[str] = "choose-layout"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "layout"
    kernel: str = ""

    def run(self, graph: Graph, ctx: Context) -> None:
        target = ctx.need_target("choose-layout")
        if self.kernel:
            target.row(self.kernel)
        for op in [o for o in graph.walk() if o.name in ("q.linear", "q.embedding")]:
            choice = self._choose(op, target, ctx)
            site = ctx.ledger[op.attrs["site"]] if op.attrs["site"] in ctx.ledger else None
            if choice is None:
                continue
            new = entry_point(choice)(op, choice)
            old = op.result
            old.replace_uses(new)
            erase_dead(op)
            take_name(old, new, [o for o in [new.owner] if o is not None])
            if site is not None:
                site.status, site.kernel = "fused", choice.kernels()

    def _choose(self, op: Op, target: Target, ctx: Context) -> Choice | None:
        request = asked(op)
        if self.kernel and (row := target.row(self.kernel)).op == op.name:
            reasons = [r for p in ctx.phases for r in row.why_not(request, target.features, p.m)]
            if reasons:
                raise RecipeError(f"choose-layout.kernel: '{op.attrs['site']}': {reasons[0].message}")
            return Choice(tuple((p, row) for p in ctx.phases))
        return target.choose(request, ctx.phases)
