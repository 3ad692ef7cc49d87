"""aten graphs that write in place, in functional form where that is safe; and which values a write may still change.

``torch.export`` keeps ``relu_(x)`` and ``x.add_(y)`` as they are written. A value that is written to means one thing
before the write and another after it, so nothing may be moved across. Functional graphs have no such values.
"""

from __future__ import annotations

from collections.abc import Hashable

from qcompiler.ir import Atom, Attr, Graph, Op, Use, Value
from qcompiler.movement import CONCAT, PERMUTE, REPEAT, SELECT
from qcompiler.views import CONV_OPS, LINEAR_OPS


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


IN_PLACE = _names(
    "relu_.default relu6_.default hardtanh_.default hardswish_.default hardsigmoid_.default leaky_relu_.default "
    "elu_.default silu_.default sigmoid_.default tanh_.default clamp_.default clamp_min_.default "
    "add_.Tensor add_.Scalar sub_.Tensor sub_.Scalar mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar"
)
"""Ops that write their result to operand 0 and have a functional form of the same arguments."""
FRESH = (
    frozenset(op for op in LINEAR_OPS | CONV_OPS if op.startswith("aten."))
    | frozenset(name.replace("_.", ".") for name in IN_PLACE)
    | CONCAT
    | _names(
        "batch_norm.default layer_norm.default group_norm.default native_layer_norm.default gelu.default mean.dim "
        "max_pool2d.default avg_pool2d.default adaptive_avg_pool2d.default embedding.default bmm.default softmax.int "
        "scaled_dot_product_attention.default _native_batch_norm_legit_no_training.default"
    )
)
"""Ops whose result is memory of its own, never a view of an operand."""
VIEWS = frozenset(op for op in (PERMUTE | REPEAT | SELECT) - FRESH if op.startswith("aten.")) - _names("clone.default")
"""Ops whose result may be a view of operand 0."""
_SHARED = _names(
    "view.default _unsafe_view.default t.default permute.default transpose.int unsqueeze.default squeeze.dim "
    "flatten.using_ints"
)


def make_functional(graph: Graph) -> int:
    """relu_(x), and x from then on  ->  y = relu(x), and y   where no view of x is around; returns how many."""
    made = 0
    for g in graph.graphs():
        if not any(op.name in IN_PLACE for op in g):
            continue
        place = {op: i for i, op in enumerate(g)}
        for op in g:
            if op.name in IN_PLACE and _is_alone(op, place):
                _rewrite(op, place)
                made += 1
    return made


def _is_alone(op: Op, place: dict[Op, int]) -> bool:
    """Operand 0 is memory of its own, and what reads it before ``op`` makes no view of it."""
    x = op.operand(0)
    maker = None if x is None else x.owner
    if x is None or maker is None or maker not in place or maker.name not in FRESH:
        return False
    for value in op.operands[1:]:
        if value is x or (value is not None and value.tensor.rank != 0 and value.tensor.dtype != x.tensor.dtype):
            return False  # the functional form would have another type
    users = [u for u in x.users if u is not op]
    return all(u in place for u in users) and all(u.name in FRESH for u in users if place[u] < place[op])


def _rewrite(op: Op, place: dict[Op, int]) -> None:
    x = op.operands[0]
    assert x is not None
    op.name = op.name.replace("_.", ".")
    op.meta.pop("effect", None)

    def later(use: Use) -> bool:
        return not isinstance(use.user, Op) or place[use.user] > place[op]

    x.replace_uses(op.result, [use for use in list(x.uses) if use.user is not op and later(use)])


def unsteady(graph: Graph) -> set[Value]:
    """The values that an op of ``graph`` writes to, and what shares memory with them."""
    writers = [op for op in graph.walk() if op.meta.get("effect") == "write"]
    out: set[Value] = set()
    work = [v for op in writers for v in (*op.operands, *op.results) if v is not None and v.tensor.dtype is not None]
    while work:
        value = work.pop()
        if value in out:
            continue
        out.add(value)
        maker = value.owner
        if maker is not None and maker.name not in FRESH and (source := maker.operand(0)) is not None:
            work.append(source)
        work += [r for u in value.users if u.name in VIEWS for r in u.results]
    return out


def drop_checks(graph: Graph) -> int:
    """Take away checks that a tensor has the element type that the graph says it has; returns how many went.

    ``torch.export`` writes one before each ``.to()``. On a weight it would keep the float original alive.
    """
    gone = 0
    for op in list(graph.walk()):
        value = op.operand(0)
        if op.name != "aten._assert_tensor_metadata.default" or value is None or any(r.uses for r in op.results):
            continue
        asked = [a for a in (*op.attrs.get("args", ())[1:], *_kept(op)) if isinstance(a, Atom)]
        known = value.tensor.dtype
        if known is not None and all(a.kind != "torch.dtype" or _is(a.text, known.name) for a in asked):
            op.erase()
            gone += 1
    return gone


def _kept(op: Op) -> list[Attr]:
    return [v for _, v in op.attrs.get("kwargs", ())]


def _is(torch_name: str, name: str) -> bool:
    """``float32`` and ``f32``, ``bfloat16`` and ``bf16``, ``int8`` and ``int8``."""
    return torch_name in (name, name.replace("bf", "bfloat"), name.replace("f", "float", 1))


def share_views(graph: Graph) -> int:
    """Of two equal views of one value keep the first: what reads them reads one value. Returns how many went."""
    gone = 0
    for g in graph.graphs():
        first: dict[Hashable, Op] = {}
        for op in g:
            if op.name not in _SHARED or op.result.is_output:
                continue
            kept = first.setdefault((op.name, op.operands, tuple(sorted(op.attrs.items(), key=str))), op)
            if kept is not op:
                op.result.replace_uses(kept.result)
                op.erase()
                gone += 1
    return gone
