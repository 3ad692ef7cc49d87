"""Convolutions, element-wise ops and data movement between quantize and dequantize: what ONNX Runtime makes of them."""

from __future__ import annotations

from qcompiler.backends.onnx.load import opset_of
from qcompiler.backends.onnx.qdq import (
    BYTES,
    MOVABLE,
    TYPED_QUANTIZE,
    Forecast,
    Fusion,
    NotFused,
    Q,
    activation_of,
    block_scales,
    code_type,
    dequantize_of,
    is_constant,
    need_activation,
    need_bytes,
    need_result,
    only_user,
    redundant,
    same_parameters,
    tail_of,
)
from qcompiler.backends.onnx.qdq_linear import bias_scale_fits, fuse_linear
from qcompiler.ir import Graph, Op


def _onnx(names: str) -> frozenset[str]:
    return frozenset(f"onnx.{n}" for n in names.split())


UNARY = _onnx("AveragePool LeakyRelu GlobalAveragePool Sigmoid Softmax")
BINARY = _onnx("Add Mul")
DROPPED = _onnx("Identity Expand Flatten Gather GatherElements Reshape Slice Squeeze Tile Transpose Unsqueeze")
ORDERED = _onnx("MaxPool ReduceMax ReduceMin Resize")
LINEAR = _onnx("MatMul Gemm")
CLIPS = _onnx("Relu Clip")


def fuse_conv(op: Op) -> Fusion | None:
    """Dequantized x and w -> Conv -> QuantizeLinear  ->  QLinearConv; raises NotFused."""
    x, w = activation_of(op.operand(0)), dequantize_of(op.operand(1))
    if w is None:
        return None
    if x is None:
        raise NotFused("its activation is float, and there is no convolution that reads a weight's codes alone")
    need_bytes(w, f"the weight of '{w.label}'")
    need_activation(*x)
    if block_scales(w):
        raise NotFused(f"the weight of '{w.label}' has scales in blocks")
    tail = tail_of(op)
    if tail.quantize is None:
        raise NotFused("its result is not quantized, and QLinearConv gives codes")
    need_result(tail)
    kinds = code_type(tail.quantize), code_type(x[0])
    if kinds[0] != kinds[1]:
        raise NotFused(f"its result is quantized to {kinds[0]}, its input to {kinds[1]}")
    if op.operand(2) is not None:
        bias = dequantize_of(op.operand(2))
        if bias is None and not is_constant(op.operand(2)):
            raise NotFused("its bias is neither constant nor dequantized from int32")
        if bias is not None and (code_type(bias) != "int32" or not bias_scale_fits(bias, x[0], w)):
            raise NotFused(f"the scale of its bias '{bias.label}' is not x scale times w scale")
    return Fusion(op, "QLinearConv", frozenset(tail.covered), tail.result, w)


def fuse_elementwise(op: Op) -> Fusion | None:
    """DequantizeLinear -> op -> QuantizeLinear  ->  QLinear<op>; raises NotFused."""
    operands = [v for v in op.operands if v is not None]
    values = operands[:1] if op.name in UNARY else operands
    found = [dequantize_of(v) for v in values]
    dqs = [d for d in found if d is not None]
    if not dqs:
        return None
    if len(dqs) != len(values) or op.results[0].is_output or not any(u.name in Q for u in op.results[0].users):
        raise NotFused("it is not quantized on every side")
    for dq in dqs:
        need_bytes(dq, f"'{dq.label}'")
        if block_scales(dq):
            raise NotFused(f"'{dq.label}' has scales in blocks")
        if len(dqs) > 1 and is_constant(dq.operand(0)) and code_type(dq) == "int8":
            raise NotFused(f"int8 activations become uint8, and the constant of '{dq.label}' stays int8")
        need_activation(dq, moved=False)
    tail = tail_of(op)
    need_result(tail)
    kinds = {code_type(d) for d in dqs} | {code_type(q) for q in [tail.quantize] if q is not None}
    if tail.quantize is None or len(kinds - {""}) != 1:
        raise NotFused(f"its codes are of types {', '.join(sorted(kinds))}, not of one")
    return Fusion(op, f"QLinear{op.name.rpartition('.')[2]}", frozenset(tail.covered), tail.result)


def fuse_movement(op: Op) -> Fusion | None:
    """DequantizeLinear -> data movement -> QuantizeLinear, both with one scale  ->  the movement of the codes.

    Identities are dropped first, and so is a pair behind a pair; a MaxPool needs no quantize behind it.
    """
    dq, q = dequantize_of(op.operand(0)), only_user(op.results[0])
    if dq is not None and op.name == "onnx.MaxPool" and (q is None or q.name not in Q) and code_type(dq) in BYTES:
        return Fusion(op, "MaxPool", frozenset({op}), op.results[0])
    if dq is None or q is None or q.name not in Q:
        return None
    if not same_parameters(dq, q):
        raise NotFused(f"'{dq.label}' and '{q.label}' have different scales")
    if op.name in ORDERED and code_type(dq) not in BYTES:
        raise NotFused(f"'{dq.label}' has {code_type(dq)} codes")
    return Fusion(op, op.name.rpartition(".")[2], frozenset({op, q}), q.results[0])


def _fuse(op: Op) -> Fusion | None:
    if op.name in LINEAR:
        return fuse_linear(op)
    if op.name == "onnx.Conv":
        return fuse_conv(op)
    if op.name in UNARY | BINARY | {"onnx.Concat"}:
        return fuse_elementwise(op)
    if op.name in DROPPED | ORDERED:
        return fuse_movement(op)
    if op.name == "onnx.ArgMax" and (dq := dequantize_of(op.operand(0))) is not None and code_type(dq) in BYTES:
        return Fusion(op, "ArgMax", frozenset({op}), op.results[0])
    return None


def _does_nothing(clip: Op) -> bool:
    following = only_user(clip.results[0])
    return following is not None and following.name in Q and redundant(clip, following)


def unloadable(graph: Graph) -> list[tuple[Op, Op]]:
    """Dequantizes of int8 activations, with the op past which the optimizer moves them and so breaks the model."""
    if opset_of(graph) < TYPED_QUANTIZE:
        return []
    out = []
    for op in graph.walk():
        dq = dequantize_of(op.operand(0)) if op.name in MOVABLE | {"onnx.MaxPool"} else None
        if dq is None or dq.name != "onnx.DequantizeLinear" or code_type(dq) != "int8" or is_constant(dq.operand(0)):
            continue
        following = only_user(op.results[0])
        if following is None or following.name not in Q:
            out.append((dq, op))
    return out


def forecast(graph: Graph) -> Forecast:
    """What the CPU provider's optimizer will fuse in ``graph`` at its default level."""
    out = Forecast(dropped={op for op in graph.walk() if op.name in CLIPS and _does_nothing(op)})
    taken: set[Op] = set()
    for op in graph.walk():
        if op in taken or not op.results:
            continue
        try:
            fusion = _fuse(op)
        except NotFused as e:
            out.reasons[op] = str(e)
            continue
        if fusion is not None:
            taken |= fusion.covered
            out.fusions.append(fusion)
    return out
