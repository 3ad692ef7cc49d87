"""Write an ONNX model of an older opset in the words of a newer one, whose operators take 8-bit codes.

Between opset 7 and 13 most operators only gained types; some moved attributes to operands, and a few changed what they
mean. Source: the operator changelog of ONNX (docs/Changelog.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompiler.dtypes import F32, INT64
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import constant
from qcompiler.pipeline import Context, Pass
from qcompiler.verify.findings import Finding

OPSET, IR_VERSION = 13, 7
"""What models are raised to: the first opset in which all movement takes 8-bit codes, and the IR that came with it."""
OLDEST = 7
"""Before opset 7 binary operators did not broadcast as they do now."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAME = _names(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BitShift Cast Ceil Celu Compress
    Concat ConcatFromSequence Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Det Div DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual HardSigmoid Identity If InstanceNormalization IsInf IsNaN LRN LSTM LeakyRelu Less LessOrEqual
    Log Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxUnpool Mean MeanVarianceNormalization
    Min Mod Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pow QLinearConv QLinearMatMul
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare Relu Reshape
    ReverseSequence RoiAlign Round ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign Sin Sinh Size Softplus Softsign
    SpaceToDepth SplitToSequence Sqrt Sub Sum Tan Tanh TfIdfVectorizer ThresholdedRelu Tile Transpose Unique
    Where Xor
    """
)


def _ints(op: Op, hint: str, values: Any) -> Value:
    home = op.graph
    return home.add_const(home.fresh(f"{op.results[0].name}_{hint}"), constant(np.asarray(values, np.int64), INT64))


def _number(op: Op, hint: str, value: float) -> Value:
    x = op.operand(0)
    element = (None if x is None else x.tensor.dtype) or F32
    payload = constant(np.asarray(value, np.float64).astype(element.storage), element)
    return op.graph.add_const(op.graph.fresh(f"{op.results[0].name}_{hint}"), payload)


def _axes(op: Op) -> None:
    """Squeeze, Unsqueeze, ReduceSum: the attribute ``axes`` is an operand from 13."""
    if "axes" in op.attrs:
        op.set_operands([op.operand(0), _ints(op, "axes", op.attrs.pop("axes"))])


def _split(op: Op) -> None:
    if "split" in op.attrs:
        op.set_operands([op.operand(0), _ints(op, "split", op.attrs.pop("split"))])


def _clip(op: Op) -> None:
    """The attributes ``min`` and ``max`` are operands from 11."""
    lo, hi = op.attrs.pop("min", None), op.attrs.pop("max", None)
    if lo is not None or hi is not None:
        bounds = [None if v is None else _number(op, end, v) for v, end in ((lo, "min"), (hi, "max"))]
        op.set_operands([op.operand(0), *bounds][: 3 if hi is not None else 2])


def _pad(op: Op) -> None:
    """The attributes ``pads`` and ``value`` are operands from 11."""
    if "pads" in op.attrs:
        value = float(op.attrs.pop("value", 0.0))
        op.set_operands([op.operand(0), _ints(op, "pads", op.attrs.pop("pads")), _number(op, "value", value)])


def _slice(op: Op) -> None:
    """Starts, ends and axes are operands from 10."""
    if "starts" in op.attrs:
        starts, ends = op.attrs.pop("starts"), op.attrs.pop("ends")
        axes = op.attrs.pop("axes", tuple(range(len(starts))))
        values = (("starts", starts), ("ends", ends), ("axes", axes))
        op.set_operands([op.operand(0), *(_ints(op, hint, v) for hint, v in values)])


def _top_k(op: Op) -> None:
    if "k" in op.attrs:
        op.set_operands([op.operand(0), _ints(op, "k", [op.attrs.pop("k")])])


def _dropout(op: Op) -> None:
    """It does nothing outside of training; the ratio became an operand in 12 and the mask boolean in 10."""
    op.attrs.pop("ratio", None)


def _batch_norm(op: Op) -> None:
    op.attrs.pop("spatial", None)


def _last_axis(op: Op) -> None:
    """Softmax and its kin: before 13 they flattened to a matrix at ``axis``, 1 by default."""
    op.attrs["axis"] = -1


def _resize(op: Op) -> None:
    """Upsample, and Resize of opset 10: scales only, asymmetric coordinates, rounded down."""
    if op.name == "onnx.Resize" and len(op.operands) > 2:
        return
    scales = op.operand(1)
    if scales is None:
        values = np.asarray(op.attrs.pop("scales"), np.float32)
        scales = op.graph.add_const(op.graph.fresh(f"{op.results[0].name}_scales"), constant(values))
    op.name = "onnx.Resize"
    op.attrs["coordinate_transformation_mode"] = "asymmetric"
    op.attrs["nearest_mode"] = "floor"
    op.set_operands([op.operand(0), None, scales])


_CHANGED: dict[str, Callable[[Op], None]] = {
    "Squeeze": _axes,
    "Unsqueeze": _axes,
    "ReduceSum": _axes,
    "Split": _split,
    "Clip": _clip,
    "Pad": _pad,
    "Slice": _slice,
    "TopK": _top_k,
    "Dropout": _dropout,
    "BatchNormalization": _batch_norm,
    "Softmax": _last_axis,
    "LogSoftmax": _last_axis,
    "Hardmax": _last_axis,
    "Upsample": _resize,
    "Resize": _resize,
}


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise ONNX models of opset 7 to 12 to 13, where all their operators can be written so; leave others as they are.

    Values do not change. A model that stays behind is told of (QC207, a note): some of its ops cannot run on codes.
    """

    name: ClassVar[str] = "raise-opset"

    def run(self, graph: Graph, ctx: Context) -> None:
        imports = dict(graph.meta.get("opset_import", ()))
        have = int(imports.get("", 0))
        if graph.dialect != "onnx" or not 0 < have < OPSET:
            return
        if (why := _why_not(graph, have)) is not None:
            fix = f"export the model with opset {OPSET} or later"
            message = f"the model stays at opset {have}, where some operators take no 8-bit codes"
            ctx.findings.append(Finding("QC207", graph.name, message, why, fix, severity="info"))
            return
        for op in graph.walk():
            change = _CHANGED.get(op.name.removeprefix("onnx."))
            if op.name.startswith("onnx.") and change is not None:
                change(op)
        graph.meta["opset_import"] = tuple({**imports, "": OPSET}.items())
        graph.meta["ir_version"] = max(int(graph.meta.get("ir_version", IR_VERSION)), IR_VERSION)


def _why_not(graph: Graph, have: int) -> str | None:
    """Why the model cannot be raised; nothing is changed here."""
    if have < OLDEST:
        return f"opset {have} is older than {OLDEST}"
    for op in graph.walk():
        name = op.name.removeprefix("onnx.")
        if not op.name.startswith("onnx.") or name in _SAME:
            continue
        if name not in _CHANGED:
            return f"how to write {name} '{op.label}' in opset {OPSET} is not known"
        if (why := _changed_meaning(op)) is not None:
            return f"{name} '{op.label}' {why}"
    return None


def _changed_meaning(op: Op) -> str | None:
    """Why ``op`` says something that the newer operator cannot."""
    x = op.operand(0)
    rank = None if x is None else x.tensor.rank
    match op.name.removeprefix("onnx."):
        case "Dropout" if any(r.uses for r in op.results[1:]):
            return "gives a mask that is used"
        case "BatchNormalization" if op.attrs.get("spatial", 1) != 1 or len(op.results) > 1:
            return "normalises each place on its own, or trains"
        case "Softmax" | "LogSoftmax" | "Hardmax":
            axis = op.attrs.get("axis", 1)
            if axis != -1 and (rank is None or axis != rank - 1):
                return f"flattens a tensor of rank {rank} at axis {axis}"
        case "Upsample" | "Resize" if str(op.attrs.get("mode", "nearest")) not in ("nearest", "linear"):
            return f"has mode {op.attrs['mode']}" if len(op.operands) <= 2 else None
    return None
