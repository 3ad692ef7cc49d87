"""Move dequantizes down and quantizes up through data movement, so that they stand next to what computes.

Constants keep their groups on the way; activations, which are scaled per tensor, pass every op that only copies
elements (:mod:`qcompiler.movement`) and leave it to run on codes. All of it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Hole, Loc, Op, TensorType, Value
from qcompiler.movement import (
    CODES_CLIP,
    CONCAT,
    PERMUTE,
    REPEAT,
    SELECT,
    clamp,
    clips_codes,
    data_operands,
    movement_kind,
    permutation,
)
from qcompiler.numerics import quantize
from qcompiler.pairs import is_activation, same_parameters, scalar_parameters
from qcompiler.payload import Payload, computed, constant
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.spec import scale_shape
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


@rule("onnx.Transpose", "aten.t.default", "aten.numpy_T.default", "aten.transpose.int", "aten.permute.default")
def through_transpose(op: Op, rw: Rewriter) -> Value:
    """transpose(q.dequantize(c, s, z))  ->  q.dequantize(transpose(c), transpose(s), transpose(z))"""
    dq = rw.expect(op.operand(0), "q.dequantize")
    codes, scale, zero = _constants(op, dq, rw)
    scheme: Scheme = dq.attrs["scheme"]
    if codes.tensor.rank == 2 and op.result.users and all(u.name in LINEAR_OPS for u in op.result.users):
        raise rw.declined("a linear layer reads its weight through the transpose", quiet=True)
    rank = len(codes.tensor.shape or ())
    perm = permutation(op)
    if perm is None or len(perm) != rank:
        raise rw.declined(f"'{op.label}' permutes {rank} axes in a way that is not known", code="QC102")
    axis = None if scheme.axis is None else perm.index(scheme.axis % rank)
    along = scheme.granularity in ("group", "block")
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


@rule(
    *(f"onnx.{n}" for n in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")),
    *(f"aten.{n}.default" for n in ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")),
    *("aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.dim", "aten.squeeze.dims"),
)
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
    if scheme.granularity == "block":
        return (scheme, scale_shape(old, scheme)) if old == new else (None, ())
    if [d for d in old if d != 1] != [d for d in new if d != 1] or old[axis] == 1:
        return None, ()
    position = [i for i, d in enumerate(old) if d != 1].index(axis)
    new_axis = [i for i, d in enumerate(new) if d != 1][position]
    if scheme.granularity == "channel":
        return replace(scheme, axis=new_axis), (new[new_axis],)
    groups = scheme.groups(old[axis])
    return replace(scheme, axis=new_axis), (*new[:new_axis], groups, *new[new_axis + 1 :])


# -- activations ---------------------------------------------------------------------------------------------

_MOVERS = sorted(PERMUTE | REPEAT | SELECT | CONCAT | {"onnx.Pad"})
_NO_FLOATS = frozenset(
    f"aten.{n}.default" for n in ("roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
)
"""Reorderings that torch does not have for 8-bit floats. ONNX Runtime has none at all."""
_AS_COPY = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}
"""Codes may have other strides than the floats had, and a view of those may be none of these."""


def _check_floats(rw: Rewriter, mover: Op, scheme: Scheme) -> None:
    """Decline where ``scheme`` has float codes that ``mover`` may not take."""
    moves = mover.name.startswith("aten.") and movement_kind(mover) == "permute" and mover.name not in _NO_FLOATS
    if not (scheme.dtype.is_integer or moves):
        raise rw.declined(f"'{mover.label}' does not take {scheme.dtype} codes")


def _on_codes(rw: Rewriter, mover: Op, operands: list[Value | None], scheme: Scheme) -> list[Value]:
    """A copy of ``mover`` before the root that reads and gives codes of ``scheme``, under its own node name."""
    types = [TensorType(scheme.dtype, r.tensor.shape) for r in mover.results]
    names: list[str] = []
    for r in mover.results:
        name = rw.graph.fresh(f"{r.name}_codes")
        while name in names:
            name += "_"
        names.append(name)
    results = list(zip(names, types, strict=True))
    name = _AS_COPY.get(mover.name, mover.name)
    made = rw.graph.create(name, operands, mover.attrs, results, loc=mover.loc, before=rw.root)
    made.meta.update(mover.meta)
    rw.made.append(made)
    return made.results


@rule(*_MOVERS)
def sink_dequantize(op: Op, rw: Rewriter) -> list[Value]:
    """move(q.dequantize(c, s, z))  ->  q.dequantize(move(c), s, z)   per tensor; of a Concat all, with one s and z"""
    kind = movement_kind(op)
    if kind is None:
        raise rw.declined(f"'{op.label}' does not move codes", quiet=True)
    slots = data_operands(op)
    pairs = [rw.expect(op.operand(i), "q.dequantize") for i in slots]
    dq = pairs[0]
    if not all(is_activation(p) and p.attrs["scheme"].granularity == "tensor" for p in pairs):
        raise rw.declined("the dequantize of a constant, of groups or of tokens", quiet=True)
    if not all(same_parameters(dq, p) for p in pairs[1:]):
        raise rw.declined(f"'{op.label}' joins codes of different scales", quiet=True)
    _check_floats(rw, op, dq.attrs["scheme"])
    operands = list(op.operands)
    for i, p in zip(slots, pairs, strict=True):
        operands[i] = p.operand(0)
    zero = dq.operand(2)
    if kind == "pad":
        operands = [*operands, None, None][: max(3, len(operands))]
        operands[2] = zero
        while operands[-1] is None:
            operands.pop()
    moved = _on_codes(rw, op, operands, dq.attrs["scheme"])
    parameters = (dq.operand(1), zero)
    out = []
    for codes, old in zip(moved, op.results, strict=True):
        hint = f"{old.name}_dq"
        moved_dq = rw.op("q.dequantize", codes, *parameters, type=old.type, hint=hint, **dq.attrs)
        assert moved_dq.owner is not None
        # the node's own name went to what moves the codes, and a dequantize with several readers moves to each of them
        moved_dq.owner.loc = dq.loc if len(dq.result.uses) == 1 else Loc("", dq.loc.scope, dq.loc.source)
        out.append(moved_dq)
    return out


def _only_quantized(rw: Rewriter, op: Op) -> Value:
    """The operand of a static per-tensor quantize, read by nothing but quantizes of the same parameters."""
    x, scale = op.operand(0), op.operand(1)
    if x is None or scale is None or x.owner is None or x.is_output or not is_activation(op) or not scale.is_const:
        raise rw.declined("not a static quantize of an activation", quiet=True)
    if any(u is not op and not (u.name == op.name and same_parameters(u, op)) for u in x.users):
        raise rw.declined(f"{x!r} is read as a float too", quiet=True)
    if x.graph is not op.graph:
        raise rw.declined(f"{x!r} comes from an enclosing graph", quiet=True)
    return x


@rule("q.quantize")
def hoist_quantize(op: Op, rw: Rewriter) -> Value:
    """q.quantize(permute(x), s, z)  ->  permute(q.quantize(x, s, z))   where nothing reads permute(x) as a float"""
    mover = _only_quantized(rw, op).owner
    if mover is None or movement_kind(mover) != "permute" or mover.operand(0) is None:
        raise rw.declined("no reordering before it", quiet=True)
    source = mover.operands[0]
    assert source is not None
    scheme: Scheme = op.attrs["scheme"]
    _check_floats(rw, mover, scheme)
    hint = f"{source.name}_q"
    codes = rw.op(
        "q.quantize",
        source,
        *op.operands[1:],
        type=TensorType(scheme.dtype, source.tensor.shape),
        hint=hint,
        **op.attrs,
    )
    return _on_codes(rw, mover, [codes, *mover.operands[1:]], scheme)[0]


@rule("q.quantize")
def hoist_quantize_over_clamp(op: Op, rw: Rewriter) -> Value:
    """q.quantize(clip(x, lo, hi), s, z)  ->  clip(q.quantize(x, s, z), q(lo), q(hi))

    without the bounds that are the ends of the code type anyway, and without the clip where both are: a Relu before
    codes whose zero point is the smallest code, a Clip(0, 6) before codes that end at 6 or below.
    """
    clamped = _only_quantized(rw, op).owner
    bounds = None if clamped is None else clamp(clamped)
    found = scalar_parameters(op)
    if clamped is None or bounds is None or found is None or clamped.operand(0) is None:
        raise rw.declined("no clamp before it", quiet=True)
    source, scheme = clamped.operands[0], op.attrs["scheme"]
    assert source is not None
    if not scheme.dtype.is_integer:
        raise rw.declined(
            f"'{clamped.label}' clips what becomes {scheme.dtype}, whose codes it cannot clip", quiet=True
        )
    ends = (scheme.dtype.qmin, scheme.dtype.qmax)
    codes: list[int | None] = []
    for bound, end in zip((bounds.lo, bounds.hi), ends, strict=True):
        code = None if bound is None else int(quantize(np.asarray(bound, np.float32), *found, scheme))
        codes.append(None if code == end else code)
    if any(c is not None for c in codes) and not clips_codes(clamped):
        raise rw.declined(
            f"'{clamped.label}' clips to codes {codes}, and this opset has no Clip of codes", code="QC205"
        )
    element = TensorType(scheme.dtype, source.tensor.shape)
    out = rw.op("q.quantize", source, *op.operands[1:], type=element, hint=f"{source.name}_q", **op.attrs)
    if all(c is None for c in codes):
        return out
    clipped = _clip_codes(rw, out, codes, scheme, op.result.name)
    assert clipped.owner is not None
    clipped.owner.loc = clamped.loc
    return clipped


def _clip_codes(rw: Rewriter, x: Value, bounds: list[int | None], scheme: Scheme, name: str) -> Value:
    """Codes ``x`` between ``bounds``."""
    dialect = x.graph.root.dialect
    kind, hint = x.type, f"{name}_clip"
    if dialect == "aten":
        return rw.op(CODES_CLIP[dialect], x, type=kind, hint=hint, args=(Hole(0), *bounds))
    limits = [
        None if c is None else rw.const(f"{name}_{end}", constant(np.asarray(c, scheme.dtype.storage), scheme.dtype))
        for c, end in zip(bounds, ("low", "high"), strict=True)
    ]
    return rw.op(CODES_CLIP[dialect], x, *limits, type=kind, hint=hint)


@dataclass(frozen=True)
class PropagateQdq(Pass):
    """Move dequantizes of constants through what keeps their groups whole, pairs of activations through movement."""

    name: ClassVar[str] = "propagate-qdq"

    def run(self, graph: Graph, ctx: Context) -> None:
        rules = [sink_dequantize, through_transpose, through_reshape, hoist_quantize, hoist_quantize_over_clamp]
        apply_rules(graph, rules, log=ctx.refusals)
