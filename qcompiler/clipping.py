"""The law of scales and zero points, and the search for a clipping range that loses less than the full one.

No order of reading changes a bit (law L8): minima and maxima do not depend on order, parameters are computed in float64
and rounded once to the dtype of the weight, and squared errors are added in an order that depends on the length of a
group alone.
"""

from __future__ import annotations

import math
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler import float_codes
from qcompiler.dtypes import F16, Array, DType
from qcompiler.errors import InputError
from qcompiler.scheme import Scheme

Clip = Literal["absmax", "mse"]
Floats = NDArray[np.float64]

FACTORS: tuple[float, ...] = tuple(1 - i / 40 for i in range(20))
"""What ``clip="mse"`` shrinks a range by: 1.0, 0.975, ... 0.525. For 128 normal weights it finds about 0.9 at 4 bits,
0.6 at 2 and 1.0 at 8."""

SCALE_BITS = 8
"""Significant bits of the scales of codes of up to 4 bits: as many as bf16 has. It moves a scale by at most 0.4 %."""

CHUNK = 1024
"""Squared errors along the reduction axis are added in chunks of this length: the largest group a scheme may have."""

STRIP = 1 << 17
"""Errors of so many elements at a time: they and two buffers stay near the second-level cache."""


def check_codes(scheme: Scheme, clip: Clip = "absmax") -> None:
    """Raise InputError unless a weight can be quantized by ``scheme``: to integers of at most 8 bits, floats, nf4.

    Ranges are searched (``clip`` is ``mse``) where one range makes one free scale: no blocks, no typed scales.
    """
    if scheme.dtype.name not in float_codes.KINDS and (not scheme.dtype.is_integer or scheme.bits > 8):
        known = ", ".join(float_codes.KINDS)
        raise InputError(f"<{scheme}>: codes are integers of up to 8 bits, or {known}, not {scheme.dtype}")
    if clip == "mse" and (scheme.scale is not None or scheme.granularity == "block"):
        raise InputError(f"<{scheme}>: no range is searched for blocks or typed scales; use clip = 'absmax'")


def affine_params(lo: Array, hi: Array, scheme: Scheme, element: DType) -> tuple[Array, Array | None]:
    """Scale (``element``) and zero point (codes' dtype, ``element`` when float, None when symmetric) of ranges lo..hi.

    ``lo`` and ``hi`` are finite float64 of one shape, any sign. The formulas, with qmin and qmax of the code type:
      - symmetric, as compressed-tensors: scale = max(|lo|, |hi|) / ((qmax - qmin) / 2), so int4 divides by 7.5 and the
        positive end saturates at 7. Unsigned codes without a zero point hold 0..hi: scale = hi / qmax.
      - floats and codebooks: scale = max(|lo|, |hi|) / (their largest value: 448, 57344, 6, or 1 for nf4).
      - asymmetric, as ONNX DynamicQuantizeLinear: lo = min(lo, 0), hi = max(hi, 0), scale = (hi - lo) / (qmax - qmin),
        zero = clamp(round(qmin - lo / scale)); a float zero point is the same, not rounded to an integer.
      - an all-zero range has scale 1, and a zero point that makes 0 exact.
      - the scale is rounded to ``element`` before the zero point (and any code) is computed from it. It is never 0:
        below the smallest normal number it becomes that number, since arithmetic may flush subnormals. In f16, whose
        subnormals are normal in the f32 that kernels compute in, it is rounded up instead, so that none is clipped.
      - scales of codes of up to 4 bits are rounded to :data:`SCALE_BITS` significant bits, to nearest, whatever
        ``element`` is and before anything is computed from them: kernels that keep scales in bf16 compute with the
        very scales that the codes were made for, and all targets have the same codes.
      - scales of a type of their own: :func:`qcompiler.float_codes.typed_scales`. One factor belongs to all the ranges
        given for f8e4m3, so they are those of a whole tensor.
    Raises InputError for a negative value in an unsigned symmetric scheme.
    """
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    if not scheme.dtype.is_integer:
        return _float_scale(np.maximum(-lo, hi), scheme, element), None
    qmin, qmax = scheme.dtype.qmin, scheme.dtype.qmax
    if not scheme.symmetric:
        exact = (hi / 2 - lo / 2) / ((qmax - qmin) / 2)  # halves, so that the full range of f64 does not overflow
    elif scheme.dtype.kind == "uint":
        if (lo < 0).any():
            raise InputError(
                f"<{scheme}>: values down to {lo.min():g} have no code in {scheme.dtype} without a zero point; "
                "use a signed type or 'asym'"
            )
        exact = hi / qmax
    else:
        exact = np.maximum(-lo, hi) / ((qmax - qmin) / 2)
    bounded = _no_underflow(exact, element)
    if scheme.bits <= 4:
        bounded = short(bounded, element)
    scale = np.where(exact > 0, bounded, 1.0).astype(element.storage)
    if scheme.zero == "none":
        return scale, None
    zero = np.clip(qmin - lo / scale.astype(np.float64), qmin, qmax)
    return scale, np.rint(zero).astype(scheme.dtype.storage) if scheme.zero == "int" else zero.astype(element.storage)


def _float_scale(absmax: Floats, scheme: Scheme, element: DType) -> Array:
    """The scale of groups of float or codebook codes."""
    if scheme.scale is not None:
        typed = float_codes.typed_scales(absmax, scheme.dtype, scheme.scale)
        return _no_underflow(typed, element).astype(element.storage)
    exact = absmax / float_codes.largest(scheme.dtype)
    bounded = _no_underflow(exact, element)
    if scheme.bits <= 4:
        bounded = short(bounded, element)
    return np.where(exact > 0, bounded, 1.0).astype(element.storage)


def _no_underflow(exact: Floats, element: DType) -> Floats:
    info = ml_dtypes.finfo(element.storage)  # type: ignore[no-untyped-call]
    if element is not F16:
        return np.maximum(exact, float(info.smallest_normal))
    step = float(info.smallest_subnormal)
    return np.where(exact < float(info.smallest_normal), np.ceil(exact / step) * step, exact)


def short(scale: Floats, element: DType) -> Floats:
    """Positive scales rounded to :data:`SCALE_BITS` significant bits, to nearest, ties to even; never to infinity."""
    mantissa, exponent = np.frexp(scale)
    steps = 1 << SCALE_BITS
    out: Floats = np.ldexp(np.rint(mantissa * steps) / steps, exponent)
    largest = float(ml_dtypes.finfo(element.storage).max)  # type: ignore[no-untyped-call]
    return np.minimum(out, math.ldexp((steps - 1) / steps, math.frexp(largest)[1]))


def raised(lo: Floats, hi: Floats, floor: Floats, scheme: Scheme) -> tuple[Floats, Floats]:
    """The ranges widened so far that :func:`affine_params` makes scales of at least ``floor`` of them.

    A range of zeros gets the floor itself where that is above 0. The scale is rounded after that, so it may be half a
    unit in the last place below the floor: of its dtype, or of :data:`SCALE_BITS` bits for codes of up to 4 bits.
    """
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    if not scheme.dtype.is_integer:
        return lo, np.maximum(hi, floor * float_codes.largest(scheme.dtype))
    qmin, qmax = scheme.dtype.qmin, scheme.dtype.qmax
    if not scheme.symmetric:
        return lo, np.maximum(hi, lo + floor * (qmax - qmin))
    return lo, np.maximum(hi, floor * (qmax if scheme.dtype.kind == "uint" else (qmax - qmin) / 2))


def work_dtype(element: DType) -> np.dtype[np.float32] | np.dtype[np.float64]:
    """What codes are computed in: f64 for f64, f32 for every narrower float, as ONNX QuantizeLinear does."""
    return np.dtype(np.float64) if element.name == "f64" else np.dtype(np.float32)


def shrink_errors(x: Array, lo: Floats, hi: Floats, scheme: Scheme, element: DType) -> Floats:
    """Squared errors ``[len(FACTORS), Q]`` of at most CHUNK rows ``x[L, Q]`` (work dtype) under each shrunken range.

    ``lo`` and ``hi`` are the range of each column's group, float64 ``[Q]`` (or ``[1]``). Errors are in steps of the
    scale of the full range, so that those of huge or tiny weights neither overflow nor vanish.
    """
    if len(x) > CHUNK:
        raise InputError(f"squared errors are added {CHUNK} rows at a time, not {len(x)}")
    factors = np.asarray(FACTORS)[:, None]
    scales, zeros = affine_params(lo * factors, hi * factors, scheme, element)
    weights = np.square(scales.astype(np.float64) / scales[0].astype(np.float64))
    out = np.empty((len(FACTORS), x.shape[1]))
    steps, codes = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    for i in range(len(FACTORS)):
        np.divide(x, scales[i].astype(x.dtype), out=steps)
        if not scheme.dtype.is_integer:
            float_codes.rounded(steps, scheme.dtype, codes)
            out[i] = _fold(np.square(np.subtract(steps, codes, out=steps), out=steps)) * weights[i]
            continue
        low, high = x.dtype.type(scheme.dtype.qmin), x.dtype.type(scheme.dtype.qmax)
        if zeros is None:
            np.clip(np.rint(steps, out=codes), low, high, out=codes)
        elif scheme.zero == "float":
            np.add(steps, zeros[i].astype(x.dtype), out=steps)
            np.clip(np.rint(steps, out=codes), low, high, out=codes)
        else:  # the zero point shifts the bounds instead of the codes: round(x) + z >= low where round(x) >= low - z
            zero = zeros[i].astype(x.dtype)
            np.maximum(np.rint(steps, out=codes), low - zero, out=codes)
            np.minimum(codes, high - zero, out=codes)
        np.subtract(steps, codes, out=steps)
        np.square(steps, out=steps)
        out[i] = _fold(steps) * weights[i]
    return out


def _fold(rows: Array) -> Array:
    """The sum of ``rows`` along axis 0, halving: an order that only their number decides. ``rows`` is overwritten."""
    n = len(rows)
    while n > 1:
        half = (n + 1) // 2
        np.add(rows[: n - half], rows[half:n], out=rows[: n - half])
        n = half
    first: Array = rows[0]
    return first


def best_factor(errors: Floats) -> Floats:
    """The factor of the least error in each column of ``errors``; among equals the larger range."""
    best: Floats = np.asarray(FACTORS)[np.argmin(errors, axis=0)]
    return best


def search_range(x: Array, lo: Floats, hi: Floats, scheme: Scheme, element: DType) -> tuple[Floats, Floats]:
    """The range ``[Q]`` that loses least of each column of ``x[L, Q]``, of any length L; a column is a whole group."""
    factor = np.empty(x.shape[1])
    wide = max(1, STRIP // min(max(len(x), 1), CHUNK))
    for c in range(0, x.shape[1], wide):
        part = slice(c, c + wide)
        errors = np.zeros((len(FACTORS), len(factor[part])))
        for at in range(0, len(x), CHUNK):
            errors += shrink_errors(x[at : at + CHUNK, part], lo[part], hi[part], scheme, element)
        factor[part] = best_factor(errors)
    return lo * factor, hi * factor
