"""Canonical codes, scales and zeros to the layout of the weight-only kernels and back; nothing is lost on the way.

Canonical: codes ``[N, K]``, one element each in the storage of their type; scales and zeros ``[N, G]``, or ``[1, 1]``
for a whole tensor.

*Fragments*: int32 ``[ceil(K / 128), N', 4 * bits]``, N' being N rounded up to 64. What a lane of a warp multiplies lies
in one piece: the 16-bit A operand of the tensor cores (PTX ISA, fragments of ``mma.m16n8k16``) gives lane ``4 g + c``,
for row g and each 16 columns, the columns ``8 hi + 2 c + lo``. So of the 128 columns of a row and tile lane c owns 32,
in ``bits`` consecutive words. With S = 8 / bits (4, 2, 1 for 2, 4, 8 bits)::

    column 16 (S h + s) + 8 hi + 2 c + lo   is in word   c bits + h   at bit   16 lo + bits (hi + 2 s)

where c < 4, h < bits, s < S, hi < 2, lo < 2: the two columns of a register's halves are 16 bits apart, so that a shift
and a mask give both at once. 4 bits: 16 bytes a lane, one load; 8 bits: two loads of 16 bytes; 2 bits: one of 8.

Within the words of 4-bit floats and of NF4 the bits are then permuted (``layouts_float``), which the kernels undo.

Integers are stored unsigned, plus their form's shift. Padding holds the shift, whose value is 0 where there are no zero
points; its scales are 0, and kernels take activations beyond K as 0.

*Scales*: ``[G', N']`` in their own type, G' = ceil(128 ceil(K / 128) / group), or 1 row where a scale spans K.
Scales of one byte, in groups of 16 or 32, keep that shape, but in memory the bytes of a row and k-tile lie together
(``layouts_float.by_tile``), to be loaded as int32: a load of 8 bits makes Triton choose another order for operands of
16. *Zeros*: the same shape; whole ones int16, likewise, shifted as codes are; floats in their own type and not shifted,
since a sum would round: ``value = (stored - shift - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler.backends.triton.forms import Form, form_called
from qcompiler.backends.triton.layouts_float import arrange, by_group, by_tile, restore
from qcompiler.dtypes import Array
from qcompiler.errors import InputError

TILE = 128
"""Columns of a tile of fragments."""

ROWS = 64
"""Rows are padded to a multiple of this."""

CHUNK_CODES = 1 << 22
"""About so many codes are laid out at a time."""

_STORAGE: dict[str, np.dtype[np.generic]] = {
    **{f"int{bits}": np.dtype(np.int8) for bits in (2, 4, 8)},
    **{f"uint{bits}": np.dtype(np.uint8) for bits in (2, 4, 8)},
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "f4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    "mxfp4": np.dtype(ml_dtypes.float4_e2m1fn),
    "nvfp4": np.dtype(ml_dtypes.float4_e2m1fn),
    "nf4": np.dtype(np.uint8),
}


def padded(size: int, multiple: int) -> int:
    """``size``, rounded up to a multiple."""
    return -(-size // multiple) * multiple


def fragment_shape(n: int, k: int, form: str) -> tuple[int, int, int]:
    """Shape of the int32 fragments of codes ``[n, k]``."""
    return padded(k, TILE) // TILE, padded(n, ROWS), form_called(form).words


def scale_rows(k: int, group: int) -> int:
    """Rows G' of laid-out scales: 1 where ``group`` is 0, that is where a scale spans K."""
    return -(-padded(k, TILE) // group) if group else 1


# -- codes -----------------------------------------------------------------------------------------------------


def pack_codes(codes: Array, form: str) -> NDArray[np.int32]:
    """Canonical codes ``[N, K]`` to fragments. Raises InputError for another storage, or codes out of range."""
    known = form_called(form)
    _check(codes, known)
    n, k = codes.shape
    tiles, rows, words = fragment_shape(n, k, form)
    out = np.zeros((tiles, rows, 4, words // 4), np.uint32)
    for start, stop in _spans(rows, tiles * TILE):
        part = np.full((stop - start, tiles * TILE), known.shift, np.uint8)
        taken = codes[start : min(stop, n)]
        np.add(taken.view(np.uint8), np.uint8(known.shift), out=part[: len(taken), :k])
        for bit, columns in _columns(part, known):
            out[:, start:stop] |= columns.astype(np.uint32) << np.uint32(bit)
        out[:, start:stop] = arrange(out[:, start:stop], form)
    return out.reshape(tiles, rows, words).view(np.int32)


def unpack_codes(fragments: NDArray[np.int32], form: str, n: int, k: int) -> Array:
    """Inverse of :func:`pack_codes`. Raises InputError where the fragments are not those of ``[n, k]``."""
    known = form_called(form)
    tiles, rows, words = fragment_shape(n, k, form)
    if fragments.shape != (tiles, rows, words) or fragments.dtype != np.int32:
        raise InputError(
            f"fragments of {form} codes [{n}, {k}] are int32[{tiles}, {rows}, {words}], not "
            f"{fragments.dtype}{list(fragments.shape)}"
        )
    held = np.ascontiguousarray(fragments).view(np.uint32).reshape(tiles, rows, 4, words // 4)
    out = np.empty((n, k), np.uint8)
    for start, stop in _spans(rows, tiles * TILE):
        part = np.empty((stop - start, tiles * TILE), np.uint8)
        natural = restore(held[:, start:stop], form)
        for bit, columns in _columns(part, known):
            columns[...] = (natural >> np.uint32(bit)) & np.uint32((1 << known.bits) - 1)
        taken = out[start:stop]
        np.subtract(part[: len(taken), :k], np.uint8(known.shift), out=taken)
    return out.view(_STORAGE[form])


def _check(codes: Array, form: Form) -> None:
    storage = _STORAGE[form.name]
    if codes.ndim != 2 or codes.dtype != storage:
        raise InputError(f"{form.name} codes are [N, K] in {storage}, not {codes.dtype}{list(codes.shape)}")
    if form.kind == "float" or form.bits == 8 or not codes.size:
        return
    low, high = int(codes.min()), int(codes.max())
    if low < -form.shift or high >= (1 << form.bits) - form.shift:
        raise InputError(
            f"{form.name} codes lie in {-form.shift}..{(1 << form.bits) - 1 - form.shift}, not in {low}..{high}"
        )


def _spans(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of about CHUNK_CODES codes, a multiple of ROWS but for the last."""
    step = max(1, CHUNK_CODES // max(1, width * ROWS)) * ROWS
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _columns(part: NDArray[np.uint8], form: Form) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """For each place of a code in its word, its lowest bit and the codes there, as a view ``[tile, n, c, h]``."""
    steps = 8 // form.bits
    split = part.reshape(part.shape[0], -1, form.bits, steps, 2, 4, 2)  # n, tile, h, s, hi, c, lo
    for s in range(steps):
        for hi in range(2):
            for lo in range(2):
                yield 16 * lo + form.bits * (hi + 2 * s), split[:, :, :, s, hi, :, lo].transpose(1, 0, 3, 2)


# -- scales and zeros ------------------------------------------------------------------------------------------


def pack_scales(scales: Array, n: int, k: int, group: int) -> Array:
    """``[N, ceil(K / group)]``, ``[N, 1]`` or ``[1, 1]`` to ``[G', N']`` in the same type, 0 in the padding.

    Raises InputError for another shape.
    """
    count = -(-k // group) if group else 1
    if scales.shape not in ((n, count), (1, 1)) or (scales.shape == (1, 1) and group and (n, count) != (1, 1)):
        want = f"[{n}, {count}]" if group else f"[{n}, 1] or [1, 1]"
        raise InputError(f"scales of codes [{n}, {k}] in groups of {group} are {want}, not {list(scales.shape)}")
    out = np.zeros((scale_rows(k, group), padded(n, ROWS)), scales.dtype)
    out[:count, :n] = np.broadcast_to(scales, (n, count)).T
    return by_tile(out, group)


def unpack_scales(laid: Array, n: int, k: int, group: int, *, whole: bool = False) -> Array:
    """Inverse of :func:`pack_scales`; ``whole`` gives the ``[1, 1]`` of a tensor's one scale."""
    count = -(-k // group) if group else 1
    laid = by_group(laid, group)
    return np.ascontiguousarray(laid[:1, :1] if whole else laid[:count, :n].T)


def pack_zeros(zeros: Array, n: int, k: int, group: int, form: str) -> Array:
    """Zero points, shaped as scales are: whole ones as shifted int16 with the shift in the padding, floats as given.

    Raises InputError for another shape, another type of integers, or a form that is no integer.
    """
    known = form_called(form)
    if known.kind != "integer":
        raise InputError(f"{form} codes have no zero points")
    if zeros.dtype.kind not in "iu":
        return pack_scales(zeros, n, k, group)
    if zeros.dtype != _STORAGE[form]:
        raise InputError(f"whole zero points of {form} codes are {_STORAGE[form]} as the codes are, not {zeros.dtype}")
    return pack_scales(zeros.astype(np.int16), n, k, group) + np.int16(known.shift)


def unpack_zeros(laid: Array, n: int, k: int, group: int, form: str, *, whole: bool = False) -> Array:
    """Inverse of :func:`pack_zeros`."""
    plain = unpack_scales(laid, n, k, group, whole=whole)
    if plain.dtype != np.int16:
        return plain
    return (plain - np.int16(form_called(form).shift)).astype(_STORAGE[form])
