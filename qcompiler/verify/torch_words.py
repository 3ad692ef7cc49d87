"""What torch's operators are, by name: the aten half of :mod:`qcompiler.verify.op_kinds`."""

from __future__ import annotations


def _named(bases: str, *overloads: str) -> frozenset[str]:
    """``aten.<base>.<overload>`` for each, the in-place form too where torch has one."""
    return frozenset(f"aten.{base}.{o}" for base in bases.split() for o in overloads or ("default",))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = (
    _named("t t_ t_copy numpy_T mT adjoint swapaxes swapaxes_ swapdims swapdims_ permute permute_copy ravel")
    | _named("transpose transpose_ transpose_copy unflatten unbind unbind_copy select select_copy", "int")
    | _named("movedim moveaxis", "int", "intlist")
    | _named("view view_copy", "default", "dtype")
    | _named("reshape _unsafe_view _reshape_alias reshape_as view_as _reshape_copy as_strided as_strided_copy unfold")
    | _named("unsqueeze unsqueeze_ unsqueeze_copy expand expand_as expand_copy repeat tile flip roll diagonal rot90")
    | _named("squeeze squeeze_ squeeze_copy", "default", "dim", "dims")
    | _named("flatten", "using_ints")
    | _named("slice slice_copy", "Tensor")
    | _named("narrow", "default", "Tensor")
    | _named("repeat_interleave", "self_int", "self_Tensor")
    | _named("cat concat concatenate stack hstack vstack dstack row_stack column_stack")
    | _named("split unsafe_split", "Tensor", "sizes", "default")
    | _named("split_with_sizes split_with_sizes_copy unsafe_split_with_sizes chunk unsafe_chunk")
    | _named("tensor_split", "sections", "indices")
    | _named("contiguous clone alias alias_copy detach detach_ detach_copy lift lift_fresh lift_fresh_copy")
    | _named("constant_pad_nd pad pixel_shuffle pixel_unshuffle channel_shuffle resolve_conj resolve_neg")
    | _named("to", "dtype", "dtype_layout", "device", "other")
    | _named("_to_copy type_as dropout dropout_ native_dropout embedding index_select take take_along_dim gather")
    | _named("index _unsafe_index", "Tensor")
    | frozenset({"prims.convert_element_type.default", "quantized_decomposed.convert_element_type.no_fuse"})
    | frozenset({"py.operator.getitem"})
)
LOOKUPS = _named("embedding index_select take take_along_dim gather") | _named("index _unsafe_index", "Tensor")
CASTS = (
    _named("to", "dtype", "dtype_layout", "device", "other")
    | _named("_to_copy type_as")
    | frozenset({"prims.convert_element_type.default", "quantized_decomposed.convert_element_type.no_fuse"})
)
JOINS = _words("cat concat concatenate stack hstack vstack dstack row_stack column_stack")
"""Data movement whose operands all reach the result."""

ARITHMETIC = _words(
    "sub mul div add rsub neg negative subtract multiply divide true_divide floor_divide remainder fmod where addcmul "
    "bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ "
    "__lshift__ __rshift__ __iand__ __ior__ __ilshift__ __irshift__ clamp clip round abs ldexp"
)
BIT_OPS = _words(
    "bitwise_and bitwise_left_shift bitwise_right_shift __and__ __lshift__ __rshift__ __iand__ __ilshift__ __irshift__ "
    "floor_divide remainder fmod"
)
"""What codes are taken out of wider integers with."""

PRODUCTS = _words(
    "linear matmul mm bmm mv dot vdot inner outer tensordot bilinear addmm addmv addbmm baddbmm einsum "
    "linalg_multi_dot linalg_matmul chain_matmul _grouped_mm _addmm_activation convolution _convolution "
    "_convolution_mode conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d mkldnn_convolution "
    "mkldnn_linear _slow_conv2d_forward thnn_conv2d conv_depthwise3d lstm gru rnn_tanh rnn_relu lstm_cell gru_cell "
    "mkldnn_rnn_layer embedding_bag _embedding_bag _embedding_bag_forward_only scaled_dot_product_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu _native_multi_head_attention"
)
OTHER_PRODUCTS = _words(
    "mkldnn._linear_pointwise mkldnn._convolution_pointwise mkl._mkl_linear higher_order.flex_attention"
)
"""Products of other namespaces, without their overloads."""

BIAS_FIRST = _words("addmm addmv addbmm baddbmm _addmm_activation")
"""Products whose first operand is only added to the result."""

BIAS_LAST = _words(
    "linear convolution _convolution _convolution_mode conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d mkldnn_convolution mkldnn_linear thnn_conv2d conv_depthwise3d"
)
"""Products whose third operand is only added to the result."""

INTEGER_KERNELS = _words(
    "aten._int_mm aten._scaled_mm aten._scaled_mm_v2 aten._weight_int8pack_mm aten._weight_int4pack_mm_for_cpu "
    "aten._weight_int4pack_mm aten._dyn_quant_matmul_4bit aten.fbgemm_linear_int8_weight "
    "aten.fbgemm_linear_int8_weight_fp32_activation"
)
"""Operators that read codes in their inner loop; so do those of :data:`INTEGER_NAMESPACES`."""

INTEGER_NAMESPACES = ("onednn.q", "quantized.", "_quantized.", "qcompiler.")


def base(name: str) -> str:
    """``mul`` of ``aten.mul_.Tensor``: without namespace, overload and the mark of the in-place form."""
    word = name.split(".")[1] if name.count(".") >= 2 else name.rpartition(".")[2]
    return word[:-1] if word.endswith("_") and not word.startswith("_") else word
