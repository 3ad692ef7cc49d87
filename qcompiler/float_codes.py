"""Codes that are floats of 8 or 4 bits, or indices of a codebook: their rounding, their values, and typed scales.

Floats: OCP 8-bit Floating Point v1.0 (E4M3, E5M2) and OCP Microscaling Formats v1.0 (E2M1, section 5.3.3). Rounding
is to nearest, ties to even, then saturation: a code is never infinity or NaN, and a negative value that rounds to zero
has the code of minus zero. NF4: the 16 quantiles of Dettmers et al., QLoRA, 2023 (arXiv 2305.14314, appendix E); the
code of a value is the index of the nearest entry, of the lower one in the middle between two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.dtypes import Array, DType
from qcompiler.errors import InputError

Floats = NDArray[np.float64]

NF4: NDArray[np.float32] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The values of the codes of ``nf4``; code 7 is zero."""

KINDS = ("f8e4m3", "f8e5m2", "f4e2m1", "nf4")
"""The code types of this module."""

E4M3_SMALLEST = 2.0**-9
"""The smallest positive number of f8e4m3."""

KEY = 3
"""Bits of a mantissa that name a value of any of the float code types, beside its sign and exponent."""


@dataclass(frozen=True, slots=True)
class Format:
    """A float code type: bits of its mantissa, exponent of its smallest normal number, its largest finite number."""

    mantissa: int
    least: int
    largest: float


FORMATS = {"f8e4m3": Format(3, -6, 448.0), "f8e5m2": Format(2, -14, 57344.0), "f4e2m1": Format(1, 0, 6.0)}


def largest(element: DType) -> float:
    """The largest value of a code of ``element``: what the largest weight of a group becomes."""
    return 1.0 if element.name == "nf4" else FORMATS[element.name].largest


@cache
def table(element: DType) -> Floats:
    """The value of each code, by its bits, read-only; NaN for a code that is no finite number."""
    if element.name == "nf4":
        values: Floats = NF4.astype(np.float64)
    else:
        values = np.arange(1 << element.bits, dtype=np.uint8).view(element.storage).astype(np.float64)
        values[~np.isfinite(values)] = np.nan
    values.flags.writeable = False
    return values


def decode(codes: Array, element: DType) -> Floats:
    """The values of ``codes``, float64; raises InputError for an index that the codebook does not have."""
    bits = codes.view(np.uint8)
    if element.name == "nf4" and bits.size and int(bits.max()) >= len(NF4):
        raise InputError(f"the codes of nf4 are 0 to 15, not {int(bits.max())}")
    return table(element)[bits]


def nearest(steps: Array, element: DType) -> Array:
    """The codes of ``steps`` (any float dtype, no NaN; infinities saturate), by a search among all the values.

    Clear and slow; :func:`encode` gives the same codes.
    """
    values = table(element)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))].astype(np.uint8)
    if element.is_float:
        order = order[order != 1 << (element.bits - 1)]  # minus zero: see below
    middles = (values[order][1:] + values[order][:-1]) / 2  # exact: no value has more than 24 bits
    at = np.searchsorted(middles, steps.astype(np.float64), side="left")
    if not element.is_float:
        return np.asarray(order[at])
    tie = (np.append(middles, np.inf)[at] == steps) & np.isfinite(steps)
    codes = np.asarray(order[at + (tie & (order[at] % 2 == 1))])
    codes[(codes == 0) & np.signbit(steps)] = 1 << (element.bits - 1)
    return codes.view(element.storage)


def widest(element: DType) -> float:
    """The largest difference of two neighbouring values."""
    known = np.sort(table(element))
    return float(np.diff(known[~np.isnan(known)]).max())


def reach(steps: Floats, element: DType) -> Floats:
    """The most that rounding may move each of ``steps``: half the gap around it, or how far it lies beyond the largest.

    Float64, no NaN. It is above 0 everywhere.
    """
    most = largest(element)
    beyond = np.maximum(np.abs(steps) - most, 0.0)
    inside = np.clip(steps, -most, most)
    if element.name == "nf4":
        at = np.clip(np.searchsorted(NF4, inside), 1, len(NF4) - 1)
        half: Floats = np.diff(NF4.astype(np.float64))[at - 1] / 2
    else:
        form = FORMATS[element.name]
        exponent = np.where(inside == 0, form.least, np.maximum(np.frexp(inside)[1] - 1, form.least))
        half = np.ldexp(0.5, exponent - form.mantissa)
    return np.maximum(half, beyond)


# -- fast ------------------------------------------------------------------------------------------------------


def encode(steps: Array, element: DType, values: Array, codes: NDArray[np.uint8]) -> None:
    """Put the nearest values of ``steps`` (f32, f64, no NaN) into ``values``, of its dtype, their bits into ``codes``.

    All have one shape. ``steps`` is left as it is.
    """
    if element.name == "nf4":
        _count(steps, codes)
        np.take(NF4.astype(steps.dtype), codes, out=values, mode="clip")
        return
    rounded(steps, element, values)
    bits: Array = values.view(np.int32 if steps.dtype == np.float32 else np.int64)
    shift, mask = (23 - KEY, (1 << 9 + KEY) - 1) if steps.dtype == np.float32 else (52 - KEY, (1 << 12 + KEY) - 1)
    keys = (bits >> shift) & mask
    np.take(_codes_of_keys(element, steps.dtype), keys, out=codes, mode="clip")


def rounded(steps: Array, element: DType, out: Array) -> None:
    """The nearest values of ``steps`` (f32 or f64, no NaN) in ``out``, of the same dtype.

    Adding 1.5 * 2^(e + p) to a number of exponent e in arithmetic of p + m mantissa bits leaves m of them, rounded to
    nearest even; subtracting it again is exact.
    """
    if element.name == "nf4":
        codes = np.empty(steps.shape, np.uint8)
        _count(steps, codes)
        np.take(NF4.astype(steps.dtype), codes, out=out, mode="clip")
        return
    form = FORMATS[element.name]
    word, bits, bias = (np.uint32, 23, 127) if steps.dtype == np.float32 else (np.uint64, 52, 1023)
    np.clip(steps, -form.largest, form.largest, out=out)
    exponent = np.bitwise_and(out.view(word), word(((2 * bias) + 1) << bits))
    np.maximum(exponent, word((form.least + bias) << bits), out=exponent)
    np.add(exponent, word(((bits - form.mantissa) << bits) | 1 << (bits - 1)), out=exponent)
    magic = exponent.view(steps.dtype)
    np.add(out, magic, out=out)
    np.subtract(out, magic, out=out)
    np.copysign(out, steps, out=out)


@cache
def _codes_of_keys(element: DType, work: np.dtype[Any]) -> NDArray[np.uint8]:
    """The bits of the value whose sign, exponent and first KEY mantissa bits are the index."""
    word, shift, signs = (np.uint32, 23 - KEY, 9) if work == np.float32 else (np.uint64, 52 - KEY, 12)
    out: NDArray[np.uint8] = np.zeros(1 << (signs + KEY), np.uint8)
    for code, value in enumerate(table(element)):
        if np.isfinite(value):
            out[int(value.astype(work).view(word) >> word(shift))] = code
    return out


def _count(steps: Array, codes: NDArray[np.uint8]) -> None:
    """Codes of ``nf4``: how many middles between two entries lie below each step."""
    wide = NF4.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    if steps.dtype == np.float32:  # the next f32 below: what is above the one is above the other
        narrow = middles.astype(np.float32)
        above = narrow.astype(np.float64) > middles
        middles = np.where(above, np.nextafter(narrow, np.float32(-np.inf)), narrow)
    more = np.empty(steps.shape, np.bool_)
    codes[...] = 0
    for middle in middles.astype(steps.dtype):
        np.greater(steps, middle, out=more)
        np.add(codes, more.view(np.uint8), out=codes)


# -- scales of a narrower type -----------------------------------------------------------------------------------


def typed_scales(absmax: Floats, element: DType, scale: DType) -> Floats:
    """Scales of type ``scale`` for groups whose largest magnitudes are ``absmax`` (float64, finite), codes ``element``.

    f8e8m0, as OCP Microscaling Formats v1.0, section 6.3: 2^(floor(log2(absmax)) - E), where 2^E is the largest power
    of two among the codes (4, 256, 32768); values above the largest code saturate. Exponents end at -127 and 127.

    f8e4m3, as NVFP4: ``g * e4m3(absmax / 6 / g)`` with one power of two ``g`` for all of ``absmax``, which is that of a
    whole tensor: the smallest at which no scale is above 448, so that as few as can be are subnormal. (NVIDIA's own
    checkpoints divide by ``max / (6 * 448)``, which is no power of two.) A group's scale is at least ``2^-9 g``; that
    of an all-zero group is ``g``, of an all-zero tensor 1.
    """
    if scale.name == "f8e8m0":
        top = int(np.frexp(largest(element))[1]) - 1
        exponent = np.clip(np.frexp(absmax)[1] - 1 - top, -127, 127)
        powers: Floats = np.where(absmax > 0, np.ldexp(1.0, exponent), 1.0)
        return powers
    most = float(absmax.max(initial=0.0)) / largest(element)
    g = common_factor(most)
    exact = np.maximum(absmax / largest(element) / g, E4M3_SMALLEST)
    mantissa = np.maximum(np.frexp(exact)[1] - 1, FORMATS["f8e4m3"].least) - FORMATS["f8e4m3"].mantissa
    scales: Floats = np.ldexp(np.rint(np.ldexp(exact, -mantissa)), mantissa)
    return np.where(absmax > 0, scales, 1.0) * g


def common_factor(most: float) -> float:
    """The smallest power of two ``g`` at which ``most / g`` is at most 448; 1 for 0. 2^-117 to 2^118."""
    if most <= 0:
        return 1.0
    mantissa, exponent = np.frexp(most / FORMATS["f8e4m3"].largest)
    return float(2.0 ** int(np.clip(int(exponent) - (mantissa == 0.5), -117, 118)))


def split_scales(scales: Array, scale: DType) -> tuple[Array, float]:
    """Scales (any float dtype) as codes of type ``scale`` and the factor that they share: ``scales = codes * factor``.

    The factor of f8e8m0 is 1. Raises InputError where a scale is no such number.
    """
    wide = scales.astype(np.float64)
    if scale.name == "f8e8m0":
        factor, bits = 1.0, np.clip(np.frexp(wide)[1] + 126, 0, 254).astype(np.uint8)
        codes: Array = bits.view(scale.storage)
    else:
        factor = common_factor(float(wide.max(initial=0.0)))
        codes = (wide / factor).astype(scale.storage)
    back = np.where(wide > 0, codes.astype(np.float64) * factor, np.nan)
    if not np.array_equal(back, wide):
        wrong = wide[~(back == wide)]
        raise InputError(
            f"{wrong.size} of {wide.size} scales, {wrong[0]:g} among them, are no {scale} times {factor:g}"
        )
    return codes, factor
