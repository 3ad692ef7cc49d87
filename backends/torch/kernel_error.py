"""How far torch's low-bit CPU kernels may be from the reference semantics of the op that they were chosen for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.backends.torch.held import argument
from qcompiler.backends.torch.nodes_triton import MUL, SLOTS, number_at
from qcompiler.backends.torch.weights_triton import activation_of, among, is_ours, weight_of
from qcompiler.dtypes import UINT8, Array
from qcompiler.ir import Op, Value

BF16 = 2.0**-8
"""Relative error of one rounding to bf16."""
REQUANTIZED = 2.0**-6
"""Steps: an int32 sum becomes a code with one f32 factor."""
_ROUNDED = 3.5
"""Roundings to bf16 on the way of a product: activation, weight, result; and half of one for the sums in f32."""


def error_of(op: Op, operands: Sequence[Array | None]) -> Array | float:
    """The bound for a call of a kernel on these operands, absolute; 0 for other ops.

    Triton's products, ``[M, N]``, round activations, and weights for large M, to 16 bits; what is multiplied behind
    them counts, the functions there (gelu, silu) by no more than they are given.

    int4: ``w = (q - 8) s + z`` is at most ``8 |s| + |z|``. int8: codes are at most 128, and what is multiplied behind
    the kernel counts. Both kernels take activations rounded to bf16, multiply in bf16, and sum in f32. oneDNN's sums
    are exact; where it gives codes, in steps, they went through one f32 factor.
    """
    if op.name in ("qcompiler.qlinear.default", "qcompiler.qconv.default"):
        return REQUANTIZED if op.results[0].tensor.dtype == UINT8 else 0.0
    if op.name == "aten._weight_int4pack_mm_for_cpu.default":
        x, _, both = (None if a is None else np.abs(a.astype(np.float64)) for a in operands[:3])
        if x is None or both is None:
            return 0.0
        groups = x.reshape(len(x), len(both), -1).sum(-1)
        bound: Array = _ROUNDED * BF16 * groups @ (8 * both[..., 0] + both[..., 1])
        return bound
    if op.name == "aten._weight_int8pack_mm.default":
        x, _, inside = (None if a is None else np.abs(a.astype(np.float64)) for a in operands[:3])
        if x is None or inside is None:
            return 0.0
        bound = _ROUNDED * BF16 * 128 * x.sum(-1, keepdims=True) * inside * _behind(op)
        return bound
    if is_ours(op) and "embedding" not in op.name:
        return _triton(op, operands)
    return 0.0


def _triton(op: Op, operands: Sequence[Array | None]) -> Array | float:
    """Of a product of ours: what its factors add up to without their signs, times what it is multiplied with."""
    known = among(op, operands)
    x, weight = activation_of(op, known), weight_of(op, known)
    if x is None or weight is None:
        return 0.0
    n = number_at(op, SLOTS[op.name.rpartition(".")[0]].n)
    total: Array = np.abs(x) @ np.abs(weight[:n, : x.shape[1]]).T
    mul = argument(op, MUL)
    factor = known(mul) if isinstance(mul, Value) else None
    return _ROUNDED * BF16 * total * (1.0 if factor is None else np.abs(factor.astype(np.float64)).reshape(-1, n))


def _behind(op: Op) -> Array | float:
    """The scales that the result of a kernel is multiplied with, through views and casts."""
    value = op.results[0]
    while len(value.users) == 1:
        (user,) = value.users
        scale = user.operand(1) if user.name == "aten.mul.Tensor" else None
        if scale is not None and scale.is_const and scale.payload is not None:
            return np.abs(scale.payload.array().astype(np.float64))
        if not user.results or user.operand(0) is not value:
            break
        value = user.results[0]
    return 1.0
