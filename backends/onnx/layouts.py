"""Canonical codes, scales and zeros to the layouts of ONNX Runtime's kernels and back; nothing is lost on the way.

Canonical: codes ``[N, K]`` one a byte (int8 for signed types, uint8 for unsigned), scales and zeros ``[N, G]``, or
``[1, 1]`` for a whole tensor. The kernels store unsigned codes, low bits first: a signed code has ``2^(bits-1)`` added,
in two's complement one flipped bit. A kernel's scales come one a block of K; a canonical scale that spans several
blocks is repeated.

Layouts, as measured on ONNX Runtime 1.31:
  - *blocks*: uint8 ``[N, ceil(K / block), block * bits / 8]``, the last block padded with the middle code. The kernels
    multiply the padding with zero activations, or cut it off.
  - *rows*: uint8 ``[N, ceil(K * bits / 8)]``, each row padded to a whole byte.
  - zeros *packed*: uint8 ``[N, ceil(G * bits / 8)]``; zeros *bytewise*: uint8 ``[N, G, 1]``, one a byte.
  - *columns*: 8-bit codes ``[K, N]``, and *kernels*: those of a convolution as they are, ``[O, I / group, ..]``. Where
    the kernel wants uint8, int8 codes and zero points are stored 128 higher.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.dtypes import Array, pack_bits, unpack_bits
from qcompiler.errors import InputError

Bytes = NDArray[np.uint8]

CHUNK_CODES = 1 << 18
"""Codes that are packed at a time: what the four passes over them keep in the second-level cache."""

_LANES: dict[int, tuple[Any, int]] = {2: ("<u4", 0x03030303), 4: ("<u2", 0x0F0F)}
_FLIP = {2: 0xAA, 4: 0x88, 8: 0x80}


def block_count(k: int, block: int) -> int:
    """How many blocks a row of ``k`` codes takes."""
    return -(-k // block)


def _check(codes: Array, bits: int) -> None:
    if bits not in _FLIP:
        raise InputError(f"ONNX Runtime's layouts hold 2, 4 or 8 bits, not {bits}")
    if codes.ndim != 2 or codes.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
        raise InputError(f"codes are [N, K] in int8 or uint8, not {codes.dtype}{list(codes.shape)}")


def _pack_into(out: Bytes, lanes: Bytes, bits: int, flip: int) -> None:
    """Pack ``lanes`` (uint8 ``[R, P]``, whole bytes) into ``out`` (``[R, P * bits / 8]``)."""
    if bits == 8:
        np.bitwise_xor(lanes, np.uint8(flip), out=out)
        return
    word, mask = _LANES[bits]
    packed = lanes.reshape(-1).view(word) & np.dtype(word).type(mask)
    for shift in (4,) if bits == 4 else (6, 12):
        packed |= packed >> shift
    np.bitwise_xor(packed.astype(np.uint8).reshape(out.shape), np.uint8(flip), out=out)


def _pack(codes: Array, bits: int, width: int) -> Bytes:
    """Rows of ``width`` bytes; columns past K hold the middle code."""
    _check(codes, bits)
    n, k = codes.shape
    per, flip = 8 // bits, _FLIP[bits] if codes.dtype == np.int8 else 0
    whole = -(-k // per)
    out = np.empty((n, width), np.uint8)
    out[:, whole:] = _FLIP[bits]
    step = max(1, CHUNK_CODES // max(1, k))
    pad = 0 if flip else 1 << (bits - 1)
    for at in range(0, n, step):
        lanes = np.ascontiguousarray(codes[at : at + step]).view(np.uint8)
        if k % per:
            lanes = np.pad(lanes, ((0, 0), (0, whole * per - k)), constant_values=pad)
        _pack_into(out[at : at + step, :whole], lanes, bits, flip)
    return out


def _unpack(rows: Bytes, bits: int, k: int, *, signed: bool) -> Array:
    """Inverse of :func:`_pack`."""
    n, width = rows.shape
    raw = unpack_bits(rows, bits, n * width * (8 // bits), signed=False).reshape(n, width * (8 // bits))[:, :k]
    if not signed:
        return np.ascontiguousarray(raw)
    return (raw - np.uint8(1 << (bits - 1))).view(np.int8)


def blocks(codes: Array, bits: int, block: int) -> Bytes:
    """Codes ``[N, K]`` to uint8 ``[N, ceil(K / block), block * bits / 8]``: ``MatMulNBits``, tied tables."""
    count, blob = block_count(codes.shape[-1], block), block * bits // 8
    return _pack(codes, bits, count * blob).reshape(len(codes), count, blob)


def unblocks(packed: Bytes, bits: int, k: int, *, signed: bool) -> Array:
    """Inverse of :func:`blocks`."""
    return _unpack(packed.reshape(len(packed), -1), bits, k, signed=signed)


def rows(codes: Array, bits: int) -> Bytes:
    """Codes ``[V, K]`` to uint8 ``[V, ceil(K * bits / 8)]``: ``GatherBlockQuantized``."""
    return _pack(codes, bits, -(-codes.shape[-1] * bits // 8))


def unrows(packed: Bytes, bits: int, k: int, *, signed: bool) -> Array:
    """Inverse of :func:`rows`."""
    return _unpack(packed, bits, k, signed=signed)


def spread(values: Array, n: int, count: int, each: int = 1) -> Array:
    """Scales or zeros ``[N or 1, G]`` to ``[N, count]``, one value a block: each of G groups spans ``each`` blocks.

    The last group may span fewer, and one group (G = 1) spans them all.
    """
    have = tuple(values.shape)
    groups = -(-count // each)
    if len(have) != 2 or have[0] not in (1, n) or have[1] not in (1, groups):
        raise InputError(f"scales and zeros are [{n} or 1, {groups} or 1] here, not {list(have)}")
    if have[1] > 1 and each > 1:
        values = np.repeat(values, each, axis=1)[:, :count]
    return np.ascontiguousarray(np.broadcast_to(values, (n, count)))


def unspread(values: Array, shape: tuple[int, int], each: int = 1) -> Array:
    """Inverse of :func:`spread`; raises InputError where the repeated values differ."""
    out = np.ascontiguousarray(values[: shape[0], ::each][:, : shape[1]])
    if out.shape != shape or not np.array_equal(spread(out, values.shape[0], values.shape[1], each), values):
        raise InputError(f"{list(values.shape)} block values do not come from {list(shape)}")
    return out


def unsigned(zeros: Array, bits: int) -> Bytes:
    """Zero points as the kernels count them: ``2^(bits-1)`` more than a signed one."""
    if zeros.dtype == np.int8:
        return zeros.view(np.uint8) + np.uint8(1 << (bits - 1))
    return np.ascontiguousarray(zeros).view(np.uint8)


def pack_zeros(zeros: Array, bits: int) -> Bytes:
    """Zero points ``[N, G]`` to uint8 ``[N, ceil(G * bits / 8)]``, each row padded to a whole byte with zero bits."""
    n, g = zeros.shape
    padded = np.pad(unsigned(zeros, bits), ((0, 0), (0, -g % (8 // bits))))
    return pack_bits(padded, bits).reshape(n, -1)


def unpack_zeros(packed: Bytes, bits: int, g: int, *, signed: bool) -> Array:
    """Inverse of :func:`pack_zeros`."""
    return _unpack(packed, bits, g, signed=signed)


def byte_zeros(zeros: Array, bits: int) -> Bytes:
    """Zero points ``[V, G]`` to uint8 ``[V, G, 1]``: ``GatherBlockQuantized`` on blocks."""
    return unsigned(zeros, bits)[:, :, None]


def unbyte_zeros(stored: Bytes, bits: int, *, signed: bool) -> Array:
    """Inverse of :func:`byte_zeros`."""
    raw = stored[:, :, 0]
    return (raw - np.uint8(1 << (bits - 1))).view(np.int8) if signed else raw


def higher(codes: Array) -> Bytes:
    """int8 codes or zero points, any shape, 128 higher as uint8; uint8 ones as they are."""
    return np.asarray(codes, order="C").view(np.uint8) ^ np.uint8(0x80) if codes.dtype == np.int8 else codes


def lower(stored: Bytes, *, signed: bool) -> Array:
    """Inverse of :func:`higher`."""
    return (stored ^ np.uint8(0x80)).view(np.int8) if signed else stored


def columns(codes: Array, *, flip: bool = False) -> Array:
    """Codes ``[N, K]`` to ``[K, N]``, 128 higher with ``flip``: ``MatMulIntegerToFloat`` and its kin."""
    return np.ascontiguousarray((higher(codes) if flip else codes).T)


def uncolumns(stored: Array, *, signed: bool) -> Array:
    """Inverse of :func:`columns`."""
    codes = np.ascontiguousarray(stored.T)
    return lower(codes, signed=signed) if codes.dtype == np.uint8 else codes


def kernels(codes: Array, *, flip: bool = False) -> Array:
    """Codes ``[O, I / group, ..]`` of a convolution as they are, 128 higher with ``flip``."""
    return higher(codes) if flip else codes


def unkernels(stored: Array, *, signed: bool) -> Array:
    """Inverse of :func:`kernels`."""
    return lower(stored, signed=signed) if stored.dtype == np.uint8 else stored
