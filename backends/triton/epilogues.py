"""Ops right behind a product, computed by the product's kernel while its sums are in registers.

Each rule takes one op into the call before it: a function of the result (relu, silu, gelu), a product with a tensor of
the same shape (SwiGLU), a sum with one (a residual connection), in this order. The result is rounded once, at the end,
and not after each op. Calls move behind whatever they now read, so nothing that is written to in place is touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from qcompiler.backends.torch.held import argument
from qcompiler.backends.torch.nodes_triton import A8_LINEAR, MUL, RESIDUAL, SLOTS, WN_LINEAR
from qcompiler.functional import unsteady
from qcompiler.ir import Attr, Graph, Hole, Op, Value
from qcompiler.pipeline import Context
from qcompiler.rewrite import Rewriter, Rule, apply_rules, rule

PRODUCTS = {f"{call}.default": SLOTS[call].form + 1 for call in (WN_LINEAR, A8_LINEAR)}
"""Calls that take an epilogue, and where the word for its function stands."""


def absorb(graph: Graph, ctx: Context) -> None:
    """Apply the rules to ``graph`` and its regions, and note what the kernels now compute."""
    written = unsteady(graph)
    counts: Counter[str] = Counter()
    for r in (absorb_function, absorb_factor, absorb_summand):
        fired = apply_rules(graph, [_steady(r, written)])
        counts[r.name.removeprefix("absorb_")] += fired
    for op in [op for op in graph.walk() if op.name in PRODUCTS and not any(r.uses for r in op.results)]:
        op.erase()  # no operator outside torch's own is taken for one without effects
    told = [f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items() if count]
    if told:
        ctx.notes.append(f"computed by the kernels of the products before them: {', '.join(told)}")


def _steady(r: Rule, written: set[Value]) -> Rule:
    """``r``, except on what is written to in place."""

    def apply(op: Op, rw: Rewriter) -> Any:
        near = [*op.operands, *op.results, *[v for x in op.operands if x and x.owner for v in x.owner.operands]]
        if any(v in written for v in near if v is not None):
            raise rw.declined(f"'{op.label}' reads what is written to in place")
        return r.apply(op, rw)

    apply.__name__ = r.name
    return Rule(r.roots, apply)


@rule("aten.relu.default", "aten.silu.default", "aten.gelu.default")
def absorb_function(op: Op, rw: Rewriter) -> Value:
    """f(product(x, w, b))  ->  product(x, w, b, f)"""
    product = _maker(op.operand(0), op)
    if product is None:
        raise rw.declined("no product before it, or others read its result too", quiet=True)
    if any(argument(product, i) is not None for i in (MUL, RESIDUAL)) or _function(product) != "none":
        raise rw.declined("something else is computed behind the product first", quiet=True)
    name = op.name.split(".")[1]
    if name == "gelu":
        how = dict(op.attrs.get("kwargs", ())).get("approximate", argument(op, 1) or "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(how), "")
    if not name:
        raise rw.declined(f"'{op.label}' is another gelu than the kernels know")
    return _with(product, rw, PRODUCTS[product.name], name)


@rule("aten.mul.Tensor")
def absorb_factor(op: Op, rw: Rewriter) -> Value:
    """product(x, w, b, f) * y  ->  product(x, w, b, f, y)"""
    return _second(op, rw, MUL, lambda p: argument(p, MUL) is None and argument(p, RESIDUAL) is None)


@rule("aten.add.Tensor")
def absorb_summand(op: Op, rw: Rewriter) -> Value:
    """product(x, w, b, f, y) + z  ->  product(x, w, b, f, y, z)"""
    if dict(op.attrs.get("kwargs", ())).get("alpha", 1) != 1:
        raise rw.declined(f"'{op.label}' scales what it adds", quiet=True)
    return _second(op, rw, RESIDUAL, lambda p: argument(p, RESIDUAL) is None)


def _second(op: Op, rw: Rewriter, place: int, free: Callable[[Op], bool]) -> Value:
    """``op`` of a product and another tensor; of two products the one with a function, else the first."""
    kind, found = op.result.type, []
    for value, other in ((op.operand(0), op.operand(1)), (op.operand(1), op.operand(0))):
        product = _maker(value, op)
        if product is not None and other is not None and other is not value and free(product) and other.type == kind:
            found.append((product, other))
    if not found:
        raise rw.declined("no product whose kernel could do this", quiet=True)
    product, other = max(found, key=lambda pair: _function(pair[0]) != "none")
    return _with(product, rw, place, other)


def _maker(value: Value | None, op: Op) -> Op | None:
    """The product that makes ``value`` for ``op`` alone, in the type and shape of its result."""
    product = None if value is None else value.owner
    if value is None or product is None or product.name not in PRODUCTS or product.graph is not op.graph:
        return None
    alone = len(value.uses) == 1 and not value.is_output
    return product if alone and value.type == op.result.type and value.tensor.shape is not None else None


def _function(product: Op) -> str:
    return str(argument(product, PRODUCTS[product.name]))


def _with(product: Op, rw: Rewriter, place: int, given: Value | str) -> Value:
    """The call of ``product`` with another argument at ``place``, before the op that it takes in."""
    operands: list[Value | None] = []
    args: list[Attr] = []
    for i, held in enumerate(product.attrs["args"]):
        value = given if i == place else product.operands[held.index] if isinstance(held, Hole) else held
        if isinstance(value, Value):
            operands.append(value)
            value = Hole(len(operands) - 1)
        args.append(value)
    made = rw.op(product.name, *operands, type=rw.root.result.type, args=tuple(args))
    assert made.owner is not None
    made.owner.loc = product.loc
    return made
