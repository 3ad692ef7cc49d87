"""Where a division of an activation's channels can go, so that it costs nothing: into the constants of what makes it.

``y / s``, channel by channel along the last axis, equals the same op on other constants, or the same op on an operand
divided by ``s``::

    norm(x) * w + b   ->  norm(x) * (w / s) + b / s            x * c  ->  x * (c / s)         c constant [.., K]
    x @ W^T + b       ->  x @ (W / s)^T + b / s  (rows)        a * b  ->  (a / s) * b         (a SwiGLU's up side)
    relu(x)           ->  relu(x / s)   for s > 0              x + c  ->  x / s + c / s

so do reshapes and transposes that leave the last axis alone. What a division cannot pass is refused with the reason.
A value on the way must have no reader but the next one: others would see it divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcompiler.dtypes import F32, Array
from qcompiler.ir import Graph, Op, Use, Value
from qcompiler.norm_views import as_norm
from qcompiler.payload import constant
from qcompiler.rewrite import Declined
from qcompiler.smoothing import Rescaled
from qcompiler.spec import is_float_const
from qcompiler.views import LINEAR_OPS, LinearView, as_linear, through_transposes

MOVES = frozenset({"onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Flatten", "onnx.Identity", "onnx.Transpose"})
MOVES_ATEN = frozenset(
    {"aten.view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten._unsafe_view.default"}
)
MULTIPLY = frozenset({"onnx.Mul", "aten.mul.Tensor"})
ADD = frozenset({"onnx.Add", "aten.add.Tensor"})
DIVIDE = frozenset({"onnx.Div", "aten.div.Tensor"})
HOMOGENEOUS = frozenset({"onnx.Relu", "onnx.LeakyRelu", "onnx.Neg", "aten.relu.default", "aten.neg.default"})
"""``f(x / s) == f(x) / s`` for every s > 0."""
NODES = frozenset({"layer", "rms"})


@dataclass(frozen=True, eq=False)
class Edit:
    """Operand ``slot`` of ``op``, a float constant, is to be divided along ``axis`` by the factors of a group."""

    op: Op
    slot: int
    axis: int = -1


@dataclass(frozen=True, eq=False)
class Group:
    """Linears that read the same values: ``source``, as it is or moved without touching its last axis.

    ``k`` is the length of that axis, ``inputs`` the values that the linears read (``source`` itself, mostly),
    ``others`` the readers of ``source`` that are none of the linears.
    """

    source: Value
    linears: tuple[LinearView, ...]
    k: int
    others: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(dict.fromkeys(lin.x for lin in self.linears))

    @property
    def weights(self) -> tuple[LinearView, ...]:
        """One linear for each weight."""
        return tuple({lin.weight: lin for lin in self.linears}.values())


def last(value: Value) -> int | None:
    """The size of the last axis, where it is a number."""
    shape = value.tensor.shape
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def moved_from(op: Op) -> Value | None:
    """What ``op`` only moves, the last axis staying as it is; None for any other op."""
    source = op.operand(0)
    if source is None or len(op.results) != 1 or op.name not in MOVES | MOVES_ATEN:
        return None
    if op.name == "onnx.Transpose":
        perm = op.attrs.get("perm")
        kept = perm is not None and tuple(perm)[-1] == len(tuple(perm)) - 1
        return source if kept else None
    # elements stay in order, so rows of one length stay the same rows
    return source if last(source) is not None and last(source) == last(op.result) else None


def find_groups(linears: list[LinearView]) -> list[Group]:
    """The linears by the value they read, in graph order; each must be one whose weight may be rescaled."""
    by_source: dict[Value, list[LinearView]] = {}
    for lin in linears:
        by_source.setdefault(_source(lin.x), []).append(lin)
    groups = []
    for source, members in by_source.items():
        others = tuple(_others(source, {lin.op for lin in members}))
        groups.append(Group(source, tuple(members), members[0].k, others))
    return groups


def _source(x: Value) -> Value:
    while x.owner is not None and (before := moved_from(x.owner)) is not None and before.graph is x.graph:
        x = before
    return x


def _others(value: Value, members: set[Op]) -> Iterator[str]:
    """The readers of ``value``, moved or not, that are no members."""
    for use in value.uses:
        if isinstance(use.user, Graph):
            yield f"the output '{value.name}'"
        elif use.user in members and use.slot == _x_slot(use.user, value):
            continue
        elif use.slot == 0 and use.user.graph is value.graph and moved_from(use.user) is value:
            yield from _others(use.user.result, members)
        else:
            yield f"{use.user.name} '{use.user.label}'"


def _x_slot(op: Op, x: Value) -> int:
    """The operand through which a linear reads its activation."""
    return next(i for i, v in enumerate(op.operands) if v is x)


def why_not_rescaled(lin: LinearView, members: set[Op]) -> str | None:
    """Why the weight of a linear cannot be multiplied in place; None where it can. ``members`` are all the linears
    that it may be multiplied for."""
    weight = lin.weight
    if not is_float_const(weight) or weight.payload is None:
        return "its weight is no float constant"
    if weight.tensor.dtype is not F32:
        return f"its weight is {weight.tensor.dtype}, and a rescale is exact enough in f32 alone"
    if lin.x.tensor.dtype not in (F32, None):
        return f"its input is {lin.x.tensor.dtype}, not f32"
    for reader in _weight_readers(weight):
        if reader not in members:
            who = reader if isinstance(reader, str) else f"{reader.name} '{reader.label}'"
            return f"its weight {weight!r} is tied: {who} reads it too"
    return None


def _weight_readers(weight: Value) -> Iterator[Op | str]:
    """The ops that read a weight, transposes and identities of it looked through; text for an output."""
    for use in weight.uses:
        if isinstance(use.user, Graph):
            yield f"the output '{weight.name}'"
        elif any(through_transposes(r)[0] is weight for r in use.user.results):
            yield from _weight_readers(use.user.result)
        else:
            yield use.user


# -- folding -----------------------------------------------------------------------------------------------------


def fold(group: Group) -> list[Edit]:
    """The constants to divide so that ``group.source`` comes out divided; raises Declined with the reason."""
    if group.others:
        raise Declined(f"its input {group.source!r} is read by {group.others[0]} too, which needs it as it is")
    return _fold(group.source, group.k)


def _fold(value: Value, k: int) -> list[Edit]:
    op = value.owner
    if op is None:
        raise Declined(f"{value!r} comes from outside the graph, and nothing before it takes a factor")
    if op.name in MULTIPLY:
        return _through_product(op, k)
    if op.name in ADD:
        return _through_sum(op, k)
    if op.name in DIVIDE:
        return _through_quotient(op, k)
    if op.name in LINEAR_OPS:
        return _into_linear(op)
    if op.name in HOMOGENEOUS or moved_from(op) is not None:
        return _fold(_inner(op, op.operand(0), k), k)
    try:
        norm = as_norm(op)
    except Declined as e:
        raise _stops(op) if e.quiet else e from None
    if norm.kind not in NODES or norm.axis != -1 or norm.k != k or op.results[0] is not value:
        raise _stops(op)
    bias = [] if norm.bias_op is None or norm.bias_slot is None else [Edit(norm.bias_op, norm.bias_slot)]
    return [Edit(norm.scale_op, norm.scale_slot), *bias]


def _stops(op: Op) -> Declined:
    return Declined(f"{op.name} '{op.label}' does not commute with a factor for each channel")


def _inner(op: Op, value: Value | None, k: int) -> Value:
    """An operand on the way, which nothing else may read."""
    if value is None or value.owner is None or last(value) != k or value.graph is not op.graph:
        raise Declined(f"{op.name} '{op.label}' has no computed operand [.., {k}]")
    if len(value.uses) != 1:
        raise Declined(f"{value!r}, before {op.name} '{op.label}', has {len(value.uses)} readers")
    return value


def _is_row(value: Value | None, k: int) -> bool:
    """A float constant whose last axis runs over the channels."""
    return is_float_const(value) and value is not None and value.tensor.static_shape is not None and last(value) == k


def _is_number(value: Value | None) -> bool:
    """One factor for all channels: a constant of one element, or a number written into the call."""
    return value is None or (value.is_const and value.payload is not None and value.payload.size == 1)


def _through_product(op: Op, k: int) -> list[Edit]:
    left, right = op.operand(0), op.operand(1)
    for slot, value in ((0, left), (1, right)):
        if _is_row(value, k):
            return [Edit(op, slot)]
    reasons = []
    for value, other in ((left, right), (right, left)):
        if value is None or value is other or _is_number(value):
            continue
        try:
            return _fold(_inner(op, value, k), k)
        except Declined as e:
            reasons.append(e.reason.message)
    raise Declined("; ".join(reasons) or _stops(op).reason.message)


def _through_sum(op: Op, k: int) -> list[Edit]:
    if dict(op.attrs.get("kwargs", ())).get("alpha", 1) != 1:
        raise _stops(op)
    for slot, inner in ((0, 1), (1, 0)):
        if _is_row(op.operand(slot), k):
            return [*_fold(_inner(op, op.operand(inner), k), k), Edit(op, slot)]
    raise _stops(op)


def _through_quotient(op: Op, k: int) -> list[Edit]:
    divisor = op.operand(1)
    if dict(op.attrs.get("kwargs", ())).get("rounding_mode") is not None:
        raise _stops(op)
    if not _is_number(divisor) and (divisor is None or last(divisor) != 1):
        raise _stops(op)
    return _fold(_inner(op, op.operand(0), k), k)


def _into_linear(op: Op) -> list[Edit]:
    try:
        lin = as_linear(op)
    except Declined as e:
        raise _stops(op) if e.quiet else e from None
    if (reason := why_not_rescaled(lin, {op})) is not None:
        raise Declined(f"{op.name} '{op.label}' makes it, and {reason}")
    bias: list[Edit] = []
    if lin.bias is not None:
        if not _is_row(lin.bias, lin.n):
            raise Declined(f"{op.name} '{op.label}' makes it, and its bias is no constant [{lin.n}]")
        bias = [Edit(op, next(i for i, v in enumerate(op.operands) if v is lin.bias))]
    slot = next(i for i, v in enumerate(op.operands) if v is not None and through_transposes(v)[0] is lin.weight)
    return [Edit(op, slot, 1 - lin.axis), *bias]


# -- applying ------------------------------------------------------------------------------------------------------


def rescale_inputs(group: Group, factors: Array) -> None:
    """Multiply the columns of the group's weights by ``factors[K]``, as recorded computations."""
    for lin in group.weights:
        _rescale(lin.weight, factors, lin.axis)


def apply_edits(edits: list[Edit], factors: Array) -> list[Op]:
    """Divide the constants of ``edits`` by ``factors``; the ops whose results are divided with them."""
    inverse = inverse_of(factors)
    for edit in edits:
        value = edit.op.operand(edit.slot)
        assert value is not None
        stored, _ = through_transposes(value)
        if len(stored.uses) > 1 and stored is value:  # a small constant that others read as it is
            assert value.payload is not None
            copy = value.graph.add_const(value.graph.fresh(f"{value.name}_smooth"), value.payload)
            copy.meta.update(value.meta)
            edit.op.set_operand(edit.slot, copy)
            stored = copy
        _rescale(stored, inverse, edit.axis)
    return [edit.op for edit in edits]


def inverse_of(factors: Array) -> Array:
    """``1 / factors`` in float32."""
    out: Array = (1.0 / factors.astype(np.float64)).astype(np.float32)
    return out


def _rescale(value: Value, factors: Array, axis: int) -> None:
    assert value.payload is not None
    value.payload = Rescaled(value.payload, factors, axis)


def insert_scale(group: Group, factors: Array) -> list[Op]:
    """linear(x)  ->  linear(q.scale(x, 1 / s))   for each value that the group's linears read; the new ops"""
    graph, made = group.source.graph, []
    factor = graph.add_const(graph.fresh(f"{group.source.name}_smooth"), constant(inverse_of(factors)))
    for x in group.inputs:
        users = [lin.op for lin in group.linears if lin.x is x]
        before = next(op for op in graph if op in set(users))
        hint = graph.fresh(f"{x.name}_scaled")
        op = graph.create("q.scale", [x, factor], {}, [(hint, x.type)], loc=before.loc, before=before)
        x.replace_uses(op.result, [Use(user, _x_slot(user, x)) for user in users])
        made.append(op)
    return made
