"""Move dequantizes down through data movement, so that they stand right before what computes with their result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.ir import Graph, Op, TensorType, Value
from qcompiler.payload import Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.views import LINEAR_OPS


def permuted(payload: Payload, perm: tuple[int, ...]) -> Payload:
    """The payload with its axes in the order ``perm``; nothing is read now."""
    shape = tuple(payload.shape[i] for i in perm)
    return computed(f"transpose{list(perm)}", lambda p: p.array().transpose(perm), [payload], payload.dtype, shape)


def reshaped(payload: Payload, shape: tuple[int, ...]) -> Payload:
    """The payload with another shape of as many elements; nothing is read now."""
    return computed(f"reshape{list(shape)}", lambda p: p.array().reshape(shape), [payload], payload.dtype, shape)


def _dequantize(rw: Rewriter, dq: Op, scheme: Scheme, moved: list[Value | None], shape: tuple[int, ...]) -> Value:
    element = dq.result.tensor.dtype
    attrs = {**dq.attrs, "scheme": scheme}
    return rw.op("q.dequantize", *moved, type=TensorType(element, shape), hint=f"{dq.result.name}_moved", **attrs)


def _constants(op: Op, dq: Op, rw: Rewriter) -> tuple[Value, Value, Value | None]:
    codes, scale, zero = dq.operand(0), dq.operand(1), dq.operand(2)
    constant = all(v is None or (v.is_const and v.payload is not None) for v in (codes, scale, zero))
    if codes is None or scale is None or not constant:
        raise rw.declined(f"'{op.label}' moves a tensor whose codes or parameters are no constants", code="QC102")
    return codes, scale, zero


def _move(rw: Rewriter, value: Value | None, how: str, payload: Payload | None) -> Value | None:
    return None if value is None or payload is None else rw.const(f"{value.name}_{how}", payload, value.graph)


@rule("onnx.Transpose")
def through_transpose(op: Op, rw: Rewriter) -> Value:
    """transpose(q.dequantize(c, s, z))  ->  q.dequantize(transpose(c), transpose(s), transpose(z))"""
    dq = rw.expect(op.operand(0), "q.dequantize")
    codes, scale, zero = _constants(op, dq, rw)
    scheme: Scheme = dq.attrs["scheme"]
    if codes.tensor.rank == 2 and op.result.users and all(u.name in LINEAR_OPS for u in op.result.users):
        raise rw.declined("a linear layer reads its weight through the transpose", quiet=True)
    rank = len(codes.tensor.shape or ())
    perm = tuple(op.attrs.get("perm", range(rank)[::-1]))
    axis = None if scheme.axis is None else perm.index(scheme.axis % rank)
    along = scheme.granularity == "group"
    moved: list[Value | None] = []
    for value, permute in ((codes, True), (scale, along), (zero, along)):
        if value is None or not permute:
            moved.append(value)
            continue
        assert value.payload is not None
        moved.append(_move(rw, value, "t", permuted(value.payload, perm)))
    assert moved[0] is not None
    shape = moved[0].tensor.static_shape
    assert shape is not None
    return _dequantize(rw, dq, replace(scheme, axis=axis), moved, shape)


@rule("onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Flatten")
def through_reshape(op: Op, rw: Rewriter) -> Value:
    """reshape(q.dequantize(c, s, z))  ->  q.dequantize(reshape(c), reshape(s), reshape(z))

    where a per-tensor scale, or unit dimensions that come and go, leave the groups as they are; and where blocks
    ``[.., G, g]`` with one scale each are laid out as the groups of one axis ``[.., G * g]``.
    """
    dq = rw.expect(op.operand(0), "q.dequantize")
    codes, scale, zero = _constants(op, dq, rw)
    scheme: Scheme = dq.attrs["scheme"]
    old, new = codes.tensor.static_shape, op.result.tensor.static_shape
    if old is None or new is None:
        raise rw.declined(f"'{op.label}' reshapes to a shape that is not known before it runs", code="QC102")
    moved_scheme, small = _reshaped_scheme(scheme, old, new)
    if moved_scheme is None:
        message = f"'{op.label}' reshapes {list(old)} to {list(new)} across the groups of <{scheme}>"
        raise rw.declined(message, code="QC102")
    assert codes.payload is not None
    moved = [_move(rw, codes, "r", reshaped(codes.payload, new))]
    for value in (scale, zero):
        kept = value is None or value.payload is None or value.payload.shape == small
        moved.append(value if kept or value is None else _move(rw, value, "r", reshaped(value.payload, small)))  # type: ignore[arg-type]
    return _dequantize(rw, dq, moved_scheme, moved, new)


def _reshaped_scheme(
    scheme: Scheme, old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[Scheme | None, tuple[int, ...]]:
    """The scheme after the reshape and the shape of its parameters; None where groups would be cut."""
    if scheme.granularity == "tensor":
        return scheme, ()
    axis = (scheme.axis or 0) % len(old)
    if scheme.granularity == "group" and axis == len(old) - 1 and scheme.group == (old[-1],) and len(old) >= 2:
        if new == (*old[:-2], old[-2] * old[-1]):  # blocks [.., G, g] laid out as groups of one axis
            return replace(scheme, axis=len(new) - 1), (*old[:-2], old[-2])
    if [d for d in old if d != 1] != [d for d in new if d != 1] or old[axis] == 1:
        return None, ()
    position = [i for i, d in enumerate(old) if d != 1].index(axis)
    new_axis = [i for i, d in enumerate(new) if d != 1][position]
    if scheme.granularity == "channel":
        return replace(scheme, axis=new_axis), (new[new_axis],)
    groups = scheme.groups(old[axis])
    return replace(scheme, axis=new_axis), (*new[:new_axis], groups, *new[new_axis + 1 :])


@dataclass(frozen=True)
class PropagateQdq(Pass):
    """Move every dequantize of a constant through transposes and reshapes that keep its groups whole."""

    name: ClassVar[str] = "propagate-qdq"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [through_transpose, through_reshape], log=ctx.refusals)
