"""Codes that are floats or indices of a codebook, as the kernels decode them: the order of bits, tables, scales.

Each int32 of fragments holds four pairs of 4-bit codes; :mod:`qcompiler.backends.triton.layouts` puts pair i's codes at
bits 4 i and 16 + 4 i. Before they are stored, the bits of a word of 4-bit floats are permuted so that they cost few
instructions (:func:`arrange`, :func:`restore`); the permutation is of bits within one word, hence a bijection.

*E2M1* (f4e2m1, mxfp4, nvfp4). As a 16-bit float with the sign at bit 15 and the exponent and mantissa in bfloat16's low
exponent bits (8, 7) and first mantissa bit (6), a code is its value times 2^-126, subnormals included, so one
multiplication by 2^126 decodes two codes exactly. The bits of pair i are stored where rotating the word right by a
constant puts them there: 0, 4 and 10 for the first three; sign and exponent of the last by 6, its mantissa by 14. Nine
instructions give all four pairs (nibbles side by side: fifteen).

*NF4*. A 16-entry table lookup in PRMT, which picks four bytes out of eight by four nibbles and, where a nibble's bit 3
is set, gives the picked byte's sign bit eight times. Looking up ``w`` in one table of eight and ``w ^ 0x8888`` in
another, the exclusive or of both is a lookup in sixteen, provided that the bytes wanted of nibbles j and j + 8 agree in
bit 7. :data:`NF4_ORDER` pairs the codes so that this holds for both bytes of the table in bfloat16, and in
float16 for a table that is multiplied by :data:`NF4_FACTOR` after it. Nibbles are stored in the order pair 0 low, pair
0 high, pair 1 low and so on.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.float_codes import NF4

Words = NDArray[np.uint32]

E2M1_FORMS = ("f4e2m1", "mxfp4", "nvfp4")
ARRANGED = (*E2M1_FORMS, "nf4")
"""Forms whose words are permuted."""

E2M1_TARGETS = (15, 8, 7, 6)
"""Where in 16 bits a code's sign, exponent (two bits) and mantissa are decoded."""

E2M1_TURNS = ((0, 0, 0, 0), (4, 4, 4, 4), (10, 10, 10, 10), (6, 6, 6, 14))
"""Rotations to the right that bring those bits of pair i there."""

NF4_ORDER = (0, 3, 1, 2, 8, 12, 9, 10, 6, 4, 5, 7, 11, 15, 13, 14)
"""The NF4 code whose value nibble j stands for."""

NF4_FACTOR = np.float16(1.0126953125)
"""Multiplies the float16 table; the products, rounded to nearest, are the float16 values of NF4."""

PRMT_ENTRIES = 8


# -- bits of a word ----------------------------------------------------------------------------------------------


@cache
def bit_places(form: str) -> tuple[int, ...]:
    """For each bit of a stored word of ``form``, which bit of the word as ``layouts`` fills it comes there."""
    places = [-1] * 32
    for pair in range(4):
        for half in range(2):
            for bit in range(4):
                natural = 16 * half + 4 * pair + bit
                if form == "nf4":
                    stored = 4 * (2 * pair + half) + bit
                else:
                    field = 3 - bit
                    stored = (E2M1_TARGETS[field] + 16 * half + E2M1_TURNS[pair][field]) % 32
                places[stored] = natural
    assert sorted(places) == list(range(32))
    return tuple(places)


@cache
def _halves(form: str, back: bool) -> tuple[Words, Words]:
    """What the low and the high 16 bits of a word contribute to the permuted word (``back``: to the natural one)."""
    places = bit_places(form)
    moves = [(natural, stored) for stored, natural in enumerate(places)]
    if back:
        moves = [(stored, natural) for natural, stored in moves]
    values = np.arange(1 << 16, dtype=np.uint32)
    halves = np.zeros((2, 1 << 16), np.uint32)
    for source, target in moves:
        halves[source // 16] |= ((values >> np.uint32(source % 16)) & np.uint32(1)) << np.uint32(target)
    return halves[0], halves[1]


def _nibbles(order: tuple[int, ...]) -> NDArray[np.uint16]:
    """Each 16 bits with their four nibbles replaced through ``order``."""
    values, out = np.arange(1 << 16, dtype=np.uint32), np.zeros(1 << 16, np.uint32)
    for at in range(0, 16, 4):
        out |= np.asarray(order, np.uint32)[(values >> np.uint32(at)) & np.uint32(15)] << np.uint32(at)
    return out.astype(np.uint16)


@cache
def _renamed(back: bool) -> NDArray[np.uint16]:
    """NF4 codes to the nibbles that stand for them, four at a time; ``back``: the inverse."""
    inverse = [0] * 16
    for nibble, code in enumerate(NF4_ORDER):
        inverse[code] = nibble
    return _nibbles(NF4_ORDER if back else tuple(inverse))


def _turned(words: Words, form: str, back: bool) -> Words:
    low, high = _halves(form, back)
    out: Words = low[words & np.uint32(0xFFFF)] | high[words >> np.uint32(16)]
    return out


def _rename(words: Words, back: bool) -> Words:
    names = _renamed(back)
    return names[words.view(np.uint16)].view(np.uint32) if words.size else words


def arrange(words: Words, form: str) -> Words:
    """Words as ``layouts`` fills them, contiguous, to those that are stored; other forms than ARRANGED are left."""
    if form not in ARRANGED:
        return words
    words = np.ascontiguousarray(words)
    return _turned(_rename(words, False) if form == "nf4" else words, form, False)


def restore(words: Words, form: str) -> Words:
    """Inverse of :func:`arrange`."""
    if form not in ARRANGED:
        return words
    natural = _turned(np.ascontiguousarray(words), form, True)
    return _rename(natural, True) if form == "nf4" else natural


# -- tables ------------------------------------------------------------------------------------------------------


def nf4_bits(bf16: bool) -> tuple[int, ...]:
    """The 16-bit floats that nibbles stand for; in float16 before the factor. Zero is minus zero: NF4 has one zero,
    and with the sign of its partner in the table a lookup is cheaper."""
    if bf16:
        bits = NF4.astype(ml_dtypes.bfloat16).view(np.uint16).astype(int)
    else:
        bits = np.array([_before_factor(v, code) for code, v in enumerate(NF4.astype(np.float16))])
    bits[7] = 0x8000
    return tuple(int(bits[code]) for code in NF4_ORDER)


_FACTOR_LOW_SIGNS = frozenset({0, 1, 5, 6, 10, 12, 14, 15})
"""Codes whose float16 entries have bit 7 set; where the factor leaves a choice, it is taken so."""


def _before_factor(value: np.float16, code: int) -> int:
    """A float16 that times NF4_FACTOR rounds to ``value``, with bit 7 as :data:`_FACTOR_LOW_SIGNS` says."""
    if not value:
        return 0
    near = int(np.float16(value / NF4_FACTOR).view(np.uint16))
    for bits in range(near - 2, near + 3):
        product = np.float32(np.uint16(bits).view(np.float16)) * np.float32(NF4_FACTOR)
        if np.float16(product) == value and bits >> 7 & 1 == (code in _FACTOR_LOW_SIGNS):
            return bits
    raise AssertionError(f"no float16 gives NF4 code {code}")


def prmt_tables(bits: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two tables of eight bytes, as integers, whose lookups' exclusive or gives byte 0 of ``bits``, and two for byte 1.

    ``T0[j] = W[j] ^ r(T1[j])`` and ``T1[j] = W[j + 8] ^ r(T0[j])``, where r repeats bit 7: solvable where bit 7 of
    ``W[j]`` and ``W[j + 8]`` agree, with bit 7 of T1 chosen as 0.
    """
    found = []
    for byte in range(2):
        wanted = [b >> (8 * byte) & 0xFF for b in bits]
        first = wanted[:PRMT_ENTRIES]
        second = [w ^ (0xFF if f >> 7 else 0) for f, w in zip(first, wanted[PRMT_ENTRIES:], strict=True)]
        assert not any(s >> 7 for s in second), "bit 7 of the bytes of a pair of nibbles differs"
        found.append((_packed(first), _packed(second)))
    return found[0], found[1]


def _packed(octet: list[int]) -> int:
    return int.from_bytes(bytes(octet), "little")


# -- scales ------------------------------------------------------------------------------------------------------


def places(group: int) -> tuple[int, ...]:
    """Groups of a k-tile in the order in which one-byte scales hold them: those of a word's even steps, then its odd
    ones, since a kernel takes a step's four bytes as one int32."""
    return (0, 1, 2, 3) if group == 32 else (0, 2, 4, 6, 1, 3, 5, 7)


def by_tile(laid: Array, group: int) -> Array:
    """Scales ``[G', N']`` of one byte each in memory as ``[tile, N', group of the tile]``, under the same shape; others
    are left as they are. Raises InputError for one-byte scales of groups other than 16 and 32."""
    if laid.dtype.itemsize != 1:
        return laid
    _check_group(group)
    order = places(group)
    split = laid.reshape(-1, len(order), laid.shape[1])[:, list(order)]
    return np.ascontiguousarray(split.transpose(0, 2, 1)).reshape(laid.shape)


def by_group(held: Array, group: int) -> Array:
    """Inverse of :func:`by_tile`."""
    if held.dtype.itemsize != 1:
        return held
    _check_group(group)
    order = places(group)
    split = np.ascontiguousarray(held).reshape(-1, held.shape[1], len(order)).transpose(0, 2, 1)
    out = np.empty_like(split)
    out[:, list(order)] = split
    return out.reshape(held.shape)


def _check_group(group: int) -> None:
    if group not in (16, 32):
        raise InputError(f"scales of one byte belong to groups of 16 (e4m3) or 32 (e8m0) weights, not of {group}")
