"""The view of a convolution with a constant weight, from ONNX and from aten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.ir import Op, Value
from qcompiler.rewrite import Declined
from qcompiler.spec import is_float_const
from qcompiler.target import Reason
from qcompiler.views import CONV_OPS, call_args, named_operands

_AUTO = {"valid": "VALID", "same": "SAME_UPPER"}


@dataclass(frozen=True, slots=True)
class ConvView:
    """``result = conv(x, weight[O, I / group, *kernel]) + bias[O]``, everything as ONNX Conv means it.

    ``pads`` are those at the begin of each spatial axis, then those at the end; they count where ``auto_pad`` is
    NOTSET. ``covered`` are the ops that a fused kernel replaces, the root first.
    """

    op: Op
    x: Value
    weight: Value
    bias: Value | None
    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    result: Value
    covered: tuple[Op, ...]

    @property
    def n(self) -> int:
        """Output channels."""
        return (self.weight.tensor.static_shape or (0,))[0]

    @property
    def k(self) -> int:
        """The length of the reduction: input channels of a group times the kernel."""
        size = 1
        for d in (self.weight.tensor.static_shape or (0, 0))[1:]:
            size *= d
        return size

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def depthwise(self) -> bool:
        """True when each group has one input channel."""
        return (self.weight.tensor.static_shape or (0, 0))[1] == 1 and self.group > 1

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes of ``q.conv``."""
        out: dict[str, Any] = {"strides": self.strides, "dilations": self.dilations, "group": self.group}
        out |= {"kernel_shape": self.kernel, "auto_pad": self.auto_pad}
        return out | ({"pads": self.pads} if self.auto_pad == "NOTSET" else {})


def as_conv(op: Op) -> ConvView:
    """The convolution rooted at ``op``; raises Declined with the reason why it is none.

    A weight is a float constant or a dequantized value of rank 3 to 5.
    """
    if op.name not in CONV_OPS:
        raise Declined(f"{op.name} is no convolution", quiet=True)
    weight = _weight(op)
    shape = weight.tensor.static_shape
    if shape is None or not 3 <= len(shape) <= 5:
        have = "of unknown shape" if shape is None else f"of shape {list(shape)}"
        raise Declined(
            Reason("QC203", f"{op.name} '{op.label}' has a weight {have}, not [O, I / group, ..]", "skip it")
        )
    view = _onnx(op, weight, shape) if not op.name.startswith("aten.") else _aten(op, weight, shape)
    if view.group < 1 or shape[0] % view.group:
        message = f"{op.name} '{op.label}': {shape[0]} output channels do not divide into {view.group} groups"
        raise Declined(Reason("QC203", message, ""))
    if view.bias is not None and view.bias.tensor.static_shape not in (None, (shape[0],)):
        message = f"{op.name} '{op.label}' has a bias {view.bias.tensor.shape} for {shape[0]} channels"
        raise Declined(Reason("QC203", message, ""))
    return view


def _weight(op: Op) -> Value:
    """The weight as written; declines where it is no constant, or the op is more than a convolution."""
    if op.name == "onnx.ConvTranspose" or "conv_transpose" in op.name or _is_transposed(op):
        message = f"{op.name} '{op.label}' is a transposed convolution, for which no integer kernel is known"
        raise Declined(Reason("QC201", message, "leave it in float"))
    if op.name == "com.microsoft.FusedConv" and (op.attrs.get("activation") or op.operand(3) is not None):
        message = f"{op.name} '{op.label}' holds an activation or a sum beside its convolution"
        raise Declined(Reason("QC203", message, "compile the model from before onnxruntime optimized it"))
    weight = op.operand(1)
    dequantized = weight is not None and weight.owner is not None and weight.owner.name == "q.dequantize"
    if weight is None or op.operand(0) is None or not (is_float_const(weight) or dequantized):
        raise Declined(f"{op.name} '{op.label}' has no constant weight", quiet=True)
    return weight


def _is_transposed(op: Op) -> bool:
    args = call_args(op) if op.name == "aten.convolution.default" else []
    return len(args) > 6 and bool(args[6])


def _onnx(op: Op, weight: Value, shape: tuple[int, ...]) -> ConvView:
    d = len(shape) - 2
    auto = op.attrs.get("auto_pad") or "NOTSET"
    auto_pad = auto.decode() if isinstance(auto, bytes) else str(auto)
    kernel = _ints(op, "kernel_shape", shape[2:])
    if kernel != shape[2:]:
        message = f"{op.name} '{op.label}' says kernel_shape {list(kernel)}, its weight is {list(shape)}"
        raise Declined(Reason("QC203", message, ""))
    x = op.operand(0)
    assert x is not None  # _weight has looked
    return ConvView(
        op=op,
        x=x,
        weight=weight,
        bias=op.operand(2),
        group=_ints(op, "group", (1,))[0],
        kernel=kernel,
        strides=_ints(op, "strides", (1,) * d),
        dilations=_ints(op, "dilations", (1,) * d),
        pads=_ints(op, "pads", (0,) * (2 * d)),
        auto_pad=auto_pad,
        result=op.result,
        covered=(op,),
    )


def _ints(op: Op, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value: Any = op.attrs.get(key)
    if value is None:
        return default
    return tuple(int(i) for i in value) if isinstance(value, Sequence) else (int(value),)


def _aten(op: Op, weight: Value, shape: tuple[int, ...]) -> ConvView:
    d = len(shape) - 2
    args = call_args(op)
    if named := named_operands(op):
        message = f"{op.name} '{op.label}' passes {', '.join(named)} by name"
        raise Declined(Reason("QC203", message, "pass tensors by position"))
    if op.name == "aten.convolution.default":
        x, _, bias, strides, padding, dilations, _, _, group = args[:9]
    else:
        x, _, bias, strides, padding, dilations, group = [*args, *[None] * 7][:7]
    x_rank = x.tensor.rank
    if x_rank is not None and x_rank != d + 2:
        message = f"{op.name} '{op.label}' takes an input of rank {x_rank} without a batch axis"
        raise Declined(Reason("QC203", message, "add the batch axis"))
    auto_pad = _AUTO.get(padding, "NOTSET") if isinstance(padding, str) else "NOTSET"
    pads = _spread(None if isinstance(padding, str) else padding, d, 0)
    return ConvView(
        op=op,
        x=x,
        weight=weight,
        bias=bias,
        group=1 if group is None else int(group),
        kernel=shape[2:],
        strides=_spread(strides, d, 1),
        dilations=_spread(dilations, d, 1),
        pads=pads + pads,
        auto_pad=auto_pad,
        result=op.result,
        covered=(op,),
    )


def _spread(value: Any, d: int, default: int) -> tuple[int, ...]:
    """``d`` numbers of an aten argument, which may be one number, a list of one, or left out."""
    if value is None:
        return (default,) * d
    items = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return tuple(items * d if len(items) == 1 else items)
