"""Take the mean error of quantized weights out of the biases, by the means of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.bias_correction import CorrectedBias, TapMeans
from qcompiler.conv_views import ConvView, as_conv
from qcompiler.ir import Graph, Op, Use, Value
from qcompiler.payload import ComputedPayload
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Declined
from qcompiler.spec import is_float_const
from qcompiler.views import CONV_OPS, LinearView, as_linear, is_row, with_args
from qcompiler.weights import WeightQuantization

_CONVS = {"onnx.Conv"} | {op for op in CONV_OPS if op.startswith("aten.")}
_LINEARS = ("onnx.Gemm", "aten.linear.default")
"""Layers whose op has an operand for a bias."""


@dataclass(frozen=True)
class _Layer:
    """A layer whose weight has a pair of this compilation; ``bias`` is read at ``place``, an operand or a new one."""

    view: ConvView | LinearView
    made: WeightQuantization
    observer: TapMeans
    bias: Value | None
    place: Use | None


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to the biases of convolutions and linear layers what rounding takes from the mean of their outputs.

    The means of their inputs come from the calibration data. A layer without a bias gets one where its op has an
    operand for it. Layers in subgraphs, and those whose weights are in groups or came quantized, are left as they are.
    """

    name: ClassVar[str] = "correct-bias"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "lossy"

    def run(self, graph: Graph, ctx: Context) -> None:
        layers = list(_layers(graph))
        if not layers:
            return
        wanted: dict[str, list[TapMeans]] = {}
        for layer in layers:
            wanted.setdefault(layer.view.x.name, []).append(layer.observer)
        ctx.need_calibration(self.name).observe(graph, wanted)
        for layer in layers:
            if layer.observer.seen:
                _correct(layer)


def _layers(graph: Graph) -> Iterator[_Layer]:
    for op in graph:
        view = _view(op)
        if view is None or not _is_local(view.x, graph):
            continue
        made = _quantization(view.weight)
        if made is None or made.scheme.granularity not in ("tensor", "channel"):
            continue
        if isinstance(view, ConvView):
            channels = (view.weight.tensor.static_shape or (0, 0))[1] * view.group
            place = _slot(op, view.bias)
            if place is not None or (view.bias is None and op.name in _CONVS):
                yield _Layer(view, made, TapMeans(channels, view.kernel, view.attrs), view.bias, place)
        else:
            bias, place = _linear_bias(view)
            if place is not None or (bias is None and op.name in _LINEARS):
                yield _Layer(view, made, TapMeans(view.k), bias, place)


def _view(op: Op) -> ConvView | LinearView | None:
    for read in (as_conv, as_linear):
        try:
            return read(op)
        except Declined:
            continue
    return None


def _is_local(x: Value, graph: Graph) -> bool:
    return x.graph is graph and not x.is_const


def _quantization(weight: Value) -> WeightQuantization | None:
    """The computation that makes the scale of a dequantized weight."""
    dq = weight.owner
    scale = None if dq is None or dq.name != "q.dequantize" else dq.operand(1)
    payload = None if scale is None else scale.payload
    if isinstance(payload, ComputedPayload) and isinstance(payload.computation, WeightQuantization):
        return payload.computation
    return None


def _slot(op: Op, bias: Value | None) -> Use | None:
    """Where ``op`` reads its bias, if that is a constant."""
    if bias is None or not is_float_const(bias):
        return None
    return next(Use(op, i) for i, v in enumerate(op.operands) if v is bias)


def _linear_bias(view: LinearView) -> tuple[Value | None, Use | None]:
    """The constant bias of a linear layer and where it is read: in the op, or in an addition behind it."""
    op = view.op
    if view.bias is not None:
        return view.bias, _slot(op, view.bias)
    if len(view.result.uses) != 1:
        return None, None
    (use,) = view.result.uses
    if not isinstance(use.user, Op) or use.user.name not in ("onnx.Add", "aten.add.Tensor"):
        return None, None
    other = use.user.operand(1 - use.slot) if use.slot in (0, 1) else None
    scaled = dict(use.user.attrs.get("kwargs", ())).get("alpha", 1) != 1
    rank = view.result.tensor.rank or 1
    if other is None or not is_row(other, view.n) or not is_float_const(other) or scaled:
        return None, None
    return (None, None) if (other.tensor.rank or 0) > rank else (other, Use(use.user, 1 - use.slot))


def _correct(layer: _Layer) -> None:
    view, made = layer.view, layer.made
    weight, bias = made.weight, None if layer.bias is None else layer.bias.payload
    along, group = (1, view.group) if isinstance(view, ConvView) else (view.axis, 1)
    means = layer.observer.means
    computation = CorrectedBias(weight, made.outputs(), bias, made.scheme, means, n=view.n, along=along, group=group)
    payload = computation.outputs()[0]
    home = view.op.graph
    name = f"{view.weight.name.removesuffix('_dq')}_bias" if layer.bias is None else layer.bias.name
    value = home.add_const(home.fresh(f"{name}_corrected"), payload)
    if layer.place is None:
        if view.op.name.startswith("aten."):
            operands, attrs = with_args(view.op, {2: value})
            view.op.set_operands(operands)
            view.op.attrs = attrs
        else:
            view.op.set_operands([*view.op.operands[:2], value])
        return
    assert isinstance(layer.place.user, Op)
    layer.place.user.set_operand(layer.place.slot, value)
    old = layer.bias
    if old is not None and not old.uses:
        old.graph.remove_const(old)
