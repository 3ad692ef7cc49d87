"""The scale of an int32 bias: ONNX Runtime drops it when it fuses a Gemm, and takes it to be x scale times w scale."""

from __future__ import annotations

from qcompiler.backends.onnx.nodes import MS
from qcompiler.backends.onnx.opening import Names
from qcompiler.backends.onnx.qdq import DQ, constant_array
from qcompiler.backends.onnx.qdq_linear import scales_fit
from qcompiler.ir import Graph
from qcompiler.verify.findings import Finding

FIX = "quantize the bias with the product of the activation's and the weight's scale"


def check_bias(source: Graph, final: Graph, names: Names) -> list[Finding]:
    """QC303 for each QGemm of ``final`` whose bias ``source`` dequantizes with another scale than the kernel's."""
    scales = {
        op.operands[0].name: (op.label, op.operand(1))
        for op in source.walk()
        if op.name in DQ and op.operands[0] is not None and str(op.operands[0].tensor.dtype) == "int32"
    }
    out = []
    for op in final.walk():
        bias = op.operand(6) if op.name == MS + "QGemm" else None
        if bias is None or bias.name not in scales:
            continue
        label, scale = scales[bias.name]
        if not scales_fit(*(constant_array(v) for v in (scale, op.operand(1), op.operand(4)))):
            name = names.of(op)
            message = f"QGemm '{name}' computes wrong numbers"
            reason = f"it takes the bias of '{label}' in steps of x scale times w scale, and its own scale is another"
            out.append(Finding("QC303", name, message, reason, FIX))
    return out
