"""Read a graph that another tool has quantized: every spelling of quantization becomes the pair form.

Scales and codes are kept. What stays as it was is named: in the ledger where it holds a weight, as a warning else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.dtypes import Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Loc, Op, TensorType, Value
from qcompiler.passes.insert_qdq import QUANTIZED_OPS, find_sites
from qcompiler.payload import Payload, computed, constant
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Refusal, apply_rules
from qcompiler.scheme import Scheme
from qcompiler.sites import Site
from qcompiler.spellings import RULES, half, lattice, products, qdq, signs, torch_fit, torch_ops
from qcompiler.spellings.nbits import KERNEL
from qcompiler.spellings.operands import MOVES, slots, weight_of
from qcompiler.verify.findings import Finding
from qcompiler.views import CONV_OPS, EmbeddingView, LinearView, kind_of

NODES = {
    "com.microsoft.GatherBlockQuantized": "embedding",
    "onnx.QLinearConv": "conv",
    "com.microsoft.QLinearConv": "conv",
}
NODES |= dict.fromkeys(["onnx.QLinearMatMul", "onnx.MatMulInteger"], "linear")
NODES |= {
    f"com.microsoft.{n}": "linear"
    for n in ("MatMulNBits", "MatMulBnb4", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
}
"""Ops that hold a weight in low bits -> the kind of their site."""
WAS_FLOAT = "was float in the source"
DEQUANTIZE = (*qdq.DEQUANTIZE, *torch_ops.DEQUANTIZES)
FINER = "activations whose codes were of fewer bits, or symmetric, get 8 bits over their whole range at run time"


@dataclass(frozen=True)
class LiftQuantized(Pass):
    """Every QuantizeLinear, DequantizeLinear, MatMulNBits, QLinear op and so on  ->  q.quantize and q.dequantize.

    Then what kernels need of products is made so by exact steps: codes of 4 bits under quantized activations in bytes,
    weights from the left to the right. ``lattice`` looks for codes in float weights, which a simplifier may have
    folded.
    """

    name: ClassVar[str] = "lift-quantized"
    lattice: bool = True

    def run(self, graph: Graph, ctx: Context) -> None:
        log: list[Refusal] = []
        fired = apply_rules(graph, RULES, log=log)
        first, last = (torch_fit.CENTER, ()) if graph.dialect == "aten" else (half.RULES, half.LAST)
        for rules in ((*first, *products.RULES), (*last, *products.LAST)):
            fired += apply_rules(graph, rules, target=ctx.target, phases=ctx.phases, log=log)
        if self.lattice:
            fired += self._folded_back(graph)
        signs.count_from_zero(graph)
        apply_rules(graph, signs.RULES, log=log)
        if not fired and not any(QUANTIZED_OPS.match(op.name) for op in graph.walk()):
            raise InputError(
                "repair finds nothing quantized in the model that it could rewrite; compile it with a recipe that "
                "quantizes, for example w4a16"
            )
        if any(op.meta.get(torch_ops.FINER) for op in graph.walk()):
            ctx.notes.append(f"lift-quantized: {FINER}")
        self._sites(graph, ctx)
        _own_names(graph)
        self._left(graph, ctx, log)
        ctx.refusals.extend(log)

    # -- weights that were folded to float -------------------------------------------------------------------

    def _folded_back(self, graph: Graph) -> int:
        """float weight whose values lie on a lattice  ->  q.dequantize of its codes, bit for bit the same values"""
        done: dict[Value, bool] = {}
        for found in list(find_sites(graph)):
            weight = found.weight
            if weight in done or weight.payload is None or found.kind not in ("linear", "embedding", "conv"):
                continue
            done[weight] = self._fold_back(weight, _row_axis(found.op, found.view))
        return sum(done.values())

    def _fold_back(self, weight: Value, axis: int) -> bool:
        """``axis``: where the output features stand in the weight."""
        payload = weight.payload
        assert payload is not None
        rows = _rows(payload, axis)
        if min(rows.shape) < 1 or rows.shape[1] < 2:  # a row of one value is a multiple of itself
            return False
        if payload.dtype.bits > 32 or lattice.step_of(rows[0, :16]) is None:
            return False
        flat = len(payload.shape) > 2
        found = lattice.find(rows)
        if found is None or (flat and found.group):
            return False
        shape, element = payload.shape, found.element
        back = shape if axis == 0 else (shape[1], shape[0])

        def recode(p: Payload) -> Array:
            out = lattice.codes_of(_rows(p, axis), found).reshape(back)
            return out if axis == 0 else out.T

        def small(values: Array, kind: DType) -> Payload:
            values = values.reshape(-1) if not found.group else values if axis == 0 else values.T
            return constant(values, kind)

        home = weight.graph
        scheme = Scheme(
            element,
            "group" if found.group else "channel",
            found.zero is None,
            (found.group,) if found.group else (),
            (1 - axis) if found.group else axis,
        )
        operands: list[Value | None] = [
            home.add_const(home.fresh(f"{weight.name}_codes"), computed("codes", recode, [payload], element, shape)),
            home.add_const(home.fresh(f"{weight.name}_scale"), small(found.scale, payload.dtype)),
        ]
        if found.zero is not None:
            operands.append(home.add_const(home.fresh(f"{weight.name}_zero"), small(found.zero, element)))
        uses = [u for u in weight.uses if isinstance(u.user, Op)]
        made = home.create(
            "q.dequantize",
            operands,
            {"scheme": scheme},
            [(home.fresh(f"{weight.name}_dq"), TensorType(payload.dtype, shape))],
            before=next(iter(home)),
        )
        weight.replace_uses(made.result, uses)
        return True

    # -- the ledger ------------------------------------------------------------------------------------------

    def _sites(self, graph: Graph, ctx: Context) -> None:
        """A site for every product, lookup or convolution of a dequantized constant; the float ones are skipped."""
        names: dict[Op, list[str]] = {}
        for op in graph.walk():
            kind = kind_of(op)
            dq = None if kind is None else _weight_of(op)
            if kind is None or dq is None:
                continue
            n, k = _size(op, kind, dq)
            site = Site(_label(op), kind, n, k, 4 * n * k, dq.attrs["scheme"].text)
            site.weight, site.wish = dq.operand(0), str(op.meta.get(KERNEL, ""))
            name = ctx.ledger.add(site).name
            op.meta["site"] = name
            names.setdefault(dq, []).append(name)
        for dq, sites in names.items():
            dq.attrs["sites"] = tuple(sites)
        for found in find_sites(graph):
            shape = found.weight.tensor.static_shape or (0, 0)
            n, k = (found.view.n, found.view.k) if found.view is not None else (shape[0], math.prod(shape[1:]))
            payload = found.weight.payload
            site = Site(found.name, found.kind, n, k, 0 if payload is None else payload.nbytes)
            site.weight = found.weight
            ctx.ledger.skip(ctx.ledger.add(site).name, WAS_FLOAT)

    @staticmethod
    def _left(graph: Graph, ctx: Context, log: Iterable[Refusal]) -> None:
        """What no rule could lift keeps its op: the reason is told."""
        wide = [(op, made[0]) for op in graph.walk() if (made := products.wide_pair(op)) is not None]
        paired = {op for pair in wide for op in pair}  # free-activations takes them away
        lifted = [op for op in graph.walk() if QUANTIZED_OPS.match(op.name) and not op.name.startswith("q.")]
        quantized = {op.label for op in lifted if op not in paired}
        plain = {op.label for op in graph.walk() if not QUANTIZED_OPS.match(op.name)}
        for refusal in log:
            if refusal.op not in (quantized if refusal.rule.startswith(("lift_", "refuse_")) else plain):
                continue
            reason = refusal.reason
            message = f"'{refusal.op}' is left as it was"
            found = Finding(reason.code or "QC205", refusal.op, message, reason.message, reason.fix, "warning")
            if found not in ctx.findings:
                ctx.findings.append(found)
        reasons = {r.op: r.reason.message for r in log if r.rule.startswith(("lift_", "refuse_"))}
        for op in lifted:
            if op.label in reasons and op not in paired:
                _keep(op, reasons[op.label], ctx)


def _keep(op: Op, reason: str, ctx: Context) -> None:
    """A site for the weight of an op that is left as it was, or for the products that read it."""
    if op.name in NODES:
        n, k = (v if isinstance(v, int) else 0 for v in (op.attrs.get("N"), op.attrs.get("K")))
        ctx.ledger.skip(ctx.ledger.add(Site(op.label, NODES[op.name], n, k, 4 * n * k)).name, reason)
        return
    codes = op.operand(0)
    if op.name not in DEQUANTIZE or codes is None or not (codes.is_const or codes.payload is not None):
        return
    work = list(op.result.users)
    while work:
        user = work.pop(0)
        if user.name in MOVES:
            work += user.result.users
        elif (kind := kind_of(user)) is not None:
            n, k = _size(user, kind, op)
            ctx.ledger.skip(ctx.ledger.add(Site(_label(user), kind, n, k, 4 * n * k)).name, reason)


def _label(op: Op) -> str:
    """The name of the site of ``op``: of aten the module that it stands in, where that is known."""
    return (op.name.startswith("aten.") and op.loc.scope) or op.label


def _own_names(graph: Graph) -> None:
    """One op of those that a node became keeps its name: the one that holds the weight, else what is no pair."""
    by_name: dict[str, list[Op]] = {}
    for op in graph.walk():
        if op.loc.name:
            by_name.setdefault(op.loc.name, []).append(op)
    for ops in by_name.values():
        keeper = max(ops, key=lambda op: ("site" in op.meta, not op.name.startswith("q.")))
        for op in ops:
            if op is not keeper:
                op.loc = Loc("", op.loc.scope, op.loc.source)


def _weight_of(op: Op) -> Op | None:
    """The dequantize of the constant that ``op`` reads as its weight."""
    left, right = slots(op)
    first = 0 if kind_of(op) == "embedding" else right
    return weight_of(op.operand(first)) or (weight_of(op.operand(left)) if kind_of(op) == "linear" else None)


def _size(op: Op, kind: str, dq: Op) -> tuple[int, int]:
    """Output features and reduction length; rows and columns of a table."""
    held = dq.operand(0)
    if op.name.startswith("aten.") and dq.name != "q.dequantize" and held is not None and held.tensor.static_shape:
        return held.tensor.static_shape[0], math.prod(held.tensor.static_shape[1:])
    left, right = slots(op)
    slot = left if kind == "embedding" or weight_of(op.operand(right)) is None else right
    value = op.operand(slot)
    shape = None if value is None else value.tensor.static_shape
    if shape is None or len(shape) < 2:
        codes = dq.operand(0)
        shape = (0, 0) if codes is None else codes.tensor.static_shape or (0, 0)
    if kind != "linear" or op.attrs.get("transB", 0) or op.name == "aten.linear.default":
        return shape[0], math.prod(shape[1:])
    return (shape[-1], shape[-2]) if slot == right else (shape[-2], shape[-1])


def _row_axis(op: Op, view: object) -> int:
    """The axis of the output features in a stored weight: rows of a table, channels of a convolution."""
    if isinstance(view, LinearView):
        return 1 - view.axis
    if isinstance(view, EmbeddingView) or op.name in CONV_OPS:
        return 0
    return 1


def _rows(payload: Payload, axis: int) -> Array:
    """The weight as ``[output features, the rest]``."""
    array = payload.array()
    return array.reshape(len(array), -1) if axis == 0 or array.ndim > 2 else array.T
