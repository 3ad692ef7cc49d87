"""Mends Triton's interpreter, which computes with the bits of bf16 and of 8-bit floats as if they were integers.

Arrays of ml_dtypes take the place of the bits. Casts go through f32 and saturate towards 8-bit floats, as
``cvt.satfinite`` of the GPU does; products are exact in f32 (f64 for integers), on BLAS; loads and stores move bits;
bf16 atomics read, add and write, which is right because programs run one after another; ``dot_scaled`` reads its
scales by their type. Two faults of triton 3.6 are mended with them: bf16 constants, and ``int()`` of arrays of one
element, which NumPy 2.4 refuses.

Not mended: ``inline_asm_elementwise`` and libdevice do not run; f32 products are not rounded to tf32; the order of sums
is NumPy's; races, barriers and layouts do not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic

FLOATS: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "fp_to_fp")

Handle: Any = interpreter.TensorHandle
_dtype_before = interpreter._get_np_dtype
_tensor_before = interpreter._patch_lang_tensor
_applied = False


def numpy_dtype(kind: Any) -> np.dtype[Any]:
    """The dtype of arrays that hold a Triton type."""
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    if not isinstance(element, tl.pointer_type) and element in FLOATS:
        return np.dtype(FLOATS[element])
    return _dtype_before(kind)  # type: ignore[no-any-return]


def bits(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory as unsigned integers, where the C++ of the interpreter does not know the dtype."""
    if data.dtype.kind == "V" or data.dtype.type in FLOATS.values():
        return data.view(np.uint8 if data.itemsize == 1 else np.uint16)
    return data


def cast(_: Any, handle: Any, kind: Any, rounding: Any = None) -> Any:
    """Between floats, and between floats and integers; to the nearest even."""
    if rounding not in (None, ir.ROUNDING_MODE.RTNE):
        # No kernel here asks for another rounding; a test that did must not get this one in silence.
        raise NotImplementedError(f"the interpreter's casts round to the nearest even, not {rounding}")
    target, data = kind.scalar, handle.data
    if target in FLOATS or handle.dtype.scalar in FLOATS:
        data = data.astype(np.float32)
    if target in LARGEST:
        data = np.where(np.isnan(data), data, np.clip(data, -LARGEST[target], LARGEST[target]))
    with np.errstate(over="ignore", invalid="ignore"):
        return Handle(data.astype(numpy_dtype(target)), target)


def dot(_: Any, a: Any, b: Any, c: Any, *precision: Any) -> Any:
    """``a @ b + c``, [.., M, K] by [.., K, N]."""
    if c.data.dtype.kind in "iu":
        wide = np.float32 if a.data.shape[-1] <= 1024 and a.data.itemsize == 1 else np.float64
        return Handle(
            np.matmul(a.data.astype(wide), b.data.astype(wide)).astype(np.int64).astype(np.int32) + c.data,
            c.dtype.scalar,
        )
    wide = np.promote_types(np.float32, c.data.dtype) if c.data.dtype == np.float64 else np.float32
    total = np.matmul(a.data.astype(wide), b.data.astype(wide)) + c.data.astype(wide)
    return Handle(total.astype(c.data.dtype), c.dtype.scalar)


def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
    element = pointers.get_element_ty()
    kind = numpy_dtype(element)
    plain = bits(np.empty(0, kind)).dtype
    rest = np.zeros(pointers.data.shape, plain) if other is None else bits(np.ascontiguousarray(other.data))
    found = interpreter._interpreter.load(pointers.data, mask.data, rest, plain)
    return Handle(found.view(kind), element)


def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any, **__: Any) -> Any:
    return interpreter._interpreter.store(pointers.data, bits(np.ascontiguousarray(value.data)), mask.data)


def atomics(before: Callable[..., Any]) -> Callable[..., Any]:
    """``create_atomic_rmw`` that knows bf16 sums."""

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return before(self, op, pointers, value, mask, sem, scope)
        taken = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        if op != ir.ATOMIC_OP.FADD or np.unique(taken).size != taken.size:
            # The load and the store below would lose all but one of several additions to one place.
            raise NotImplementedError(
                "bf16 atomics of the interpreter add, each element of a tile to a place of its own"
            )
        old = masked_load(self, pointers, mask, None)
        masked_store(self, pointers, Handle(old.data + value.data, tl.bfloat16), mask)
        return old

    return create_atomic_rmw


def _scaled_operand(handle: Any, scale: Any, kind: Any, along_k: bool, right: bool) -> np.ndarray[Any, Any]:
    """f32 values of an operand, [.., M, K] or [.., K, N] when ``right``; scales [.., M or N, K / group]."""
    data = handle.data
    if kind == ir.ScaleDotElemTypeTY.E2M1:
        axis = data.ndim - (1 if along_k != right else 2)
        pair = np.stack([data.view(np.uint8) & 15, data.view(np.uint8) >> 4], axis=axis + 1)
        shape = [*data.shape[:axis], data.shape[axis] * 2, *data.shape[axis + 1 :]]
        data = pair.reshape(shape).view(ml_dtypes.float4_e2m1fn)
    values = data.astype(np.float32)
    if scale is None:
        return values
    exponents = scale.data.view(ml_dtypes.float8_e8m0fnu) if scale.data.dtype.kind in "iu" else scale.data
    group = values.shape[-2 if right else -1] // exponents.shape[-1]
    factors = np.repeat(exponents.astype(np.float32), group, axis=-1)
    return values * (np.swapaxes(factors, -1, -2) if right else factors)


def dot_scaled(
    self: Any,
    a: Any,
    a_scale: Any,
    a_kind: Any,
    b: Any,
    b_scale: Any,
    b_kind: Any,
    _fast: Any,
    a_k: bool,
    b_k: bool,
    c: Any,
) -> Any:
    left = _scaled_operand(a, a_scale, a_kind, a_k, right=False)
    right = _scaled_operand(b, b_scale, b_kind, b_k, right=True)
    return Handle(np.matmul(left, right) + c.data, c.dtype.scalar)


def _formats_as_constants(before: Callable[..., Any]) -> Callable[..., Any]:
    """triton 3.6 reads ``.value`` of the formats, which the interpreter hands over as plain words."""

    def dot_scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [tl.constexpr(a) if isinstance(a, str) else a for a in args]
        return before(self, *given, **kwargs)

    return dot_scaled


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _tensor_before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(()).item()))


def _erf(_: Any, handle: Any) -> Any:
    return Handle(torch.erf(torch.from_numpy(np.ascontiguousarray(handle.data))).numpy(), handle.dtype.scalar)


def _fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once but for ties of the sum in f64; triton 3.6 rounds the product of f32 too."""
    wide = np.promote_types(np.float64, x.data.dtype)
    total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        return Handle(total.astype(x.data.dtype), x.dtype.scalar)


def _clamp(_: Any, value: Any, low: Any, high: Any, propagate: Any) -> Any:
    upper, lower = (np.fmin, np.fmax) if propagate == ir.PROPAGATE_NAN.NONE else (np.minimum, np.maximum)
    return Handle(upper(lower(value.data, low.data), high.data), value.dtype.scalar)


def apply() -> None:
    """Mend the interpreter of this process, once."""
    global _applied
    if _applied:
        return
    _applied = True
    builder: Any = interpreter.InterpreterBuilder
    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_lang_tensor = _patch_tensor
    for name in CASTS:
        setattr(builder, f"create_{name}", cast)
    builder.create_dot = dot
    builder.create_masked_load = masked_load
    builder.create_masked_store = masked_store
    builder.create_atomic_rmw = atomics(builder.create_atomic_rmw)
    if not hasattr(builder, "create_dot_scaled"):
        TritonSemantic.dot_scaled = _formats_as_constants(TritonSemantic.dot_scaled)  # type: ignore[method-assign]
    builder.create_dot_scaled = dot_scaled
    builder.create_erf = _erf
    builder.create_fma = _fma
    builder.create_clampf = _clamp
    builder.get_bf16 = lambda self, value: Handle(np.array([value], dtype=ml_dtypes.bfloat16), tl.bfloat16)
    if not hasattr(builder, "create_fneg"):
        builder.create_fneg = lambda self, value: Handle(np.negative(value.data), value.dtype.scalar)
