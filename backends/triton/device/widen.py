"""4-bit codes to codes of 8 bits: int8 four at a time, 8-bit floats through the mantissa of f16."""

import triton
import triton.language as tl

HIGHEST = tl.constexpr(0x80808080 - (1 << 32))
"""The highest bit of each byte of an int32."""


@triton.jit
def four_bytes(words, zero, HI: tl.constexpr):
    """Of each word the four codes ``8 HI`` columns on, minus ``zero`` (0..15), as the signed bytes of one word.

    Bytes do not borrow from each other: 128 is added to each before and taken off, by its highest bit, after.
    """
    spread = zero * 0x01010101
    return ((((words >> (4 * HI)) & 0x0F0F0F0F) | HIGHEST) - spread) ^ HIGHEST


@triton.jit
def one_float(words, zero, HI: tl.constexpr, LO: tl.constexpr, S: tl.constexpr):
    """The code at column ``8 HI + LO + 16 S`` minus ``zero``, f16: in the mantissa of 1024 a code is itself."""
    shifted = (((words >> (16 * LO + 4 * HI + 8 * S)) & 15) | 0x6400).to(tl.int16)
    return shifted.to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)


@triton.jit
def half_word(words, zero, HI: tl.constexpr, code: tl.constexpr):
    """``[BN, 16]`` words to ``[BN, 16, s, lo]`` codes of the activation, exact."""
    if code == tl.int8:
        bytes = four_bytes(words, zero, HI)
        a = bytes.to(tl.int8)
        b = (bytes >> 8).to(tl.int8)
        c = (bytes >> 16).to(tl.int8)
        d = (bytes >> 24).to(tl.int8)
    else:
        a = one_float(words, zero, HI, 0, 0).to(code)
        b = one_float(words, zero, HI, 0, 1).to(code)
        c = one_float(words, zero, HI, 1, 0).to(code)
        d = one_float(words, zero, HI, 1, 1).to(code)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def unpacked(words, zero, BN: tl.constexpr, code: tl.constexpr):
    """int32 fragments ``[BN, 16]`` of 4-bit codes to ``[BN, 128]`` codes of the activation; ``zero`` is ``[BN, 1]``."""
    halves = tl.join(half_word(words, zero, 0, code), half_word(words, zero, 1, code))
    split = tl.reshape(halves, (BN, 4, 4, 2, 2, 2))  # n, c, h, s, lo, hi
    return tl.reshape(tl.permute(split, (0, 2, 3, 5, 1, 4)), (BN, 128))
