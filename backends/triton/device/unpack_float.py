"""Codes that are floats or indices of NF4 to pairs of 16-bit floats, exactly; scales in e8m0 and e4m3 to f32.

A *pair* is an int32 with two float16 or bfloat16, the lower column in the low half. ``INDEX`` says which pair of a
word: ``hi + 2 s`` of the order in :mod:`qcompiler.backends.triton.layouts`; the words of 4-bit forms are arranged as
:mod:`qcompiler.backends.triton.layouts_float` says. In the interpreter the same integers are computed without PTX.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton import layouts_float
from qcompiler.backends.triton.device.pairs import ASM, BOTH, multiply_pairs, twice

_BITS = {bf16: layouts_float.nf4_bits(bf16) for bf16 in (False, True)}
_TABLES = {bf16: layouts_float.prmt_tables(bits) for bf16, bits in _BITS.items()}


@triton.constexpr_function
def table_word(bf16, plane, number):
    """Word ``number`` of the four that hold the two lookup tables for byte ``plane`` of NF4's 16-bit floats."""
    return _TABLES[bf16][plane][number // 2] >> (32 * (number % 2)) & 0xFFFFFFFF


@triton.constexpr_function
def four_values(bf16, first):
    """NF4's 16-bit floats for nibbles ``first .. first + 3``, in 64 bits."""
    return sum(_BITS[bf16][first + i] << (16 * i) for i in range(4))


NF4_FACTOR = tl.constexpr(int(layouts_float.NF4_FACTOR.view("uint16")))


# -- pairs -------------------------------------------------------------------------------------------------------


@triton.jit
def float_pair(words, INDEX: tl.constexpr, FORM: tl.constexpr, BF16: tl.constexpr):
    """Pair ``INDEX`` of int32 ``words`` as int32: the exact values of a float form's codes, those of nf4 rounded."""
    if FORM == "nf4":
        return nf4_pair(words, INDEX, BF16, ASM)
    elif FORM == "f8e4m3":
        return _e4m3_pair(words, INDEX, BF16)
    elif FORM == "f8e5m2":
        return _e5m2_pair(words, INDEX, BF16)
    else:
        tl.static_assert(FORM == "f4e2m1" or FORM == "mxfp4" or FORM == "nvfp4", "a form without floats")
        return _times(raw_e2m1(words, INDEX, BF16), 0x7E80 if BF16 else 0x7400, BF16)


@triton.jit
def _times(pair, FACTOR: tl.constexpr, BF16: tl.constexpr):
    """A pair times the positive 16-bit float whose bits are ``FACTOR``; subnormals count."""
    return multiply_pairs(pair, tl.full(pair.shape, FACTOR * BOTH, tl.int32), BF16)


@triton.jit
def _turned(words, TURN: tl.constexpr):
    """uint32 words rotated right."""
    return (words >> TURN) | (words << (32 - TURN))


@triton.jit
def raw_e2m1(words, INDEX: tl.constexpr, BF16: tl.constexpr):
    """A pair of e2m1 codes times 2^-126 in bfloat16, 2^-14 in float16: a rotation and a mask, no arithmetic."""
    w = words.to(tl.uint32, bitcast=True)
    if INDEX == 0:
        pair = w & 0x81C081C0
    elif INDEX == 1:
        pair = _turned(w, 4) & 0x81C081C0
    elif INDEX == 2:
        pair = _turned(w, 10) & 0x81C081C0
    else:
        pair = (_turned(w, 6) & 0x81808180) | (_turned(w, 14) & 0x00400040)
    if (
        not BF16
    ):  # exponent and mantissa three bits up: m + 7 m = 8 m, as a multiplication, which integer units do not do
        pair = pair + (pair & 0x01C001C0) * 7
    return pair.to(tl.int32, bitcast=True)


@triton.jit
def _e4m3_pair(words, INDEX: tl.constexpr, BF16: tl.constexpr):
    w = words.to(tl.uint32, bitcast=True)
    if INDEX == 0:
        w = w << 8
    if BF16:
        pair = (w & 0x80008000) | ((w >> 4) & 0x07F007F0)
    else:
        pair = (w & 0x80008000) | ((w >> 1) & 0x3F803F80)
    return _times(pair.to(tl.int32, bitcast=True), 0x7B80 if BF16 else 0x5C00, BF16)


@triton.jit
def _e5m2_pair(words, INDEX: tl.constexpr, BF16: tl.constexpr):
    w = words.to(tl.uint32, bitcast=True)
    if INDEX == 0:
        w = w << 8
    if BF16:
        pair = (w & 0x80008000) | ((w >> 3) & 0x0FE00FE0)
        return _times(pair.to(tl.int32, bitcast=True), 0x7780, BF16)
    return (w & 0xFF00FF00).to(tl.int32, bitcast=True)


# -- NF4 ---------------------------------------------------------------------------------------------------------


@triton.jit
def picked_bytes(low, high, nibbles):
    """PRMT: byte i is that of the eight of ``high:low`` which nibble i names by its low three bits; where the nibble's
    bit 3 is set, the byte's bit 7 eight times."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, nibbles], dtype=tl.uint32, is_pure=True, pack=1
        )
    out = nibbles.to(tl.uint32) * 0
    for i in tl.static_range(4):
        nibble = (nibbles >> (4 * i)) & 15
        source = tl.where((nibble & 4) != 0, out * 0 + high, out * 0 + low)
        byte = (source >> ((nibble & 3) * 8)) & 0xFF
        byte = tl.where(nibble >= 8, (byte >> 7) * 0xFF, byte)
        out = out | (byte << (8 * i))
    return out


@triton.constexpr_function
def lookup_ptx(t0, t1, t2, t3):
    """PTX of four lookups: $1 nibbles, $2 the same with bit 3 turned."""
    held = "".join(f"xor.b32 {name}, z, {value}; " for name, value in zip("abcd", (t0, t1, t2, t3), strict=True))
    picked = "prmt.b32 a, a, b, $1; prmt.b32 c, c, d, $2; xor.b32 $0, a, c;"
    return "{ .reg .b32 z, a, b, c, d; mov.u32 z, %nsmid; shr.u32 z, z, 31; " + held + picked + " }"


@triton.jit
def _plane(nibbles, PLANE: tl.constexpr, BF16: tl.constexpr):
    """Byte ``PLANE`` of the values of four nibbles.

    The assembler would write each constant anew before each lookup. It keeps them in registers where it does not see
    that they are constants: it does not know that a GPU has fewer than 2^31 multiprocessors.
    """
    T0: tl.constexpr = table_word(BF16, PLANE, 0)
    T1: tl.constexpr = table_word(BF16, PLANE, 1)
    T2: tl.constexpr = table_word(BF16, PLANE, 2)
    T3: tl.constexpr = table_word(BF16, PLANE, 3)
    others = nibbles ^ 0x88888888
    if ASM:
        return tl.inline_asm_elementwise(
            lookup_ptx(T0, T1, T2, T3), "=r,r,r", [nibbles, others], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return picked_bytes(T0, T1, nibbles) ^ picked_bytes(T2, T3, others)


@triton.jit
def _value(nibble, BF16: tl.constexpr):
    """The bits of the float that a nibble stands for, looked up without PRMT."""
    four = tl.where(nibble < 4, four_values(BF16, 0), four_values(BF16, 4))
    four = tl.where(nibble < 8, four, tl.where(nibble < 12, four_values(BF16, 8), four_values(BF16, 12)))
    return ((four.to(tl.uint64) >> ((nibble & 3) * 16).to(tl.uint64)) & 0xFFFF).to(tl.uint32)


@triton.jit
def nf4_pair(words, INDEX: tl.constexpr, BF16: tl.constexpr, PLANES: tl.constexpr):
    """A pair of NF4 values. ``PLANES``: from lookups of bytes, which is fast in PRMT and slow in the interpreter."""
    nibbles = words.to(tl.uint32, bitcast=True)
    if PLANES:
        if INDEX >= 2:
            nibbles = nibbles >> 16
        low, high = _plane(nibbles, 0, BF16), _plane(nibbles, 1, BF16)
        pair = picked_bytes(low, high, low * 0 + (0x7362 if INDEX % 2 else 0x5140))
    else:
        nibbles = nibbles >> (8 * INDEX)
        pair = _value(nibbles & 15, BF16) | (_value((nibbles >> 4) & 15, BF16) << 16)
    pair = pair.to(tl.int32, bitcast=True)
    return pair if BF16 else _times(pair, NF4_FACTOR, BF16)


# -- scales ------------------------------------------------------------------------------------------------------


@triton.jit
def scale_values(raw, FORM: tl.constexpr):
    """Scales as f32: bytes of e8m0 for mxfp4 (0 is 2^-127), of e4m3 without sign for nvfp4; floats otherwise."""
    if FORM == "mxfp4":
        exponent = raw.to(tl.uint8, bitcast=True).to(tl.uint32)
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    elif FORM == "nvfp4":  # seven bits at those of f32: 2^-120 of the value, subnormals included
        bits = raw.to(tl.uint8, bitcast=True).to(tl.uint32) << 20
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        return raw.to(tl.float32)


@triton.constexpr_function
def has_byte_scales(form):
    """Whether scales are bytes, in the order of ``layouts_float.by_tile``."""
    return form == "mxfp4" or form == "nvfp4"


@triton.jit
def byte_scales(scales_ptr, rows, tile, stride, STEP: tl.constexpr, FORM: tl.constexpr, BF16: tl.constexpr):
    """Pairs of the scales of mxfp4 and nvfp4 for step ``STEP`` of the words of k-tile ``tile``, ``[BN, 16]``.

    A step's bytes come as one int32 and are not converted: in bf16 an e8m0 byte is the exponent, so that 2^-127 counts
    as 0; the seven bits of e4m3 are those of a 16-bit float.
    """
    words_ptr = scales_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    at = tl.cast(tile, tl.int64) * stride + rows
    if FORM == "nvfp4":
        at = at * 2 + STEP
    held = tl.load(words_ptr + at)[:, None]
    byte = (held >> ((tl.arange(0, 16) % 4) * 8)[None, :]) & 0xFF
    if FORM == "nvfp4":
        return _times(byte * ((BOTH << 4) if BF16 else (BOTH << 7)), 0x7B80 if BF16 else 0x5C00, BF16)
    elif BF16:
        return byte * (BOTH << 7)
    else:
        return twice(scale_values(byte.to(tl.uint8), FORM), BF16)


@triton.jit
def byte_scale_at(rows, tile, stride, group, FORM: tl.constexpr):
    """Where the scale of ``group`` of k-tile ``tile`` lies for ``rows``, which broadcast."""
    at = tl.cast(tile, tl.int64) * stride + rows
    if FORM == "nvfp4":
        return at * 8 + group % 2 * 4 + group // 2
    else:
        return at * 4 + group
