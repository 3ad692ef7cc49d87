"""Pairs: two 16-bit floats, bf16 or fp16, in one int32, the low half first. The unit in which weights are decoded.

Inline assembly keeps a pair in one register and gives one instruction for both halves; bf16 products go through
``fma``, which sm_80 has (``mul.bf16x2`` begins at sm_90). The interpreter knows no assembly, so each function has a
branch without it that computes the same.
"""

import triton
import triton.language as tl

ASM = tl.constexpr(not triton.knobs.runtime.interpret)
BOTH = tl.constexpr(0x10001)


@triton.jit
def float16_type(BF16: tl.constexpr):
    return tl.bfloat16 if BF16 else tl.float16


@triton.jit
def halves(pair, BF16: tl.constexpr):
    """The low and the high half as 16-bit floats."""
    low, high = (pair & 0xFFFF).to(tl.int16), (pair >> 16).to(tl.int16)
    if BF16:
        return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
    else:
        return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def twice(value, BF16: tl.constexpr):
    """A float, rounded to 16 bits, in both halves."""
    short = value.to(tl.bfloat16) if BF16 else value.to(tl.float16)
    return (short.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * BOTH


@triton.jit
def join_halves(low, high):
    """Inverse of :func:`halves`."""
    bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def subtract_pairs(a, b, BF16: tl.constexpr):
    """``a - b`` in each half, rounded once."""
    if ASM:
        if BF16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $2, m, $1; }",
                "=r,r,r",
                [a, b],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        low, high = halves(a, BF16)
        less, more = halves(b, BF16)
        return join_halves(low - less, high - more)


@triton.jit
def multiply_pairs(a, b, BF16: tl.constexpr):
    """``a * b`` in each half, rounded once."""
    if ASM:
        if BF16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
                "=r,r,r",
                [a, b],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        low, high = halves(a, BF16)
        times, more = halves(b, BF16)
        return join_halves(low * times, high * more)


@triton.constexpr_function
def masked_assembly(shift, mask, magic):
    shifted = f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shifted} lop3.b32 $0, t, {mask}, {magic}, 0xea; }}"


@triton.jit
def masked_bits(words, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr):
    """``words >> SHIFT & MASK | MAGIC``, one shift and one LOP3."""
    if ASM:
        CODE: tl.constexpr = masked_assembly(SHIFT, MASK, MAGIC)
        return tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((words >> SHIFT) & MASK) | MAGIC
