"""Canonical codes, scales and zeros to the layouts of torch's CPU kernels and back; nothing is lost on the way.

Canonical: codes ``[N, K]`` one a byte (int8 for signed types, uint8 for unsigned), scales and zeros ``[N, G]``, or
``[1, 1]`` for a whole tensor.

Layouts, as measured on torch 2.13:
  - *int4pack*, of ``aten._weight_int4pack_mm_for_cpu``: uint8 ``[N, K / 2]``. The rows come in blocks, 64 of them where
    torch runs its AVX-512 code, 32 where it runs its AVX2 code; the last block is what is left, a multiple of 16. A
    block is stored column after column of K. In a whole block of B rows byte j of a column holds row j in its low
    bits and row j + B/2 in its high bits; in a shorter last one, rows 2j and 2j + 1. **So the bytes belong to a
    vector width**, and a kernel of another width computes nonsense from them without a word.
  - *scales and zeros*: bf16 ``[K / group, N, 2]``, ``value = (code - 8) * s + z`` with unsigned codes. A scale has at
    most 8 significant bits (the law of :func:`qcompiler.clipping.affine_params` for codes of up to 4 bits), so bf16
    holds it exactly. ``z = (8 - zero) * s`` is rounded to bf16, which is exact but for zeros that are 3, 5, 6 or 7 off
    8; the zero point can be read from it all the same. In groups of 128 that costs up to 20 % of what rounding the
    weights to 4 bits did, most where weights have heavy tails and activations a mean.
  - *int8pack*, of ``aten._weight_int8pack_mm``: int8 ``[N, K]`` as they are, columns of 0 up to a multiple of 16. The
    kernel loads 16 codes at once from addresses that must be multiples of 16 (a crash else).
  - *nibbles*, of a table of 4-bit codes: uint8 ``[V, ceil(K / 2)]``, unsigned codes, the first in the low bits.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from qcompiler.dtypes import BF16, Array
from qcompiler.errors import InputError
from qcompiler.scheme import Scheme

Bytes = NDArray[np.uint8]

ROWS = {"avx512": 64, "avx2": 32}
"""Vector width -> rows in a whole block of *int4pack*."""

MIDDLE = 8
"""The unsigned 4-bit code that stands for 0 where there is no zero point, and in padding."""

CHUNK_CODES = 1 << 20
"""About so many codes are packed at a time."""


def padded(size: int, multiple: int) -> int:
    """``size``, rounded up to a multiple."""
    return -(-size // multiple) * multiple


def nibbles_of(codes: Array, n: int, k: int) -> Bytes:
    """4-bit codes ``[N, K]`` as unsigned ones in uint8 ``[n, k]``, the middle code where there were none."""
    _check(codes)
    out = np.full((n, k), MIDDLE, np.uint8)
    plain = out[: codes.shape[0], : codes.shape[1]]
    np.add(codes.view(np.uint8), np.uint8(MIDDLE if codes.dtype == np.int8 else 0), out=plain)
    return out


def codes_of(nibbles: Bytes, n: int, k: int, *, signed: bool) -> Array:
    """Inverse of :func:`nibbles_of`."""
    plain = nibbles[:n, :k]
    return (plain - np.uint8(MIDDLE)).view(np.int8) if signed else np.ascontiguousarray(plain)


def _check(codes: Array) -> None:
    if codes.ndim != 2 or codes.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
        raise InputError(f"codes are [N, K] in int8 or uint8, not {codes.dtype}{list(codes.shape)}")


# -- int4pack --------------------------------------------------------------------------------------------------


def int4pack(nibbles: Bytes, width: str) -> Bytes:
    """Unsigned 4-bit codes ``[N, K]`` to uint8 ``[N, K / 2]`` for torch's kernel of that vector width.

    Raises InputError where N is no multiple of 16 or K is odd.
    """
    n, k = nibbles.shape
    _check_sizes(n, k)
    out = np.empty((n, k // 2), np.uint8)
    for start, stop in _spans(n, k, ROWS[width]):
        rows = min(ROWS[width], stop - start)
        part = nibbles[start:stop].reshape(-1, rows, k)
        low, high = _halves(part, rows == ROWS[width])
        out[start:stop] = np.swapaxes(low | high << 4, 1, 2).reshape(stop - start, k // 2)
    return out


def int4unpack(packed: Bytes, width: str) -> Bytes:
    """Inverse of :func:`int4pack`."""
    n, k = packed.shape[0], packed.shape[1] * 2
    _check_sizes(n, k)
    out = np.empty((n, k), np.uint8)
    for start, stop in _spans(n, k, ROWS[width]):
        rows = min(ROWS[width], stop - start)
        part = np.swapaxes(packed[start:stop].reshape(-1, k, rows // 2), 1, 2)
        low, high = _halves(out[start:stop].reshape(-1, rows, k), rows == ROWS[width])
        low[...], high[...] = part & 15, part >> 4
    return out


def int4pack_avx512(nibbles: Bytes) -> Bytes:
    """:func:`int4pack` for torch's AVX-512 code."""
    return int4pack(nibbles, "avx512")


def int4pack_avx2(nibbles: Bytes) -> Bytes:
    """:func:`int4pack` for torch's AVX2 code."""
    return int4pack(nibbles, "avx2")


def repacked(packed: Bytes, have: str, want: str) -> Bytes:
    """The same codes for the kernel of another vector width."""
    return packed if have == want else int4pack(int4unpack(packed, have), want)


def _check_sizes(n: int, k: int) -> None:
    if n % 16 or k % 2:
        raise InputError(f"the int4pack layout needs N % 16 == 0 and K % 2 == 0, got N={n} K={k}")


def _spans(n: int, k: int, rows: int) -> list[tuple[int, int]]:
    """Runs of whole blocks, each of about CHUNK_CODES codes, then the shorter last block."""
    whole = n - n % rows
    step = max(1, CHUNK_CODES // max(1, k * rows)) * rows
    cuts = [*range(0, whole, step), whole, *([n] if whole < n else [])]
    return list(itertools.pairwise(cuts))


def _halves(blocks: Bytes, whole: bool) -> tuple[Bytes, Bytes]:
    """The rows of blocks ``[.., rows, K]`` that go to the low and to the high bits, as views."""
    half = blocks.shape[1] // 2
    return (blocks[:, :half], blocks[:, half:]) if whole else (blocks[:, ::2], blocks[:, 1::2])


# -- scales and zeros ------------------------------------------------------------------------------------------


def significant(scale: Array, label: str) -> Array:
    """``scale`` in bf16, exactly; raises InputError where one has more than 8 significant bits."""
    out = scale.astype(BF16.storage)
    wrong = out.astype(np.float64) != scale.astype(np.float64)
    if wrong.any():
        raise InputError(
            f"'{label}': {int(wrong.sum())} of {scale.size} scales, such as {float(scale[wrong].flat[0])!r}, have more "
            "than 8 significant bits, and torch's int4 kernel keeps its scales in bf16 (QC205); quantize this weight "
            "again, or skip the site"
        )
    return out


def scales_and_zeros(
    scale: Array, zero: Array | None, scheme: Scheme, sizes: tuple[int, int, int], label: str
) -> Array:
    """Scales and zeros ``[N or 1, G]`` as bf16 ``[K / block, N, 2]``, padding with scale 1 and zero 8.

    ``sizes``: N, K and the block of the kernel; a group spans whole blocks, each of which gets a copy. Raises
    InputError for scales that bf16 does not hold exactly.
    """
    n, k, block = sizes
    s = significant(scale, label).astype(np.float32)
    if zero is None:
        offset = np.full(s.shape, 0 if scheme.dtype.signed else MIDDLE, np.float32)
    else:
        offset = (0 if scheme.dtype.signed else MIDDLE) - zero.astype(np.float32)
    count, each = -(-k // block), (scheme.group_size or block) // block
    out = np.zeros((count, padded(n, 16), 2), BF16.storage)
    out[:, :, 0] = 1
    for i, values in enumerate((s, offset * s)):
        if scheme.granularity == "group":
            values = np.repeat(values, each, axis=1)[:, :count]
        out[:, :n, i] = np.broadcast_to(values, (n, count)).T
    return out


def parameters_of(
    stored: Array, scheme: Scheme, shape: tuple[int, int], block: int
) -> tuple[NDArray[np.float32], Array | None]:
    """Inverse of :func:`scales_and_zeros`: the scales (float32) and zeros of ``shape``.

    Raises InputError where blocks of one group differ.
    """
    n, groups = shape
    each = (scheme.group_size or block) // block
    rows = stored.astype(np.float32)[:, : max(n, 1)]
    s, z = rows[..., 0].T, rows[..., 1].T
    step = each if scheme.granularity == "group" else s.shape[1]
    scale, offset = s[:n, ::step][:, :groups], z[:n, ::step][:, :groups]
    whole = np.repeat(scale, step, axis=1)[:, : s.shape[1]]
    if scale.shape != shape or not np.array_equal(np.broadcast_to(whole, s[:n].shape), s[:n]):
        raise InputError(f"scales {list(stored.shape)} do not come from {list(shape)} in blocks of {block}")
    if scheme.zero == "none":
        return np.ascontiguousarray(scale), None
    zero = (0 if scheme.dtype.signed else MIDDLE) - np.rint(offset / scale)
    return np.ascontiguousarray(scale), zero.astype(scheme.dtype.storage)


# -- int8pack and tables ---------------------------------------------------------------------------------------


def int8pack(codes: Array) -> Array:
    """int8 codes ``[N, K]`` with columns of 0 up to a multiple of 16, at an address that is one."""
    _check(codes)
    k = codes.shape[1]
    if k % 16 == 0 and codes.flags.c_contiguous:
        return codes if codes.ctypes.data % 16 == 0 else codes.copy()
    return np.pad(codes, ((0, 0), (0, padded(k, 16) - k)))


def int8unpack(stored: Array, k: int) -> Array:
    """Inverse of :func:`int8pack`."""
    return np.ascontiguousarray(stored[:, :k])


def table(codes: Array, columns: int) -> Bytes:
    """4-bit codes ``[V, K]`` to uint8 ``[V, ceil(columns / 2)]``, the middle code behind the K-th."""
    nibbles = nibbles_of(codes, len(codes), padded(columns, 2))
    return nibbles[:, ::2] | nibbles[:, 1::2] << np.uint8(4)


def untable(stored: Bytes, k: int, *, signed: bool) -> Array:
    """Inverse of :func:`table`."""
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
    return codes_of(nibbles, len(stored), k, signed=signed)
