"""Reference semantics of quantization and of each ``q.*`` op: clear, in float64 where that is sensible, not fast.

Every other implementation agrees with this one: :mod:`qcompiler.rtn` bit for bit, kernels within the bounds of their
rows. Rounding is to nearest, ties to even, then saturation, as in ONNX QuantizeLinear:
``code = clamp(round(x / scale) + zero)`` and ``value = (code - zero) * scale``. The division is done in float32 for
f32, f16 and bf16 tensors, in float64 for f64. A float zero point is added before rounding. Float and codebook codes are
those of :mod:`qcompiler.float_codes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import float_codes, integer_numerics, spec
from qcompiler.clipping import (
    CHUNK,
    FACTORS,
    Clip,
    Floats,
    affine_params,
    best_factor,
    check_codes,
    search_range,
    shrink_errors,
    work_dtype,
)
from qcompiler.dtypes import Array, DType, dtype_of
from qcompiler.errors import BadWeights, InputError
from qcompiler.scheme import Scheme

ROWS = 1024
"""Output features of a linear that are dequantized at a time."""


# -- parameters ------------------------------------------------------------------------------------------------


def choose_qparams(x: Array, scheme: Scheme, clip: Clip = "absmax") -> tuple[Array, Array | None]:
    """Scale (dtype of ``x``) and zero point (None when symmetric) of ``x``, of the shape of ``spec.scale_shape``.

    ``clip`` is ``absmax`` (the whole range of each group) or ``mse`` (of the ranges shrunk by ``clipping.FACTORS`` the
    one with the least sum of squared errors). The law of the parameters is :func:`qcompiler.clipping.affine_params`.
    Raises BadWeights for NaN or infinity, InputError for a scheme that makes no codes (:func:`clipping.check_codes`).
    """
    check_codes(scheme, clip)
    x = np.asarray(x)
    element = dtype_of(x.dtype)
    shape = spec.scale_shape(x.shape, scheme)
    if not element.is_float:
        raise InputError(f"only floats are quantized, not {element}{list(x.shape)}")
    finite = np.isfinite(x)
    if not finite.all():
        raise BadWeights(int(x.size - np.count_nonzero(finite)), x.size)
    if not x.size:
        return affine_params(np.zeros(shape), np.zeros(shape), scheme, element)
    work = x.astype(work_dtype(element))
    if scheme.granularity == "tensor":
        lo, hi = _tensor_range(work.reshape(len(x) if x.ndim else 1, -1), scheme, element, clip)
        return affine_params(lo.reshape(shape), hi.reshape(shape), scheme, element)
    axis = _axis(x, scheme)
    if scheme.granularity == "channel":
        lo, hi = _column_range(np.moveaxis(work, axis, -1).reshape(-1, shape[0]), scheme, element, clip)
        return affine_params(lo, hi, scheme, element)
    if scheme.granularity == "block":
        high, wide = scheme.group if axis == 1 else scheme.group[::-1]
        blocks = [
            [work[r : r + high, c : c + wide] for c in range(0, x.shape[1], wide)] for r in range(0, len(x), high)
        ]
        lo, hi = (np.array([[float(op(b)) for b in row] for row in blocks]) for op in (np.min, np.max))
        return affine_params(lo, hi, scheme, element)
    rows = np.moveaxis(work, axis, 0)
    size = scheme.group[0]
    ranges = [
        _column_range(rows[at : at + size].reshape(min(size, len(rows) - at), -1), scheme, element, clip)
        for at in range(0, len(rows), size)
    ]
    lo, hi = (np.moveaxis(np.stack([r[i] for r in ranges]).reshape(-1, *rows.shape[1:]), 0, axis) for i in (0, 1))
    return affine_params(lo, hi, scheme, element)


def _axis(x: Array, scheme: Scheme) -> int:
    assert scheme.axis is not None  # spec.scale_shape has refused a missing one
    return scheme.axis % x.ndim


def _column_range(x: Array, scheme: Scheme, element: DType, clip: Clip) -> tuple[Floats, Floats]:
    """The range of each column of ``x[L, Q]``, a column being a group; float64 ``[Q]``."""
    x = np.ascontiguousarray(x)
    lo, hi = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
    return search_range(x, lo, hi, scheme, element) if clip == "mse" else (lo, hi)


def _tensor_range(x: Array, scheme: Scheme, element: DType, clip: Clip) -> tuple[Floats, Floats]:
    """The range of all of ``x[A, B]``; errors are added down the columns first, then along them. float64 ``[1]``."""
    lo, hi = np.array([x.min()], np.float64), np.array([x.max()], np.float64)
    if clip == "mse":
        errors = np.zeros((len(FACTORS), x.shape[1]))
        for at in range(0, len(x), CHUNK):
            errors += shrink_errors(x[at : at + CHUNK], lo, hi, scheme, element)
        factor = best_factor(errors.sum(axis=1, keepdims=True))
        lo, hi = lo * factor, hi * factor
    return lo, hi


def spread(params: Array, shape: tuple[int, ...], scheme: Scheme) -> Array:
    """Scales or zeros, shaped as ``spec.scale_shape`` says, so that they broadcast over a tensor of ``shape``.

    Raises InputError when they have another shape.
    """
    want = spec.scale_shape(shape, scheme)
    if tuple(params.shape) != want:
        raise InputError(
            f"<{scheme}>: the parameters of a tensor {list(shape)} have shape {list(want)}, not {list(params.shape)}"
        )
    if scheme.granularity in ("tensor", "token"):
        return params
    if scheme.granularity == "block":
        if scheme.dynamic:
            return np.repeat(params, scheme.group[1], -1)[..., : shape[-1]]
        high, wide = scheme.group if (scheme.axis or 0) % 2 else scheme.group[::-1]
        return np.repeat(np.repeat(params, high, 0), wide, 1)[: shape[0], : shape[1]]
    axis = (scheme.axis or 0) % len(shape)
    if scheme.granularity == "channel":
        return params.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    repeated: Array = np.repeat(params, scheme.group[0], axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return repeated


# -- the ops -----------------------------------------------------------------------------------------------------


def quantize(x: Array, scale: Array, zero: Array | None, scheme: Scheme) -> Array:
    """Codes of ``x`` (any rank, any float dtype), one a byte: int8 for signed types, uint8 for unsigned ones and nf4.

    ``scale`` and ``zero`` are shaped as ``spec.scale_shape`` says; infinities saturate. Raises InputError for NaN, for
    a scale that is zero or not finite, and for parameters of another shape.
    """
    check_codes(scheme)
    _check_zero(zero, scheme)
    x, scale = np.asarray(x), np.asarray(scale)
    element = dtype_of(x.dtype)
    if not element.is_float:
        raise InputError(f"only floats are quantized, not {element}{list(x.shape)}")
    work = work_dtype(element)
    if np.isnan(x).any():
        raise InputError(f"<{scheme}>: {int(np.isnan(x).sum())} of {x.size} values are NaN and have no code")
    if not (np.isfinite(scale) & (scale != 0)).all():
        raise InputError(f"<{scheme}>: a scale is zero or not finite; nothing can be divided by it")
    with np.errstate(over="ignore"):
        codes = x.astype(work) / spread(scale, x.shape, scheme).astype(work)
    if not scheme.dtype.is_integer:
        return float_codes.nearest(codes, scheme.dtype)
    if zero is None:
        codes = np.rint(codes)
    elif scheme.zero == "float":
        codes = np.rint(codes + spread(zero, x.shape, scheme).astype(work))
    else:
        codes = np.rint(codes) + spread(zero, x.shape, scheme).astype(work)
    out: Array = np.clip(codes, scheme.dtype.qmin, scheme.dtype.qmax).astype(scheme.dtype.storage)
    return out


def dequantize(codes: Array, scale: Array, zero: Array | None, scheme: Scheme, dtype: DType) -> Array:
    """``(code - zero) * scale``, exact in float64, then rounded once to ``dtype``.

    Raises InputError where codes are not stored as the scheme's type, or parameters have another shape.
    """
    check_codes(scheme)
    _check_zero(zero, scheme)
    scale = spread(np.asarray(scale), codes.shape, scheme)
    zero = None if zero is None else spread(np.asarray(zero), codes.shape, scheme)
    return _values(codes, scale, zero, scheme).astype(dtype.storage)


def _values(codes: Array, scale: Array, zero: Array | None, scheme: Scheme) -> Floats:
    """``(code - zero) * scale`` in float64; the parameters broadcast."""
    if codes.dtype != scheme.dtype.storage:
        raise InputError(f"<{scheme}>: codes are stored as {scheme.dtype.storage}, not {codes.dtype}")
    values = code_values(codes, scheme.dtype)
    if zero is not None:
        values -= zero.astype(np.float64)
    values *= scale.astype(np.float64)
    return values


def code_values(codes: Array, element: DType) -> Floats:
    """The numbers that codes of type ``element`` stand for, before zero point and scale; float64."""
    return codes.astype(np.float64) if element.is_integer else float_codes.decode(codes, element)


def _check_zero(zero: Array | None, scheme: Scheme) -> None:
    if (zero is None) != (scheme.zero == "none"):
        has = "a zero point" if zero is not None else "none"
        raise InputError(f"<{scheme}>: an asymmetric scheme has a zero point and a symmetric one has none, got {has}")


def q_linear(x: Array, codes: Array, scale: Array, zero: Array | None, bias: Array | None, scheme: Scheme) -> Array:
    """``x[.., K]`` times the transpose of the dequantized ``codes[N, K]``, plus ``bias[N]``: ``[.., N]``, as ``x``.

    ``scale`` and ``zero`` are ``[N, G]`` (``[N, 1]`` per channel, ``[1, 1]`` per tensor). Products and sums are
    float64, rounded once to the dtype of ``x``. Raises InputError for shapes that do not fit.
    """
    n, k = _matrix(codes, scale, zero, scheme)
    if not x.ndim or x.shape[-1] != k:
        raise InputError(f"the activation {list(x.shape)} does not end in K={k} of the codes {list(codes.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise InputError(f"the bias has shape {list(bias.shape)}, the codes have N={n}")
    wide = x.astype(np.float64)
    out = np.empty((*x.shape[:-1], n), x.dtype)
    for at in range(0, n, ROWS):
        part = slice(at, min(at + ROWS, n))
        y = wide @ _rows(codes, scale, zero, scheme, part).T
        if bias is not None:
            y += bias[part].astype(np.float64)
        out[..., part] = y.astype(x.dtype)
    return out


def q_embedding(indices: Array, codes: Array, scale: Array, zero: Array | None, scheme: Scheme) -> Array:
    """Rows ``indices`` of the dequantized table ``codes[V, K]``: ``[.., K]`` in the dtype of ``scale``.

    ``scale`` and ``zero`` as for :func:`q_linear`; indices run from -V to V - 1, negative ones count from the end.
    Raises InputError for an index outside, or shapes that do not fit.
    """
    v, k = _matrix(codes, scale, zero, scheme)
    if indices.size and not (-v <= indices.min() and indices.max() < v):
        raise InputError(f"indices run from {indices.min()} to {indices.max()}, the table has {v} rows")
    chosen = _rows(codes, scale, zero, scheme, indices.astype(np.int64).reshape(-1))
    return chosen.astype(scale.dtype).reshape(*indices.shape, k)


def _matrix(codes: Array, scale: Array, zero: Array | None, scheme: Scheme) -> tuple[int, int]:
    check_codes(scheme)
    _check_zero(zero, scheme)
    if codes.ndim != 2:
        raise InputError(f"codes are [N, K], not {list(codes.shape)}")
    n, k = codes.shape
    want = spec.column_shape(n, k, scheme)
    for name, params in (("scale", scale), ("zero point", zero)):
        if params is not None and tuple(params.shape) != want:
            raise InputError(f"<{scheme}>: the {name} of codes {[n, k]} is {list(want)}, not {list(params.shape)}")
    return n, k


def _rows(codes: Array, scale: Array, zero: Array | None, scheme: Scheme, rows: slice | Array) -> Floats:
    """The chosen rows of the dequantized matrix, float64."""

    def wide(params: Array) -> Array:
        if scheme.granularity == "block":
            chosen = params[np.arange(len(codes))[rows] // scheme.group[0]]
        else:
            chosen = params if scheme.granularity == "tensor" else params[rows]
        return np.repeat(chosen, scheme.group[-1], 1)[:, : codes.shape[1]] if scheme.group else chosen

    return _values(codes[rows], wide(scale), None if zero is None else wide(zero), scheme)


def evaluate(op_name: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any]) -> Array:
    """The result of the ``q.*`` op called ``op_name`` on its operands; an optional one is None or left out.

    Raises InputError for an op that has no reference here, or for a missing operand. ``q.choose_qparams`` has several
    results: see :func:`evaluate_all`.
    """
    operands = [None if a is None else np.asarray(a) for a in arrays]
    if op_name in integer_numerics.NAMES:
        return integer_numerics.Integer(operands, attrs, quantize, dequantize).run(op_name)
    required = {"q.quantize": 2, "q.dequantize": 2, "q.linear": 3, "q.embedding": 3}.get(op_name)
    if required is None:
        raise InputError(f"no reference for {op_name}; there is one for {', '.join(spec.SPECS)}")
    scheme: Scheme = attrs["scheme"]
    given = [a for a in operands[:required] if a is not None]
    if len(given) < required:
        raise InputError(f"{op_name} needs {required} operands before the optional ones, got {len(given)}")
    zero, bias = [*operands[required:], None, None][:2]
    match op_name:
        case "q.quantize":
            return quantize(given[0], given[1], zero, scheme)
        case "q.dequantize":
            return dequantize(given[0], given[1], zero, scheme, dtype_of(given[1].dtype))
        case "q.linear":
            return q_linear(given[0], given[1], given[2], zero, bias, scheme)
    return q_embedding(given[0], given[1], given[2], zero, scheme)


def evaluate_all(op_name: str, arrays: Sequence[Array | None], attrs: Mapping[str, Any]) -> list[Array]:
    """Every result of the ``q.*`` op called ``op_name``, in order; see :func:`evaluate`."""
    if op_name != "q.choose_qparams":
        return [evaluate(op_name, arrays, attrs)]
    if not arrays or arrays[0] is None:
        raise InputError("q.choose_qparams needs a tensor")
    scale, zero = integer_numerics.dynamic_params(np.asarray(arrays[0]), attrs["scheme"])
    return [scale] if zero is None else [scale, zero]
