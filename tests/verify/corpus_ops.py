"""Graphs of the runtime's other low-bit ops: tables, integer kernels, experts, caches, ops without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from tests.verify.build import ROWS, Array, Case, NBits, Net, pack, rng, rows
from tests.verify.corpus_qdq import INT4, S8, U8, UINT4, K, N, codes_of

FLOAT, F16, I64, I32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
ROW_COUNT = 96


def done(
    name: str,
    net: Net,
    feed: Callable[[int], dict[str, Array]],
    expect: Callable[[dict[str, Array]], Array] | None,
    *,
    out: int = FLOAT,
    weights: int = 0,
    blame: tuple[str, ...] = ("site",),
) -> Case:
    net.output("y", out)
    return Case(name, net.model(), [feed(m) for m in ROWS], expect, blame, weights)


def bnb4(name: str, kind: int, bs: int) -> Case:
    """MatMulBnb4: 4-bit codes of a 16-value code book, the first in the high half of the byte."""
    book = {
        0: [0.0, 5.208333e-03, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25],
        1: [0.0, 0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0],
    }[kind]
    below = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
    values = np.array([*book, *(-v for v in book)] if kind == 0 else [*below, *book])
    codes = rng(21, kind).integers(0, 16, (N, K))
    scale = (0.5 + rng(22).random(N * K // bs)).astype(np.float32)
    flat = codes.reshape(-1)
    packed = ((flat[0::2] << 4) | flat[1::2]).astype(np.uint8)
    weight = (values[codes].reshape(-1, bs) * scale[:, None]).reshape(N, K)
    net = Net()
    x = net.input("x", ("M", K))
    ins = [x, net.const("b", packed), net.const("s", scale)]
    net.op("ms:MatMulBnb4", ins, "y", name="site", K=K, N=N, block_size=bs, quant_type=kind)
    expect = (lambda f: f["x"].astype(np.float64) @ weight.T) if kind == 1 else None
    return done(name, net, lambda m: {"x": rows(("M", K), m)}, expect, weights=K * N)


def table(
    name: str,
    element: int = U8,
    bits: int = 4,
    *,
    zero: bool = False,
    f16: bool = False,
    bs: int = 32,
    indices: int = I64,
    **attrs: Any,
) -> Case:
    """GatherBlockQuantized along rows, blocks along columns."""
    width, groups = 128, 128 // bs
    float_type = np.float16 if f16 else np.float32
    w = NBits(ROW_COUNT, width, bits, bs, asym=zero)
    scales = w.scales.astype(float_type)
    signed = element == INT4
    codes = w.codes - (1 << (bits - 1)) if signed else w.codes
    net = Net(21)
    if element == U8:
        data = net.const("b", pack(codes, bits).reshape(ROW_COUNT, -1))
    else:
        data = net.const("b", codes, element)
    net.input("i", ("M",), indices)
    ins = [data, "i", net.const("s", scales)]
    middle = (1 << (bits - 1)) if element == U8 else 0
    zeros = w.zeros if not signed else w.zeros - (1 << (bits - 1))
    if zero:
        packed = np.stack([pack(r, bits) for r in zeros]) if element == U8 else zeros
        ins.append(net.const("z", packed, None if element == U8 else element))
    else:
        zeros = np.full((ROW_COUNT, groups), middle)
    config = {"bits": bits, "block_size": bs, "gather_axis": 0, "quantize_axis": 1} | attrs
    net.op("ms:GatherBlockQuantized", ins, "y", name="site", **config)
    wide = np.repeat(np.stack([scales.astype(np.float64), zeros.astype(np.float64)]), bs, axis=2)
    value = (codes - wide[1]) * wide[0]

    def feed(m: int) -> dict[str, Array]:
        return {"i": rng(m).integers(0, ROW_COUNT, m).astype(np.int64 if indices == I64 else np.int32)}

    return done(name, net, feed, lambda f: value[f["i"]], out=F16 if f16 else FLOAT, weights=ROW_COUNT * width)


def integer(
    name: str,
    op: str,
    *,
    a: int = U8,
    b: int = S8,
    how: str = "channel",
    bias: bool = False,
    block: bool = False,
    quantized: bool = False,
) -> Case:
    """An integer product written out, ``x`` codes but for DynamicQuantizeMatMul; ``quantized`` gives a QGemm codes."""
    kinds = {U8: np.uint8, S8: np.int8}
    az, bz = (128 if a == U8 else 0), (128 if b == U8 else 0)
    codes = codes_of(b, (K, N), 2)
    shape: tuple[int, ...] = (K // 32, N) if block else () if how == "tensor" else (N,)
    scales = np.asarray((0.5 + rng(31).random(shape)) / 127, np.float32)
    net = Net()
    floats = op == "DynamicQuantizeMatMul"
    x = net.input("x", ("M", K), FLOAT if floats else a)
    sa, za = net.const("sa", np.float32(0.05)), net.const("za", np.array(az, kinds[a]))
    w, sb = net.const("w", codes), net.const("sb", scales)
    zb = net.const("zb", np.full(() if shape == () or block else (N,), bz, kinds[b]))
    beta = rng(33).standard_normal(N).astype(np.float32) if bias else np.zeros(N, np.float32)
    extra = [net.const("bias", beta)] if bias else []
    out = FLOAT
    if op == "DynamicQuantizeMatMul":
        net.op("ms:DynamicQuantizeMatMul", [x, w, sb, zb, *extra], "y", name="site")
    elif op == "MatMulIntegerToFloat":
        net.op("ms:MatMulIntegerToFloat", [x, w, sa, sb, za, zb, *extra], "y", name="site")
    elif op == "MatMulInteger":
        net.op("MatMulInteger", [x, w, za, net.const("zb0", np.array(bz, kinds[b]))], "y", name="site")
        out = I32
    elif op == "QGemm":
        tail = [net.const("so", np.float32(2.0)), net.const("zo", np.array(az, kinds[a]))] if quantized else []
        net.op("ms:QGemm", [x, sa, za, w, sb, zb, "", *tail], "y", name="site")
        out = a if quantized else FLOAT
    else:
        so, zo = net.const("so", np.float32(2.0)), net.const("zo", np.array(az, kinds[a]))
        net.op("QLinearMatMul", [x, sa, za, w, sb, zb, so, zo], "y", name="site")
        out = a
    wide = np.repeat(scales, 32, axis=0) if block else scales
    value = (codes.astype(np.float64) - bz) * wide

    def feed(m: int) -> dict[str, Array]:
        low, high = (0, 256) if a == U8 else (-128, 128)
        return {"x": rows(("M", K), m) if floats else rng(m).integers(low, high, (m, K)).astype(kinds[a])}

    def expect(f: dict[str, Array]) -> Array:
        if floats:
            return f["x"].astype(np.float64) @ value + beta
        whole = f["x"].astype(np.float64) - az
        if op == "MatMulInteger":
            return whole @ (codes.astype(np.float64) - bz)
        y = whole @ value * np.float64(np.float32(0.05)) + beta
        return np.clip(np.round(y / 2.0) + az, *((0, 255) if a == U8 else (-128, 127))) if out == a else y

    return done(name, net, feed, expect, out=out, weights=K * N)


def qlinear_conv(name: str) -> Case:
    """QLinearConv written out, kernel 1."""
    net = Net()
    x = net.input("x", ("M", 16, 5, 5), U8)
    codes = codes_of(S8, (32, 16, 1, 1), 4)
    scales = np.asarray((0.5 + rng(41).random(32)) / 127, np.float32)
    ins = [x, net.const("xs", np.float32(0.05)), net.const("xz", np.uint8(128)), net.const("w", codes)]
    ins += [net.const("ws", scales), net.const("wz", np.zeros(32, np.int8))]
    ins += [net.const("ys", np.float32(0.1)), net.const("yz", np.uint8(128))]
    net.op("QLinearConv", ins, "y", name="site")
    value = codes.astype(np.float64).reshape(32, 16) * scales[:, None]

    def expect(f: dict[str, Array]) -> Array:
        y = np.einsum("mcij,oc->moij", f["x"].astype(np.float64) - 128, value) * np.float64(np.float32(0.05))
        return np.clip(np.round(y / np.float64(np.float32(0.1))) + 128, 0, 255)

    return done(name, net, lambda m: {"x": rng(m).integers(0, 256, (m, 16, 5, 5)).astype(np.uint8)}, expect, out=U8)


def attention(name: str, a: int = U8) -> Case:
    """QAttention: one product for Q, K and V on integer codes."""
    hidden, heads, kind = 64, 4, np.uint8 if a == U8 else np.int8
    net = Net()
    x = net.input("x", (1, "M", hidden), a)
    ins = [x, net.const("w", codes_of(S8, (hidden, 3 * hidden), 5)), net.const("b", np.zeros(3 * hidden, np.float32))]
    ins += [
        net.const("xs", np.float32(0.02)),
        net.const("ws", np.float32(0.005)),
        "",
        net.const("xz", np.array(0, kind)),
    ]
    ins += [net.const("wz", np.array(0, np.int8))]
    net.op("ms:QAttention", ins, "y", name="site", num_heads=heads)
    feed = lambda m: {"x": rng(m).integers(0, 100, (1, m, hidden)).astype(kind)}  # noqa: E731
    return done(name, net, feed, None, weights=3 * hidden * hidden)


def lstm(name: str) -> Case:
    """DynamicQuantizeLSTM."""
    hidden, size = 32, 64
    net = Net()
    x = net.input("x", ("M", 1, size))
    ins = [
        x,
        net.const("w", codes_of(S8, (1, size, 4 * hidden), 6)),
        net.const("r", codes_of(S8, (1, hidden, 4 * hidden), 7)),
    ]
    ins += [
        "",
        "",
        "",
        "",
        "",
        net.const("ws", np.full((1,), 0.005, np.float32)),
        net.const("wz", np.zeros(1, np.int8)),
    ]
    ins += [net.const("rs", np.full((1,), 0.005, np.float32)), net.const("rz", np.zeros(1, np.int8))]
    net.op("ms:DynamicQuantizeLSTM", ins, "y", name="site", hidden_size=hidden)
    return done(name, net, lambda m: {"x": rows(("M", 1, size), m)}, None, weights=4 * hidden * size)


def cache(name: str, bits: int) -> Case:
    """GroupQueryAttention over a quantized cache of many tokens: expanding it would show in temporary memory."""
    heads, kv, dim, past = 4, 2, 64, 512
    kind = np.int8 if bits == 8 else np.uint8
    width = dim if bits == 8 else dim // 2
    net = Net()
    for q, h in (("q", heads), ("k", kv), ("v", kv)):
        net.input(q, ("B", 1, h * dim))
    element = S8 if bits == 8 else U8
    net.input("pk", ("B", kv, past, width), element)
    net.input("pv", ("B", kv, past, width), element)
    ins = [
        "q",
        "k",
        "v",
        "pk",
        "pv",
        net.const("len", np.array([past], np.int32)),
        net.const("total", np.int32(past + 1)),
    ]
    ins += ["", "", "", "", "", net.const("ks", np.float32(0.05)), net.const("vs", np.float32(0.05))]
    net.op(
        "ms:GroupQueryAttention",
        ins,
        "y kk vv",
        name="site",
        num_heads=heads,
        kv_num_heads=kv,
        kv_cache_bit_width=bits,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
    )

    def feed(m: int) -> dict[str, Array]:
        r = rng(m)
        out: dict[str, Array] = {
            q: r.standard_normal((1, 1, h * dim)).astype(np.float32) for q, h in (("q", heads), ("k", kv), ("v", kv))
        }
        low, high = (-128, 128) if bits == 8 else (0, 256)
        return out | {p: r.integers(low, high, (1, kv, past, width)).astype(kind) for p in ("pk", "pv")}

    return done(name, net, feed, None, weights=kv * past * dim)


def moe(name: str, bits: int, bs: int | None) -> Case:
    """QMoE with two experts of [inter, hidden] and [hidden, inter]."""
    experts, hidden, inter = 2, 256, 256
    per = 8 // bits
    net = Net()
    x = net.input("x", ("M", hidden))
    net.input("r", ("M", experts))

    def part(tag: str, n: int, k: int) -> list[str]:
        codes = rng(51, n).integers(0, 256, (experts, n, k // per)).astype(np.uint8)
        shape = (experts, n) if bs is None else (experts, n, k // bs)
        return [net.const(f"{tag}w", codes), net.const(f"{tag}s", np.full(shape, 0.01, np.float32))]

    ins = [x, "r", *part("a", inter, hidden), "", *part("b", hidden, inter)]
    attrs: dict[str, Any] = {"k": 1, "activation_type": "relu", "expert_weight_bits": bits}
    if bs is not None:
        attrs["block_size"] = bs
    net.op("ms:QMoE", ins, "y", name="site", **attrs)
    feed = lambda m: {"x": rows(("M", hidden), m), "r": rows(("M", experts), m)}  # noqa: E731
    return done(name, net, feed, None, weights=hidden * inter)


def no_kernel(name: str, op: str) -> Case:
    """An op that only the CUDA provider has."""
    net = Net()
    x = net.input("x", ("M", K))
    w = net.const("w", np.zeros((N, K), ml_dtypes.float8_e4m3fn))
    net.op(
        f"ms:{op}",
        [x, w, net.const("s", np.ones((N // 128, K // 128), np.float32))],
        "y",
        name="site",
        **({"block_size": 128, "K": K, "N": N} if op != "GemmFloat8" else {"transB": 1}),
    )
    return done(name, net, lambda m: {"x": rows(("M", K), m)}, None, weights=K * N)


def cases() -> Iterator[Case]:
    for kind, label in ((0, "fp4"), (1, "nf4")):
        for bs in (16, 64):
            yield bnb4(f"bnb4-{label}-g{bs}", kind, bs)
    for bits in (2, 4, 8):
        yield table(f"table-u8-{bits}", bits=bits)
        yield table(f"table-u8-{bits}-zero", bits=bits, zero=True)
    yield table("table-int4", INT4)
    yield table("table-int4-zero", INT4, zero=True)
    yield table("table-uint4-zero", UINT4, zero=True)
    yield table("table-f16", f16=True)
    yield table("table-int32-indices", indices=I32)
    yield table("table-g16", bs=16)
    yield table("table-g8", bs=8)
    yield table("table-gather-axis-1", gather_axis=1, quantize_axis=0)
    for a, b in ((U8, S8), (U8, U8), (S8, S8), (S8, U8)):
        for op in ("QLinearMatMul", "MatMulIntegerToFloat", "QGemm", "MatMulInteger"):
            yield integer(f"int-{op}-{'u8' if a == U8 else 's8'}{'u8' if b == U8 else 's8'}", op, a=a, b=b)
    yield integer("int-QGemm-q", "QGemm", quantized=True)
    yield integer("int-MatMulIntegerToFloat-bias", "MatMulIntegerToFloat", bias=True)
    for b in (S8, U8):
        for how in ("tensor", "channel"):
            yield integer(f"int-dynamic-{'s8' if b == S8 else 'u8'}-{how}", "DynamicQuantizeMatMul", b=b, how=how)
    yield integer("int-dynamic-bias", "DynamicQuantizeMatMul", bias=True)
    for op in ("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        yield integer(f"int-{op}-block", op, block=True)
    yield qlinear_conv("int-QLinearConv")
    yield attention("int-QAttention")
    yield attention("int-QAttention-s8", S8)
    yield lstm("int-lstm")
    yield cache("cache-int8", 8)
    yield cache("cache-int4", 4)
    for bits in (4, 8):
        yield moe(f"moe-{bits}-rows", bits, None)
        yield moe(f"moe-{bits}-g32", bits, 32)
    yield moe("moe-2-g16", 2, 16)
    yield moe("moe-2-g32", 2, 32)
    yield no_kernel("none-fp8-weight", "MatMulBlockQuantizedFp8Weight")
    yield no_kernel("none-gemm-float8", "GemmFloat8")
