"""Words of fragments to a tile of weights in 16-bit floats, ready for the tensor cores (layout: ``triton/layouts.py``).

An integer code becomes a float without a conversion: its bits, put into the mantissa of a power of two, read as
``offset + code``. Of 2 and 4 bits the offset is 128 in bf16; of any in fp16 it is 1024. 8 bits do not fit under bf16's
7 of mantissa: there ``128 + low 7 bits`` loses 256 or, where the top bit is set, 128, which leaves ``code - 128``.
Everything up to the product with the scale is exact; that product is rounded once to 16 bits.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.pairs import (
    BOTH,
    halves,
    masked_bits,
    multiply_pairs,
    subtract_pairs,
    twice,
)
from qcompiler.backends.triton.device.unpack_float import byte_scales, float_pair, has_byte_scales, scale_values
from qcompiler.backends.triton.forms import FORMS

NO_ZEROS = tl.constexpr(0)
WHOLE_ZEROS = tl.constexpr(1)
FLOAT_ZEROS = tl.constexpr(2)


@triton.constexpr_function
def bits_of(form):
    return FORMS[form].bits


@triton.constexpr_function
def shift_of(form):
    return FORMS[form].shift


@triton.constexpr_function
def is_integer(form):
    return FORMS[form].kind == "integer"


@triton.constexpr_function
def offset_of(bits, bf16):
    """What :func:`integer_pair` adds to a code."""
    return (-128 if bits == 8 else 128) if bf16 else 1024


@triton.constexpr_function
def constant_pair(value, bf16):
    """A whole number that 16 bits hold exactly, as a pair, as a signed int32."""
    if value == 0:
        return 0
    exponent = abs(value).bit_length() - 1
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    fraction = (abs(value) << mantissa >> exponent) - (1 << mantissa)
    both = ((value < 0) << 15 | (exponent + bias) << mantissa | fraction) * 0x10001
    return both - (1 << 32) if both >> 31 else both


@triton.jit
def integer_pair(words, INDEX: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """The codes at bits ``INDEX * BITS`` and 16 above, as a pair, plus :func:`offset_of`. One or two instructions."""
    SHIFT: tl.constexpr = INDEX * BITS
    if BITS == 8 and BF16:
        low = masked_bits(words, SHIFT, 0x7F * BOTH, 0x4300 * BOTH)
        top = ((words >> SHIFT) & (0x80 * BOTH)) ^ (0x4380 * BOTH)
        return subtract_pairs(low, top, BF16)
    else:
        return masked_bits(words, SHIFT, ((1 << BITS) - 1) * BOTH, (0x4300 if BF16 else 0x6400) * BOTH)


@triton.jit
def zero_pairs(zeros, FORM: tl.constexpr, ZEROS: tl.constexpr, BF16: tl.constexpr):
    """What to subtract from an :func:`integer_pair`: a pair for the whole part of the zero point, offset included, and
    one for the rest, which is at most a half and 0 where zero points are whole."""
    BITS: tl.constexpr = bits_of(FORM)
    if ZEROS == WHOLE_ZEROS:
        return integer_pair(zeros.to(tl.int32) * BOTH, 0, BITS, BF16), tl.zeros_like(zeros).to(tl.int32)
    else:
        shifted = zeros.to(tl.float32) + shift_of(FORM)
        whole = tl.floor(shifted + 0.5)
        return twice(whole + offset_of(BITS, BF16), BF16), twice(shifted - whole, BF16)


@triton.jit
def step_tile(
    words,
    zero,
    rest,
    scale,
    STEP: tl.constexpr,
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    BF16: tl.constexpr,
):
    """The weights of step ``STEP`` of each word: ``[BN, words, 2 (lo), 2 (hi)]``."""
    a = _values(words, zero, rest, scale, 2 * STEP, FORM, ZEROS, SCALED, BF16)
    b = _values(words, zero, rest, scale, 2 * STEP + 1, FORM, ZEROS, SCALED, BF16)
    a_low, a_high = halves(a, BF16)
    b_low, b_high = halves(b, BF16)
    return tl.join(tl.join(a_low, a_high), tl.join(b_low, b_high))


@triton.jit
def _values(
    words,
    zero,
    rest,
    scale,
    INDEX: tl.constexpr,
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    BF16: tl.constexpr,
):
    if is_integer(FORM):
        BITS: tl.constexpr = bits_of(FORM)
        pair = integer_pair(words, INDEX, BITS, BF16)
        if ZEROS != NO_ZEROS:
            pair = subtract_pairs(pair, zero, BF16)
            if ZEROS == FLOAT_ZEROS:
                pair = subtract_pairs(pair, rest, BF16)
        elif offset_of(BITS, BF16) + shift_of(FORM) != 0:
            LESS: tl.constexpr = constant_pair(offset_of(BITS, BF16) + shift_of(FORM), BF16)
            pair = subtract_pairs(pair, tl.full(pair.shape, LESS, tl.int32), BF16)
    else:
        pair = float_pair(words, INDEX, FORM, BF16)
    if SCALED:
        pair = multiply_pairs(pair, scale, BF16)
    return pair


@triton.jit
def _parameters(
    scales_ptr,
    zeros_ptr,
    rows,
    tile,
    stride,
    STEP: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    BF16: tl.constexpr,
    FEW: tl.constexpr,
):
    """Pairs of scale, zero point and its rest for step ``STEP`` of the words of k-tile ``tile``: ``[BN, words]``.

    How much is loaded, of what is the same for several words, decides where Triton changes layouts: after these loads,
    or, at the price of a trip of all weights through shared memory, after the decoding. Chosen by what was compiled:
    a value for each word of a lane; for each word where a lane has two; one a row where that is all and ``FEW``.
    """
    if SCALED and has_byte_scales(FORM):
        return byte_scales(scales_ptr, rows, tile, stride, STEP, FORM, BF16), 0, 0
    BITS: tl.constexpr = bits_of(FORM)
    ROW: tl.constexpr = (GROUP == 0 or GROUP >= 128) and FEW
    HELD: tl.constexpr = 1 if ROW else 4 * BITS if BITS == 2 else BITS
    chunk = tl.arange(0, HELD) % BITS * (128 // BITS) + 16 * STEP
    if GROUP == 0:
        group = chunk * 0
    elif GROUP >= 128:
        group = chunk * 0 + tile // (GROUP // 128)
    else:
        group = chunk // GROUP + tile * (128 // GROUP)
    if ROW:
        at = (0 if GROUP == 0 else tile // (GROUP // 128)) * stride + rows
    else:
        at = group[None, :] * stride + rows[:, None]
    scale = twice(scale_values(tl.load(scales_ptr + at), FORM), BF16) if SCALED else 0
    if ZEROS == NO_ZEROS:
        zero, rest = 0, 0
    else:
        zero, rest = zero_pairs(tl.load(zeros_ptr + at), FORM, ZEROS, BF16)
        zero = each_word(zero, BN, HELD, BITS)
        rest = each_word(rest, BN, HELD, BITS) if ZEROS == FLOAT_ZEROS else 0
    scale = each_word(scale, BN, HELD, BITS) if SCALED else 0
    return scale, zero, rest


@triton.jit
def each_word(values, BN: tl.constexpr, HELD: tl.constexpr, BITS: tl.constexpr):
    """Values of groups ``[BN, HELD]`` for the words of all four lanes ``[BN, 4 * BITS]``."""
    if HELD == 4 * BITS:
        return values
    else:
        spread = tl.broadcast_to(tl.reshape(values, (BN, 1, HELD, 1)), (BN, 4, HELD, BITS // HELD))
        return tl.reshape(spread, (BN, 4 * BITS))


@triton.jit
def weight_tile(
    words,
    scales_ptr,
    zeros_ptr,
    rows,
    tile,
    stride,
    FORM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    BF16: tl.constexpr,
    LANES: tl.constexpr,
    FEW: tl.constexpr = True,
):
    """Weights ``[BN, 128]`` of k-tile ``tile`` from its int32 ``words [BN, 4 * bits]``.

    ``rows [BN]`` are columns of the scales and zeros, whose rows are ``stride`` apart. Zero points (``ZEROS``: none,
    whole, floats) are subtracted; where ``SCALED``, the scale is multiplied in. ``GROUP`` 0: one for all of K. Columns
    are in natural order, or, with ``LANES``, as :func:`lane_columns` gives them. ``FEW``: BN is less than the threads.
    """
    BITS: tl.constexpr = bits_of(FORM)
    scale, zero, rest = _parameters(
        scales_ptr, zeros_ptr, rows, tile, stride, 0, BN, GROUP, FORM, ZEROS, SCALED, BF16, FEW
    )
    out = step_tile(words, zero, rest, scale, 0, FORM, ZEROS, SCALED, BF16)
    if BITS == 8:
        out = tl.reshape(out, (BN, 4, 8, 2, 2))  # n, c, h, lo, hi
        out = tl.permute(out, (0, 2, 1, 4, 3) if LANES else (0, 2, 4, 1, 3))
    else:
        MIXED: tl.constexpr = GROUP != 0 and GROUP < 16 * (8 // BITS)  # a word has codes of several groups
        if MIXED:
            scale, zero, rest = _parameters(
                scales_ptr, zeros_ptr, rows, tile, stride, 1, BN, GROUP, FORM, ZEROS, SCALED, BF16, FEW
            )
        out = tl.join(out, step_tile(words, zero, rest, scale, 1, FORM, ZEROS, SCALED, BF16))
        if BITS == 4:
            out = tl.reshape(out, (BN, 4, 4, 2, 2, 2))  # n, c, h, lo, hi, s
            out = tl.permute(out, (0, 2, 5, 1, 4, 3) if LANES else (0, 2, 5, 4, 1, 3))
        else:
            if MIXED:
                scale, zero, rest = _parameters(
                    scales_ptr, zeros_ptr, rows, tile, stride, 2, BN, GROUP, FORM, ZEROS, SCALED, BF16, FEW
                )
            more = step_tile(words, zero, rest, scale, 2, FORM, ZEROS, SCALED, BF16)
            if MIXED:
                scale, zero, rest = _parameters(
                    scales_ptr, zeros_ptr, rows, tile, stride, 3, BN, GROUP, FORM, ZEROS, SCALED, BF16, FEW
                )
            more = tl.join(more, step_tile(words, zero, rest, scale, 3, FORM, ZEROS, SCALED, BF16))
            out = tl.reshape(tl.join(out, more), (BN, 4, 2, 2, 2, 2, 2))  # n, c, h, lo, hi, s % 2, s // 2
            out = tl.permute(out, (0, 2, 6, 5, 1, 4, 3) if LANES else (0, 2, 6, 5, 4, 1, 3))
    return tl.reshape(out, (BN, 128))


@triton.jit
def lane_columns(LANES: tl.constexpr):
    """Where the columns of a :func:`weight_tile` lie in its k-tile, ``[128]``.

    Before 3.9 Triton gives a lane of ``mma.sync`` four neighbouring columns, not two, wherever the weights were put
    together by ``tl.join``. In this order they are the four that the lane holds, and weights stay in registers.
    """
    i = tl.arange(0, 128)
    if LANES:
        return tl.max_contiguous(tl.multiple_of((i & 0x70) + (i & 2) * 4 + (i & 12) // 2 + (i & 1), 2), 2)
    else:
        return i
