"""Write every fused op as its kernel's own node, weights in the kernel's layout (a lossless function of the codes)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompiler.errors import RecipeError
from qcompiler.ir import Graph, Op, Value
from qcompiler.pipeline import Context, Pass
from qcompiler.requests import REQUESTABLE, request_of
from qcompiler.rewrite import erase_dead, take_name
from qcompiler.speeds import ACTIVATION
from qcompiler.target import Choice, Request, Target
from qcompiler.verify.findings import Finding

Entry = Callable[[Op, Choice], Value | Sequence[Value]]


def entry_point(choice: Choice) -> Entry:
    """The function ``module:name`` that writes the kernel's node."""
    found: Entry = _function(choice.row.entry)
    return found


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def asked(op: Op) -> Request:
    """The request that a fused op makes of a kernel."""
    return request_of(op)


def is_lowered(op: Op) -> bool:
    """Ops that a kernel's node stands for. Quantizing a constant is not: that is the work of fold-constants, and a
    dequantized one is a weight that nothing fused."""
    first = op.operand(0)
    folded = op.name in ("q.quantize", "q.dequantize") and first is not None and first.is_const
    return op.name in REQUESTABLE and not folded


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Lower every ``q.*`` op that a row serves. ``kernel`` names the row to use; when empty, the ranks decide."""

    name: ClassVar[str] = "choose-layout"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "layout"
    kernel: str = ""

    def run(self, graph: Graph, ctx: Context) -> None:
        target = ctx.need_target("choose-layout")
        if self.kernel:
            target.row(self.kernel)
        behind: dict[str, None] = {}
        for op in [o for o in graph.walk() if is_lowered(o)]:
            if op.erased:
                continue
            choice = self._choose(op, target, ctx)
            name = str(op.attrs.get("site", ""))
            site = ctx.ledger[name] if name in ctx.ledger else None
            if choice is None:
                if not name:
                    _refuse(op, target, ctx)
                continue
            element = asked(op).activation.name
            _replace(op, entry_point(choice)(op, choice))
            behind |= {row.behind: None for _, row in choice.rows if row.behind}
            if site is not None:
                site.status, site.kernel = "fused", choice.kernels()
                site.stats[ACTIVATION] = element
        for path in behind:
            _function(path)(graph, ctx)

    def _choose(self, op: Op, target: Target, ctx: Context) -> Choice | None:
        request = asked(op)
        if self.kernel and (row := target.row(self.kernel)).op == op.name:
            reasons = [r for p in ctx.phases for r in row.why_not(request, target.features, p.m)]
            if reasons:
                raise RecipeError(f"choose-layout.kernel: '{op.attrs.get('site', op.label)}': {reasons[0].message}")
            return Choice(tuple((p, row) for p in ctx.phases))
        name = str(op.attrs.get("site", ""))
        wish = ctx.ledger[name].wish if name in ctx.ledger else ""
        return _wished(wish, request, target, ctx) or target.choose(request, ctx.phases)


def _wished(wish: str, request: Request, target: Target, ctx: Context) -> Choice | None:
    """The row that a site asks for, where the target has it and it serves every phase."""
    for row in target.rows_for(request.op) if wish else ():
        if row.name.rpartition("/")[2] == wish:
            if not any(row.why_not(request, target.features, p.m) for p in ctx.phases):
                return Choice(tuple((p, row) for p in ctx.phases))
    return None


def _replace(op: Op, new: Value | Sequence[Value]) -> None:
    """Put ``new`` in the place of the results of ``op``, which take its names."""
    pairs = list(zip(op.results, [new] if isinstance(new, Value) else new, strict=True))
    for old, value in pairs:
        old.replace_uses(value)
    erase_dead(op)
    for old, value in pairs:
        take_name(old, value, [o for o in [value.owner] if o is not None])


def _refuse(op: Op, target: Target, ctx: Context) -> None:
    """Say why an op that belongs to no site has no kernel: it could not be written."""
    why = target.why_not(asked(op), ctx.phases)
    message = f"{op.name} has no kernel on {target}"
    for reason in why[:1]:
        ctx.findings.append(Finding(reason.code, op.label, message, reason.message, reason.fix))
