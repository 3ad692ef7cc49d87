"""Fold what scales and shifts channels, and constant padding, into the convolution or product beside it.

Nothing is read here: new weights and biases are recorded computations. What cannot be folded stays, with the reason: a
batch normalisation before a convolution that pads, say, whose padding is zero and not the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from qcompiler import channels
from qcompiler.channels import ChannelFolding, Law
from qcompiler.conv_views import ConvView, as_conv
from qcompiler.ir import Graph, Hole, Op, TensorType, Value
from qcompiler.payload import Payload, constant
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Declined, Rewriter, apply_rules, rule
from qcompiler.spec import is_float_const
from qcompiler.views import CONV_OPS, LINEAR_OPS, LinearView, as_linear, call_args, named_operands, with_args

_PRODUCTS = ("onnx.MatMul", "onnx.Gemm")
_LAWS = {
    "onnx.Mul": channels.multiply,
    "onnx.Div": channels.divide,
    "onnx.Add": channels.add,
    "onnx.Sub": channels.subtract,
}


@rule("onnx.BatchNormalization")
def fold_batchnorm_behind(op: Op, rw: Rewriter) -> Sequence[Value]:
    """batchnorm(conv(x, w, b))  ->  conv(x, w * f, b * f + s)   and so for ConvTranspose, MatMul and Gemm"""
    constants, law = _batchnorm(op, rw)
    layer = _layer_before(op, op.operand(0), rw)
    if layer.name in _PRODUCTS and op.results[0].tensor.rank != 2:
        raise rw.declined(f"'{op.label}' normalises axis 1, the product before it has its channels on the last")
    return [_with_channels(layer, op, constants, law, rw), *op.results[1:]]  # the others have no users


@rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def fold_aten_batchnorm(op: Op, rw: Rewriter) -> Sequence[Value]:
    """batch_norm(conv(x, w, b))  ->  conv(x, w * f, b * f + s)   in eval mode; and so for a product of rank 2"""
    constants, law = _aten_batchnorm(op, rw)
    x = op.operand(0)
    layer = None if x is None else x.owner
    if layer is None or layer.graph is not op.graph or (layer.name not in CONV_OPS and layer.name not in LINEAR_OPS):
        raise rw.declined(f"'{op.label}' follows no convolution and no product")
    if len(layer.result.uses) != 1:
        raise rw.declined(f"'{layer.label}' has other users than '{op.label}'")
    view = as_conv(layer) if layer.name in CONV_OPS else as_linear(layer)
    if isinstance(view, LinearView) and layer.result.tensor.rank != 2:
        raise rw.declined(f"'{op.label}' normalises axis 1, the product before it has its channels on the last")
    where: Literal["rows", "columns"] = "columns" if isinstance(view, LinearView) and not view.transposed else "rows"
    if constants[0].size != view.n:
        raise rw.declined(f"'{op.label}' has {constants[0].size} channels, '{layer.label}' makes {view.n}")
    bias = None if view.bias is None else _payload(view.bias)
    weight, added = ChannelFolding(_payload(view.weight), bias, constants, law, view.n, where).payloads()
    new = rw.const(f"{view.weight.name}_folded", weight, view.weight.graph)
    new.meta["origin"] = view.weight.meta.get("origin", view.weight.name)
    out = _aten_layer(op, view, new, rw.const(f"{view.weight.name}_bias", added, view.weight.graph), rw)
    return [out, *op.results[1:]]  # the others have no users


def _aten_batchnorm(op: Op, rw: Rewriter) -> tuple[tuple[Payload, ...], Law]:
    """The constants of a batch normalisation of aten in eval mode, and its law; weight and bias may be absent."""
    args: list[Any] = call_args(op)
    legit = op.name != "aten.batch_norm.default"
    if (not legit and (len(args) < 8 or args[5])) or any(r.uses for r in op.results[1:]) or named_operands(op):
        raise rw.declined(f"'{op.label}' is in training mode: its statistics are those of each batch")
    mean = args[3]
    if not isinstance(mean, Value) or not is_float_const(mean) or mean.payload is None:
        raise rw.declined(f"'{op.label}' has statistics that are no constants")
    plain = (np.ones, np.zeros)
    found = [
        constant(plain[i](mean.payload.shape), mean.payload.dtype) if v is None else _payload(v)
        for i, v in enumerate(args[1:5])
    ]
    return tuple(found), channels.batch_law(float(args[6 if legit else 7]))


def _aten_layer(root: Op, view: ConvView | LinearView, weight: Value, bias: Value, rw: Rewriter) -> Value:
    """The layer of ``view`` with another weight, stored as it was, and bias, in the place of ``root``."""
    layer = view.op
    if isinstance(view, ConvView) or layer.name == "aten.linear.default":
        operands, attrs = with_args(layer, {1: weight, 2: bias})
        name = layer.name
    else:
        name, operands = "aten.linear.default", [view.x, weight, bias]
        if not view.transposed:
            shape = weight.tensor.static_shape or (0, 0)
            flipped = TensorType(weight.tensor.dtype, shape[::-1])
            operands[1] = rw.op("aten.t.default", weight, type=flipped, hint=f"{weight.name}_t", args=(Hole(0),))
        attrs = {"args": (Hole(0), Hole(1), Hole(2))}
    out = rw.op(name, *operands, type=root.results[0].type, **attrs)
    assert out.owner is not None
    out.owner.loc, out.owner.meta = layer.loc, dict(layer.meta)
    rw.revisit(out.owner)
    return out


@rule(*_LAWS)
def fold_channels_behind(op: Op, rw: Rewriter) -> Value:
    """conv(x, w, b) * c  ->  conv(x, w * c, b * c)   for a constant c per channel; and so for +, - and /"""
    swaps = (0, 1) if op.name in ("onnx.Add", "onnx.Mul") else (0,)
    if len(op.operands) != 2 or op.attrs.get("axis") is not None:
        raise rw.declined("no addition or multiplication by ONNX's present rules", quiet=True)
    for slot in swaps:
        value, constant = op.operand(slot), op.operand(1 - slot)
        made = None if value is None else value.owner
        if made is None or constant is None or made.name not in ("onnx.Conv", "onnx.ConvTranspose"):
            continue
        if not is_float_const(constant) or constant.payload is None:
            continue
        if not _per_channel(constant, value, made):
            raise rw.declined(f"'{op.label}' combines a convolution with a constant that is not one number a channel")
        return _with_channels(_layer_before(op, value, rw), op, (constant.payload,), _LAWS[op.name], rw)
    raise rw.declined("no constant beside a convolution", quiet=True)


@rule("onnx.Conv")
def fold_batchnorm_before(op: Op, rw: Rewriter) -> Value:
    """conv(batchnorm(x), w, b)  ->  conv(x, w * f, b + sum(w * s))   where the convolution pads nothing"""
    norm = rw.expect(op.operand(0), "onnx.BatchNormalization")
    constants, law = _batchnorm(norm, rw)
    view = _constant_conv(op)
    if norm.graph is not op.graph or len(norm.results[0].uses) != 1:
        raise rw.declined(f"'{norm.label}' has other users than '{op.label}'")
    if view.auto_pad not in ("NOTSET", "VALID") or (view.auto_pad == "NOTSET" and any(view.pads)):
        raise rw.declined(
            f"'{norm.label}' comes before '{op.label}', which pads with zeros: behind the shift they would be others"
        )
    weight = _payload(view.weight)
    bias = None if view.bias is None else _payload(view.bias)
    if constants[0].size != view.group * weight.shape[1]:
        raise rw.declined(f"'{norm.label}' has {constants[0].size} channels, '{op.label}' reads another number")
    folding = ChannelFolding(weight, bias, constants, law, view.n, "inputs", view.group)
    return _rebuilt(op, op, norm.operand(0), view.weight, folding, dict(op.attrs), rw)


@rule("onnx.Conv")
def fold_pad(op: Op, rw: Rewriter) -> Value:
    """conv(pad(x, zeros), w, b)  ->  conv(x, w, b) that pads"""
    pad = rw.expect(op.operand(0), "onnx.Pad")
    view = as_conv(op)
    if pad.graph is not op.graph or view.auto_pad not in ("NOTSET", "VALID"):
        raise rw.declined(f"'{op.label}' finds out its own padding", quiet=True)
    rank = len(view.kernel) + 2
    added = _zero_padding(pad, rank, rw)
    if any(added[i] for i in (0, 1, rank, rank + 1)) or min(added) < 0:
        raise rw.declined(f"'{pad.label}' crops, or pads the batch or the channels: no convolution does")
    own = view.pads if view.auto_pad == "NOTSET" else (0,) * len(view.pads)
    spatial = [*added[2:rank], *added[rank + 2 :]]
    attrs = {k: v for k, v in op.attrs.items() if k != "auto_pad"}
    attrs["pads"] = tuple(a + b for a, b in zip(own, spatial, strict=True))
    return _made(op, op, [pad.operand(0), *op.operands[1:]], attrs, rw)


# -- what is beside what -------------------------------------------------------------------------------------------


def _payload(value: Value) -> Payload:
    if not is_float_const(value) or value.payload is None:
        raise Declined(f"{value!r} is no float constant")
    return value.payload


def _batchnorm(op: Op, rw: Rewriter) -> tuple[tuple[Payload, ...], Law]:
    """The constants of a batch normalisation in inference form, and its law."""
    if op.attrs.get("training_mode", 0) or any(r.uses for r in op.results[1:]):
        raise rw.declined(f"'{op.label}' is in training mode: its statistics are those of each batch")
    if op.attrs.get("spatial", 1) != 1:
        raise rw.declined(f"'{op.label}' normalises each place apart (spatial = 0), not each channel")
    values = op.operands[1:5]
    if len(values) != 4 or any(v is None or not is_float_const(v) or v.payload is None for v in values):
        raise rw.declined(f"'{op.label}' has statistics that are no constants")
    epsilon: Any = op.attrs.get("epsilon", 1e-5)
    return tuple(_payload(v) for v in values if v is not None), channels.batch_law(float(epsilon))


def _layer_before(op: Op, value: Value | None, rw: Rewriter) -> Op:
    """The convolution or product that makes ``value``, which only ``op`` reads."""
    layer = None if value is None else value.owner
    if layer is None or layer.name not in ("onnx.Conv", "onnx.ConvTranspose", *_PRODUCTS):
        made_by = "an input" if layer is None else f"{layer.name} '{layer.label}'"
        raise rw.declined(f"'{op.label}' follows {made_by}, not a convolution or a product")
    if layer.graph is not op.graph or len(layer.result.uses) != 1:
        raise rw.declined(f"'{layer.label}' has other users than '{op.label}'")
    return layer


def _per_channel(constant: Value, value: Value | None, conv: Op) -> bool:
    """True when ``constant`` is one number, or one for each channel of a convolution's result ``value``."""
    shape, weight = constant.tensor.static_shape, conv.operand(1)
    rank = None if weight is None else weight.tensor.rank
    if shape is None or rank is None or len(shape) > rank:
        return False
    full = (1,) * (rank - len(shape)) + shape
    return set(full) == {1} or (set(full[:1] + full[2:]) <= {1} and full[1] == _channels(conv))


def _channels(conv: Op) -> int:
    shape = None if (weight := conv.operand(1)) is None else weight.tensor.static_shape
    if shape is None or len(shape) < 2:
        return 0
    group: Any = conv.attrs.get("group", 1)
    return shape[1] * int(group) if conv.name == "onnx.ConvTranspose" else shape[0]


def _constant_conv(op: Op) -> ConvView:
    view = as_conv(op)
    _payload(view.weight)
    return view


def _zero_padding(pad: Op, rank: int, rw: Rewriter) -> list[int]:
    """What a constant Pad with zeros adds: at the begin of each of ``rank`` axes, then at the end of each."""
    mode: Any = pad.attrs.get("mode", "constant")
    if mode not in ("constant", b"constant"):
        raise rw.declined(f"'{pad.label}' pads by {mode!s}, a convolution with zeros")
    given, value, axes = pad.operand(1), pad.operand(2), pad.operand(3)
    fill: Any = pad.attrs.get("value", 0.0) if value is None else _small(value, rw)[0]
    if fill != 0:
        raise rw.declined(f"'{pad.label}' pads with {fill}, a convolution with zeros")
    attribute: Any = pad.attrs.get("pads", ())
    pads = [int(p) for p in (attribute if given is None else _small(given, rw))]
    at = list(range(rank)) if axes is None else [int(a) % rank for a in _small(axes, rw)]
    if len(pads) != 2 * len(at):
        raise rw.declined(f"'{pad.label}' pads {len(pads) // 2} axes, the convolution has {rank}")
    out = [0] * (2 * rank)
    for i, axis in enumerate(at):
        out[axis], out[rank + axis] = pads[i], pads[len(at) + i]
    return out


def _small(value: Value, rw: Rewriter) -> list[Any]:
    """The elements of a constant that says how an op works: a few numbers, read now."""
    if not value.is_const or value.payload is None or value.payload.size > 64:
        raise rw.declined(f"{value!r} is known only at run time")
    found: list[Any] = value.payload.array().reshape(-1).tolist()
    return found


# -- what is built -------------------------------------------------------------------------------------------------


def _with_channels(layer: Op, root: Op, constants: tuple[Payload, ...], law: Law, rw: Rewriter) -> Value:
    """``layer`` with factor and shift of its outputs folded in, in the place of ``root``."""
    if layer.name in _PRODUCTS:
        lin = as_linear(layer)
        weight = _payload(lin.weight)
        n, bias = lin.n, lin.bias
        where: Literal["rows", "columns", "transposed"] = "rows" if lin.transposed else "columns"
        x, stored, attrs, group = lin.x, lin.weight, {"transB": int(lin.transposed)}, 1
    else:
        x_value, w_value, bias = layer.operand(0), layer.operand(1), layer.operand(2)
        if x_value is None or w_value is None:
            raise rw.declined(f"'{layer.label}' has no weight", quiet=True)
        x, stored, attrs, n = x_value, w_value, dict(layer.attrs), _channels(layer)
        weight = _payload(stored)
        where, group = "rows", 1
        if layer.name == "onnx.ConvTranspose":
            number: Any = layer.attrs.get("group", 1)
            where, group = "transposed", int(number)
    if any(p.size not in (1, n) for p in constants):
        raise rw.declined(f"'{root.label}' has {constants[0].size} channels, '{layer.label}' makes {n}")
    folding = ChannelFolding(weight, None if bias is None else _payload(bias), constants, law, n, where, group)
    return _rebuilt(layer, root, x, stored, folding, attrs, rw)


def _rebuilt(
    layer: Op, root: Op, x: Value | None, stored: Value, folding: ChannelFolding, attrs: dict[str, Any], rw: Rewriter
) -> Value:
    weight, bias = folding.payloads()
    made = rw.const(f"{stored.name}_folded", weight, stored.graph)
    made.meta["origin"] = stored.meta.get("origin", stored.name)
    added = rw.const(f"{stored.name}_bias", bias, stored.graph)
    return _made(layer, root, [x, made, added], attrs, rw)


def _made(layer: Op, root: Op, operands: list[Value | None], attrs: dict[str, Any], rw: Rewriter) -> Value:
    """``layer`` with other operands, in the place of ``root``, under its own name."""
    name = "onnx.Gemm" if layer.name in _PRODUCTS else layer.name
    out = rw.op(name, *operands, type=root.results[0].type, **attrs)
    assert out.owner is not None
    out.owner.loc, out.owner.meta = layer.loc, dict(layer.meta) if name == layer.name else {}
    rw.revisit(out.owner)
    return out


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Fold batch normalisations, factors and shifts of channels, and padding with zeros, into the layers beside."""

    name: ClassVar[str] = "fold-batchnorm"

    def run(self, graph: Graph, ctx: Context) -> None:
        rules = [fold_batchnorm_behind, fold_aten_batchnorm, fold_channels_behind, fold_batchnorm_before, fold_pad]
        apply_rules(graph, rules, log=ctx.refusals)
