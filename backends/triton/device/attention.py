"""Attention of one new token over a quantized KV cache, in parts of the tokens, and the combination of the parts.

Codes are read 16 bytes a thread and widened in registers to exact float16: every code of these forms is one. Nothing
wider than a code is ever stored in global memory. Of two codes in a byte the low ones make a tile of the even features,
the high ones a tile of the odd ones, each with an accumulator of its own.

``MOVABLE`` says whether the compiler may move a widening past a change of layout. Keys are widened in the layout of the
tensor cores' operand. Values must be widened before it: their operand wants tokens side by side, which the hardware
transposes 16 bits at a time and the compiler 8 bits at a time.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.pairs import ASM

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal f32."""


@triton.jit
def signed_bytes(codes, MOVABLE: tl.constexpr):
    """int8 -> float16. A byte b, shifted by 128 to be unsigned, makes with the exponent 0x64 the number 1152 + b."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, m;
            xor.b32 x, $2, 0x80808080;
            mov.b32 m, 0x64806480;
            prmt.b32 $0, x, 0x64646464, 0x4140;
            prmt.b32 $1, x, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, m;
            sub.f16x2 $1, $1, m;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=MOVABLE,
            pack=4,
        )
    else:
        return codes.to(tl.float16)


@triton.jit
def nibbles(codes, MOVABLE: tl.constexpr):
    """uint8 -> the low and the high 4 bits, 0..15, each as float16: 1024 + n with the exponent 0x64."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 l, h, m;
            mov.b32 m, 0x64006400;
            and.b32 l, $4, 0x0f0f0f0f;
            shr.u32 h, $4, 4;
            and.b32 h, h, 0x0f0f0f0f;
            prmt.b32 $0, l, 0x64646464, 0x4140;
            prmt.b32 $1, l, 0x64646464, 0x4342;
            prmt.b32 $2, h, 0x64646464, 0x4140;
            prmt.b32 $3, h, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, m;
            sub.f16x2 $1, $1, m;
            sub.f16x2 $2, $2, m;
            sub.f16x2 $3, $3, m;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=MOVABLE,
            pack=4,
        )
    else:
        return (codes & 0xF).to(tl.float16), (codes >> 4).to(tl.float16)


@triton.jit
def e4m3_bytes(codes, NATIVE: tl.constexpr, MOVABLE: tl.constexpr):
    """uint8 that hold float8_e4m3fn -> float16; a code of NaN gives 480 where ``NATIVE`` is not set.

    The fields of the code one bit below those of a float16 are the value times 2^-8, of subnormal codes too.
    """
    if ASM and NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 l, h;
            mov.b32 {l, h}, $2;
            cvt.rn.f16x2.e4m3x2 $0, l;
            cvt.rn.f16x2.e4m3x2 $1, h;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=MOVABLE,
            pack=4,
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, m;
            mov.b32 m, 0x5c005c00;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.u32 c, a, 1;
            shr.u32 d, b, 1;
            and.b32 c, c, 0x3f803f80;
            and.b32 d, d, 0x3f803f80;
            lop3.b32 a, a, 0x80008000, c, 0xea;
            lop3.b32 b, b, 0x80008000, d, 0xea;
            mul.f16x2 $0, a, m;
            mul.f16x2 $1, b, m;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=MOVABLE,
            pack=4,
        )
    else:
        bits = codes.to(tl.int16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def widened(codes, FORM: tl.constexpr, NATIVE: tl.constexpr, MOVABLE: tl.constexpr):
    """Codes of one to a byte -> float16, exact."""
    if FORM == "f8e4m3":
        return e4m3_bytes(codes, NATIVE, MOVABLE)
    else:
        return signed_bytes(codes, MOVABLE)


@triton.jit(do_not_specialize=["tokens", "parts"])
def attend_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_ptr,
    v_scale_ptr,
    v_zero_ptr,
    length_ptr,
    y_ptr,
    partial_ptr,
    stats_ptr,
    tokens,  # T of the cache
    parts,
    heads,  # of the cache
    group,  # query heads a head of the cache serves
    scale,
    q_batch,  # strides of q, in elements
    q_head,
    q_feature,
    k_batch,  # strides of the codes, in units of ``UNIT`` bytes
    k_head,
    v_batch,
    v_head,
    k_scale_batch,  # strides of scales and zero points, in elements
    k_scale_head,
    v_scale_batch,
    v_scale_head,
    k_zero_batch,
    k_zero_head,
    v_zero_batch,
    v_zero_head,
    FORM: tl.constexpr,
    D: tl.constexpr,
    BYTES: tl.constexpr,  # of a row, and the next power of two
    COLUMNS: tl.constexpr,
    K_TOKEN: tl.constexpr,  # strides of a token, in bytes
    V_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,  # there is one part
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One part of the tokens of one head of the cache, for up to ``ROWS`` query heads.

    Softmax runs in f32 with base 2 and a running maximum. The query is rounded to float16 after division by its
    largest magnitude. Scales never meet codes: a key's multiplies its score, a value's its weight, divided by the
    largest of the block so that weights stay within [0, 1]. Zero points are taken off the sums.
    """
    PACKED: tl.constexpr = FORM == "int4"
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles = tl.cdiv(group, ROWS)
    head = (pid // tiles) % heads
    batch = (pid // (tiles * heads)).to(tl.int64)
    row = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    known = (row < group)[:, None] & (column < BYTES)[None, :]

    q_row = q_ptr + batch * q_batch + ((head * group + row) * q_head)[:, None]
    feature = column * 2 if PACKED else column
    q = tl.load(q_row + (feature * q_feature)[None, :], mask=known, other=0.0).to(tl.float32) * scale
    largest = tl.max(tl.abs(q), 1)
    if PACKED:
        q_odd = tl.load(q_row + ((feature + 1) * q_feature)[None, :], mask=known, other=0.0).to(tl.float32) * scale
        largest = tl.maximum(largest, tl.max(tl.abs(q_odd), 1))
    largest = tl.maximum(largest, TINY)
    query = (q / largest[:, None]).to(tl.float16)
    if PACKED:
        query_odd = (q_odd / largest[:, None]).to(tl.float16)
        q_sum = tl.sum(query.to(tl.float32) + query_odd.to(tl.float32), 1)
    factor = largest * LOG2E  # scores are kept relative to it

    length = tl.minimum(tl.load(length_ptr + batch), tokens).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    first = part * share
    last = tl.minimum(first + share, length)
    k_base = k_ptr + (batch * k_batch + head.to(tl.int64) * k_head) * UNIT
    v_base = v_ptr + (batch * v_batch + head.to(tl.int64) * v_head) * UNIT
    k_scales = k_scale_ptr + batch * k_scale_batch + head * k_scale_head
    v_scales = v_scale_ptr + batch * v_scale_batch + head * v_scale_head

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PACKED:
        acc_odd = tl.zeros((ROWS, COLUMNS), tl.float32)
        early = first + tl.arange(0, BLOCK)
        k_zeros = k_zero_ptr + batch * k_zero_batch + head * k_zero_head
        v_zeros = v_zero_ptr + batch * v_zero_batch + head * v_zero_head
        k_zero = tl.load(k_zeros + early, mask=early < last, other=0)
        v_zero = tl.load(v_zeros + early, mask=early < last, other=0)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = token < last
        mask = there[:, None] & (column < BYTES)[None, :]
        k_codes = tl.load(k_base + token[:, None] * K_TOKEN + column[None, :], mask=mask, other=0)
        v_codes = tl.load(v_base + token[:, None] * V_TOKEN + column[None, :], mask=mask, other=0)
        k_scale = tl.load(k_scales + token, mask=there, other=0.0)
        v_scale = tl.load(v_scales + token, mask=there, other=0.0)

        if PACKED:
            keys, keys_odd = nibbles(k_codes, True)
            scores = tl.dot(query, tl.trans(keys))
            scores = tl.dot(query_odd, tl.trans(keys_odd), scores)
            scores -= q_sum[:, None] * k_zero.to(tl.float32)[None, :]
        else:
            scores = tl.dot(query, tl.trans(widened(k_codes, FORM, NATIVE, True)))
        scores = tl.where(there[None, :], scores * k_scale[None, :], float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2((top - higher) * factor)
        weights = tl.exp2((scores - higher[:, None]) * factor[:, None])
        total = total * fade + tl.sum(weights, 1)
        top = higher

        widest = tl.maximum(tl.max(v_scale, 0), TINY)
        shares = (weights * (v_scale / widest)[None, :]).to(tl.float16)
        if PACKED:
            values, values_odd = nibbles(v_codes, False)
            offset = tl.sum(shares.to(tl.float32) * v_zero.to(tl.float32)[None, :], 1)[:, None]
            acc = acc * fade[:, None] + (tl.dot(shares, values) - offset) * widest
            acc_odd = acc_odd * fade[:, None] + (tl.dot(shares, values_odd) - offset) * widest
            early = token + BLOCK  # zero points of the next block, too small for asynchronous copies
            k_zero = tl.load(k_zeros + early, mask=early < last, other=0)
            v_zero = tl.load(v_zeros + early, mask=early < last, other=0)
        else:
            acc = acc * fade[:, None] + tl.dot(shares, widened(v_codes, FORM, NATIVE, False)) * widest

    WIDTH: tl.constexpr = 2 * COLUMNS if PACKED else COLUMNS
    if PACKED:
        acc = tl.reshape(tl.join(acc, acc_odd), (ROWS, WIDTH))
    d = tl.arange(0, WIDTH)
    out = (batch * heads + head) * group + row
    if WHOLE:
        y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        mask = (row < group)[:, None] & (d < D)[None, :]
        tl.store(y_ptr + out[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        at = out * parts + part
        mask = (row < group)[:, None] & (d < WIDTH)[None, :]
        tl.store(partial_ptr + at[:, None] * WIDTH + d[None, :], acc, mask=mask)
        tl.store(stats_ptr + at * 2, top * factor, mask=row < group)
        tl.store(stats_ptr + at * 2 + 1, total, mask=row < group)


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    partial_ptr,
    stats_ptr,
    y_ptr,
    parts,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # the power of two that is not below parts
    CHUNK: tl.constexpr,
):
    """Parts of one query head, weighted by their share of the softmax's sum; zeros where there was no token."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED)
    tops = tl.load(stats_ptr + (row * parts + every) * 2, mask=every < parts, other=float("-inf"))
    highest = tl.maximum(tl.max(tops, 0), -3.0e38)  # finite where there was no token at all
    d = tl.arange(0, WIDTH)
    y = tl.zeros((WIDTH,), tl.float32)
    whole = 0.0
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        at = row * parts + part
        top = tl.load(stats_ptr + at * 2, mask=part < parts, other=float("-inf"))
        total = tl.load(stats_ptr + at * 2 + 1, mask=part < parts, other=0.0)
        weight = tl.exp2(top - highest)
        whole += tl.sum(weight * total, 0)
        sums = tl.load(partial_ptr + at[:, None] * WIDTH + d[None, :], mask=(part < parts)[:, None], other=0.0)
        y += tl.sum(sums * weight[:, None], 0)
    y = y / tl.where(whole == 0.0, 1.0, whole)
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)
