"""What an op is, by its name, in every host dialect: a dequantize, a product, data movement, an integer kernel."""

from __future__ import annotations

from qcompiler.ir import Op


def _named(dialect: str, names: str) -> frozenset[str]:
    return frozenset(f"{dialect}.{name}" for name in names.split())


MOVES = (
    _named("onnx", "Transpose Reshape Slice Squeeze Unsqueeze Concat Flatten Split Identity Expand Tile Pad Dropout")
    | _named("onnx", "Gather GatherND GatherElements DepthToSpace SpaceToDepth Cast CastLike")
    | _named("aten", "t.default numpy_T.default transpose.int permute.default movedim.int view.default reshape.default")
    | _named("aten", "_unsafe_view.default unsqueeze.default squeeze.dim squeeze.dims flatten.using_ints slice.Tensor")
    | _named("aten", "select.int expand.default repeat.default cat.default split.Tensor split_with_sizes.default")
    | _named("aten", "contiguous.default clone.default alias.default detach.default to.dtype _to_copy.default")
    | _named("aten", "embedding.default index_select.default index.Tensor")
)
"""Ops that move, repeat or cast elements but compute nothing with them."""

LOOKUPS = _named("onnx", "Gather GatherND GatherElements") | _named(
    "aten", "embedding.default index_select.default index.Tensor"
)
CASTS = _named("onnx", "Cast CastLike") | _named("aten", "to.dtype _to_copy.default")
ARITHMETIC = _named("onnx", "Sub Mul Div Add BitShift BitwiseAnd BitwiseOr BitwiseXor Mod Floor Where Neg")
PRODUCTS = (
    _named("onnx", "MatMul Gemm Conv ConvTranspose Einsum Attention RNN LSTM GRU")
    | _named("com.microsoft", "FusedMatMul FusedGemm FusedConv NhwcFusedConv TransposeMatMul FusedMatMulActivation MoE")
    | _named("com.microsoft", "Attention MultiHeadAttention GroupQueryAttention MatMulNBits QAttention nchwc.Conv")
)
_INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")
ORDER_KEEPERS = _named("onnx", "MaxPool ReduceMax ReduceMin Resize")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ATEN_ARITHMETIC = _words("sub mul div add rsub neg floor_divide remainder bitwise_and bitwise_or __and__ __rshift__")
_ATEN_PRODUCTS = _words("linear matmul mm bmm addmm baddbmm einsum convolution conv1d conv2d conv3d") | {
    "scaled_dot_product_attention"
}
_FUSED_WORDS = _words("matmul gemm gather embedding conv linear_dyn")


def base_name(op: Op) -> str:
    """``MatMul`` of ``onnx.MatMul``, ``linear`` of ``aten.linear.default``."""
    parts = op.name.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else parts[-1]


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


def is_product(op: Op) -> bool:
    """A matrix product, convolution, attention or recurrence: where a weight is worth keeping in few bits."""
    return op.name in PRODUCTS or (op.name.startswith("aten.") and base_name(op) in _ATEN_PRODUCTS)


def is_arithmetic(op: Op) -> bool:
    return op.name in ARITHMETIC or (op.name.startswith("aten.") and base_name(op) in _ATEN_ARITHMETIC)


def is_integer_kernel(op: Op) -> bool:
    """A kernel that computes on codes."""
    return any(w in op.name for w in _INTEGER_KERNELS)
