"""What an op is, by its name, in every host dialect: a dequantize, a product, data movement, an integer kernel."""

from __future__ import annotations

from qcompiler.ir import Op
from qcompiler.verify import torch_words


def _named(dialect: str, names: str) -> frozenset[str]:
    return frozenset(f"{dialect}.{name}" for name in names.split())


MOVES = (
    _named("onnx", "Transpose Reshape Slice Squeeze Unsqueeze Concat Flatten Split Identity Expand Tile Pad Dropout")
    | _named("onnx", "Gather GatherND GatherElements DepthToSpace SpaceToDepth Cast CastLike")
    | torch_words.MOVES
)
"""Ops that move, repeat or cast elements but compute nothing with them."""

LOOKUPS = _named("onnx", "Gather GatherND GatherElements") | torch_words.LOOKUPS
CASTS = _named("onnx", "Cast CastLike") | torch_words.CASTS
ARITHMETIC = _named("onnx", "Sub Mul Div Add BitShift BitwiseAnd BitwiseOr BitwiseXor Mod Floor Where Neg")
PRODUCTS = (
    _named("onnx", "MatMul Gemm Conv ConvTranspose Einsum Attention RNN LSTM GRU")
    | _named("com.microsoft", "FusedMatMul FusedGemm FusedConv NhwcFusedConv TransposeMatMul FusedMatMulActivation MoE")
    | _named("com.microsoft", "Attention MultiHeadAttention GroupQueryAttention MatMulNBits QAttention nchwc.Conv")
)
_INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")
ORDER_KEEPERS = _named("onnx", "MaxPool ReduceMax ReduceMin Resize") | frozenset(
    f"aten.{w}.default" for w in ("max_pool1d", "max_pool2d", "max_pool3d", "relu", "amax", "amin")
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUSED_WORDS = _words("matmul gemm gather embedding conv linear_dyn")


def base_name(op: Op) -> str:
    """``MatMul`` of ``onnx.MatMul``, ``linear`` of ``aten.linear.default``."""
    parts = op.name.split(".")
    overloaded = parts[0] == "aten" or (op.graph.dialect == "aten" and parts[0] not in ("py", "higher_order", "q"))
    return parts[-2] if overloaded and len(parts) > 2 else parts[-1]


def _word(op: Op) -> str:
    """The name in which ``dequantize`` would stand: torch ops end in an overload."""
    return op.name.rpartition("::")[2].lower()


def is_dequantize(op: Op) -> bool:
    """An op that turns codes into floats, of whatever library: its name says so."""
    word = _word(op)
    return "dequant" in word and not any(w in word for w in _FUSED_WORDS)


def is_quantize(op: Op) -> bool:
    """An op that turns floats into codes."""
    word = _word(op)
    if "dequant" in word or "matmul" in word or "lstm" in word or "fake" in word:
        return False
    return "quantizelinear" in word or "quantize_" in word or word.endswith(".quantize") or "quantizebfp" in word


def is_fake_quantize(op: Op) -> bool:
    """An op of quantization-aware training that rounds floats to codes and gives floats back."""
    word = _word(op)
    return "fake_quant" in word and op.name.startswith(("aten.", "quantized_decomposed.", "torchao."))


def is_product(op: Op) -> bool:
    """A matrix product, convolution, attention or recurrence: where a weight is worth keeping in few bits."""
    if op.name.startswith("aten."):
        return torch_words.base(op.name) in torch_words.PRODUCTS
    return op.name in PRODUCTS or not torch_words.OTHER_PRODUCTS.isdisjoint((op.name, _unoverloaded(op)))


def is_arithmetic(op: Op) -> bool:
    return op.name in ARITHMETIC or (
        op.name.startswith("aten.") and torch_words.base(op.name) in torch_words.ARITHMETIC
    )


def takes_codes_out(op: Op) -> bool:
    """A shift or a mask, by which several codes are stored in one wider integer."""
    return op.name.startswith("aten.") and torch_words.base(op.name) in torch_words.BIT_OPS


def joins(op: Op) -> bool:
    """Data movement that puts all its operands together."""
    return base_name(op) == "Concat" or (op.name.startswith("aten.") and base_name(op) in torch_words.JOINS)


def is_factor(op: Op, slot: int) -> bool:
    """Whether operand ``slot`` of a product is multiplied, not only added to the result (a bias, a mask)."""
    if not op.name.startswith("aten."):
        return True
    base = torch_words.base(op.name)
    if base in torch_words.BIAS_FIRST:
        return slot in (1, 2)
    if "attention" in base:
        return slot < 3
    return slot < 2 or base not in torch_words.BIAS_LAST


def is_activation_slot(op: Op, slot: int) -> bool:
    """Whether operand ``slot`` of a product is the side of the rows that run through it."""
    first = op.name.startswith("aten.") and torch_words.base(op.name) in torch_words.BIAS_FIRST
    return slot == (1 if first else 0)


def is_integer_kernel(op: Op) -> bool:
    """A kernel that computes on codes."""
    return (
        any(w in op.name for w in _INTEGER_KERNELS)
        or _unoverloaded(op) in torch_words.INTEGER_KERNELS
        or op.name.startswith(torch_words.INTEGER_NAMESPACES)
    )


def _unoverloaded(op: Op) -> str:
    return op.name.rpartition(".")[0]
