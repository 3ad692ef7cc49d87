"""Graphs whose neighbourhood decides: shared weights, readers of a result, data movement, dequantizes spelled out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from tests.verify.build import ROWS, Array, Case, Net, bf16, pack, rng, rows
from tests.verify.corpus_qdq import INT4, S8, U8, UINT4, K, N, activation, codes_of, weight

FLOAT, I64 = TensorProto.FLOAT, TensorProto.INT64
BLAME = (
    "w_dq",
    "ww_dq",
    "dq",
    "dq1",
    "dq2",
    "mm",
    "mm2",
    "x_q",
    "x_qdq",
    "r_qdq",
    "h_q",
    "h_qdq",
    "t_q",
    "cast",
    "k_dq",
    "tie_dq",
)
Build = Callable[[Net], Any]


def graph(
    name: str,
    build: Build,
    shape: tuple[int | str, ...] = ("M", K),
    *,
    blame: tuple[str, ...] = BLAME,
    feeds: Callable[[int], dict[str, Array]] | None = None,
    weights: int = K * N,
    opset: int = 21,
) -> Case:
    """``build(net)`` makes ``y`` of ``x``."""
    net = Net(opset)
    net.input("x", shape)
    build(net)
    net.output("y")
    make = feeds or (lambda m: {})
    return Case(name, net.model(), [{"x": rows(shape, m)} | make(m) for m in ROWS], None, blame, weights)


def two_products(name: str, how: str) -> Case:
    """Two products on one weight: a dequantize with two readers, two of the same constants, or two with one scale."""

    def build(net: Net) -> None:
        f, _ = weight(net, INT4, "block")
        second = f
        if how == "tied":
            second = net.op("DequantizeLinear", ["w", "w_scale"], "f2", name="dq2", axis=0, block_size=32)
        if how == "scale":
            net.const("w2", codes_of(INT4, (K, N), 5), INT4)
            second = net.op("DequantizeLinear", ["w2", "w_scale"], "f2", name="dq2", axis=0, block_size=32)
        if how == "copies":
            net.const("w2", codes_of(INT4, (K, N), 1), INT4)
            net.const("w2_scale", np.full((K // 32, N), 0.1, np.float32))
            second = net.op("DequantizeLinear", ["w2", "w2_scale"], "f2", name="dq2", axis=0, block_size=32)
        h = net.op("MatMul", ["x", f], "h", name="mm")
        r = net.op("Sigmoid", ["x"], "r")
        g = net.op("MatMul", [r, second], "g", name="mm2")
        net.op("Concat", [h, g], "y", axis=0)

    return graph(name, build)


def tensor_scales(name: str, equal: bool) -> Case:
    """Two weights with one scale each: the optimizer makes equal scalars one constant."""

    def build(net: Net) -> None:
        outs = []
        for i in (1, 2):
            net.const(f"w{i}", codes_of(S8, (K, N), i))
            net.const(f"s{i}", np.float32(0.01 if equal else 0.01 * i))
            f = net.op("DequantizeLinear", [f"w{i}", f"s{i}"], f"f{i}", name=f"dq{i}")
            x = "x" if i == 1 else net.op("Sigmoid", ["x"], "r")
            outs.append(net.op("MatMul", [x, f], f"h{i}", name="mm" if i == 1 else "mm2"))
        net.op("Concat", outs, "y", axis=0)

    return graph(name, build)


def followed(name: str, op: str, after: str = "Exp", *, gemm: bool = False, element: int = INT4) -> Case:
    """A weight-only product followed by ``op`` and then ``after``."""

    def build(net: Net) -> None:
        f, _ = weight(net, element, "block" if element == INT4 else "channel", axis=0 if element == INT4 else 1)
        h = net.op("Gemm" if gemm else "MatMul", ["x", f], "h", name="mm")
        if op == "Q":
            activation(net, h, U8)
            net.op("Identity", ["h_dqv"], "y")
            return
        limits = [net.const("low", np.float32(0)), net.const("high", np.float32(6))] if op == "Clip" else []
        r = net.op(op, [h, *limits], "r", name="act")
        net.op(after, [r, r] if after == "Add" else [r], "y", name="after")

    return graph(name, build, blame=(*BLAME, "act"))


def residual(name: str) -> Case:
    """What is added to the product is a matrix, not a bias."""

    def build(net: Net) -> None:
        f, _ = weight(net, INT4, "block", shape=(K, K))
        h = net.op("MatMul", ["x", f], "h", name="mm")
        net.op("Add", [h, "x"], "y", name="add")

    return graph(name, build, weights=K * K)


def exposed(name: str) -> Case:
    """The dequantized weight leaves the graph."""

    def build(net: Net) -> None:
        f, _ = weight(net, INT4, "block")
        net.op("MatMul", ["x", f], "y", name="mm")

    case = graph(name, build)
    case.model.graph.output.add(name="w_f").type.tensor_type.elem_type = FLOAT
    return case


def embedding(name: str, element: int, how: str, *, lookup_first: bool = False) -> Case:
    """A table that is dequantized before, or after, rows are picked."""
    vocab = 256

    def build(net: Net) -> None:
        net.input("i", ("Q",), I64)
        if lookup_first:
            picked = net.op("Gather", [net.const("w", codes_of(element, (vocab, N))), "i"], "g", name="gather")
            f = net.op("DequantizeLinear", [picked, net.const("s", np.float32(0.01))], "f", name="dq")
        else:
            table, _ = weight(net, element, how, shape=(vocab, N), axis={"block": 1}.get(how, 0))
            f = net.op("Gather", [table, "i"], "g", name="gather")
        net.op("Add", ["x", f], "y", name="add")

    feeds = lambda m: {"i": np.array([3])}  # noqa: E731
    return graph(name, build, ("M", N), feeds=feeds, weights=vocab * N)


def spelled(name: str, how: str) -> Case:
    """A dequantize written as a cast and arithmetic; in ``scale`` not all of it is constant."""

    def build(net: Net) -> None:
        codes = codes_of(S8, (K, N))
        if how == "unpack":
            low = net.const("w", pack(codes_of(UINT4, (K, N)), 4).reshape(K, N // 2))
            a = net.op("BitwiseAnd", [low, net.const("mask", np.uint8(15))], "a", name="and")
            b = net.op("BitShift", [low, net.const("four", np.uint8(4))], "b", name="shift", direction="RIGHT")
            source = net.op("Concat", [a, b], "c", name="join", axis=1)
        else:
            source = net.const("w", codes)
        f = net.op("Cast", [source], "wf", name="cast", to=FLOAT)
        if how in ("zero", "unpack"):
            f = net.op("Sub", [f, net.const("zero", np.full(N, 8, np.float32))], "wz", name="sub")
        scale = net.const("scale", np.full(N, 0.01, np.float32))
        if how == "scale":
            scale = net.op("ReduceMax", ["x", net.const("axes", np.array([0, 1]))], "top", keepdims=0)
        f = net.op("Mul", [f, scale], "ws", name="mul")
        net.op("MatMul", ["x", f], "y", name="mm")

    return graph(name, build)


def cached(name: str, move: bool) -> Case:
    """An int8 key cache that the model is given, dequantized for a product."""

    def build(net: Net) -> None:
        net.input("past", ("B", 64, K), S8)
        f = net.op("DequantizeLinear", ["past", net.const("s", np.float32(0.01))], "f", name="k_dq")
        if move:
            f = net.op("Reshape", [f, net.const("to", np.array([-1, K]))], "flat", name="flat")
        net.op(
            "MatMul", ["x", net.op("Transpose", [f], "t", name="t", perm=[1, 0] if move else [0, 2, 1])], "y", name="mm"
        )

    feeds = lambda m: {"past": codes_of(S8, (1, 64, K))}  # noqa: E731
    return graph(name, build, feeds=feeds, weights=64 * K)


def moved(name: str, act: int, how: str) -> Case:
    """Data movement between an activation's dequantize and the product."""

    def build(net: Net) -> None:
        a = activation(net, "x", act)
        f, _ = weight(net, S8, "channel", axis=1)
        if how == "transpose":
            a = net.op("Transpose", [a], "t", name="t", perm=[1, 0])
        else:
            a = net.op("Reshape", [a, net.const("to", np.array([-1, K]))], "t", name="t")
        net.op("MatMul", [a, f], "y", name="mm")

    return graph(name, build, (K, "M") if how == "transpose" else ("M", 2, K), blame=(*BLAME, "t"))


def scores(name: str, act: int) -> Case:
    """Q times K transposed, both quantized on the way."""

    def build(net: Net) -> None:
        a = activation(net, "x", act)
        k = net.op("Sigmoid", ["x"], "k")
        t = net.op("Transpose", [k], "kt", perm=[0, 1, 3, 2])
        net.op("MatMul", [a, activation(net, t, act, name="k")], "s", name="mm")
        net.op("Mul", ["s", net.const("c", np.float32(0.25))], "y", name="mul")

    return graph(name, build, ("M", 4, 8, 16), weights=0)


def shared_integer(name: str, act: int, tied: bool) -> Case:
    """One int8 weight under two quantized activations: integer kernels may share it."""

    def build(net: Net) -> None:
        f, _ = weight(net, S8, "channel", axis=1)
        second = net.op("DequantizeLinear", ["w", "w_scale"], "f2", name="dq2", axis=1) if tied else f
        h = net.op("MatMul", [activation(net, "x", act), f], "h", name="mm")
        r = net.op("Sigmoid", ["x"], "r")
        g = net.op("MatMul", [activation(net, r, act), second], "g", name="mm2")
        net.op("Concat", [h, g], "y", axis=0)

    return graph(name, build)


def gemm_bias(name: str, *, fits: bool, zero: bool = True, out_q: bool = False) -> Case:
    """Gemm with an int32 bias whose scale is, or is not, the product of the other two."""

    def build(net: Net) -> None:
        a = activation(net, "x", U8)
        ws = np.full(N, 0.001, np.float32)
        zeros = [net.const("wz", np.zeros(N, np.int8))] if zero else []
        f = net.op(
            "DequantizeLinear",
            [net.const("w", codes_of(S8, (K, N))), net.const("ws", ws), *zeros],
            "f",
            name="w_dq",
            axis=1,
        )
        bs = ws * np.float32(8.0 / 255) if fits else np.full(N, 0.01, np.float32)
        b = net.op(
            "DequantizeLinear",
            [net.const("b", np.arange(N, dtype=np.int32) * 500), net.const("bs", bs)],
            "bf",
            name="tie_dq",
            axis=0,
        )
        net.op("Gemm", [a, f, b], "h" if out_q else "y", name="mm")
        if out_q:
            activation(net, "h", U8, span=4000.0)
            net.op("Identity", ["h_dqv"], "y")

    case = graph(name, build)
    codes, ws = codes_of(S8, (K, N)).astype(np.float64), np.float64(np.float32(0.001))
    bs = ws * np.float64(np.float32(8.0 / 255)) if fits else np.float64(np.float32(0.01))
    step = np.float64(np.float32(8.0 / 255))

    def expect(feed: dict[str, Array]) -> Array:
        x = np.clip(np.round(feed["x"].astype(np.float64) / step), -128, 127) * step
        y = x @ codes * ws + np.arange(N) * 500 * bs
        s = np.float64(np.float32(4000.0 / 255))
        return np.clip(np.round(y / s), -128, 127) * s if out_q else y

    case.expect = expect
    return case


def float8(name: str, *, activations: bool) -> Case:
    """float8 codes: of the weight alone, or of the activation too."""

    def build(net: Net) -> None:
        codes = rng(3).standard_normal((K, N)).astype(ml_dtypes.float8_e4m3fn)
        scale = net.const("s", np.float32(0.1))
        f = net.op("DequantizeLinear", [net.const("w", codes), scale], "f", name="w_dq")
        x = "x"
        if activations:
            zero = net.const("z", np.zeros((), ml_dtypes.float8_e4m3fn))
            net.op("QuantizeLinear", ["x", scale, zero], "xq", name="x_q")
            x = net.op("DequantizeLinear", ["xq", scale, zero], "xf", name="x_qdq")
        net.op("MatMul", [x, f], "y", name="mm")

    return graph(name, build)


def bfloat(name: str) -> Case:
    """A bfloat16 model: the runtime has no dequantize for it."""

    def build(net: Net) -> None:
        net.inputs.clear()
        net.input("x", ("M", K), TensorProto.BFLOAT16)
        scale = net.const("s", bf16(np.full(N, 0.01, np.float32)))
        f = net.op("DequantizeLinear", [net.const("w", codes_of(S8, (K, N))), scale], "f", name="w_dq", axis=1)
        net.op("MatMul", ["x", f], "y", name="mm")

    return graph(name, build)


def blocks_of_rank_3(name: str) -> Case:
    """Codes [N, blocks, block], reshaped to [N, K] and transposed."""

    def build(net: Net) -> None:
        f, _ = weight(net, UINT4, "block", shape=(N, K // 32, 32), axis=2)
        r = net.op("Reshape", [f, net.const("to", np.array([N, K]))], "r", name="flat")
        net.op("MatMul", ["x", net.op("Transpose", [r], "t", name="t", perm=[1, 0])], "y", name="mm")

    return graph(name, build)


def dynamic_bias(name: str, shape: tuple[int | str, ...]) -> Case:
    """Dynamically quantized activations, a weight and a bias: shapes that are all known make it another graph."""

    def build(net: Net) -> None:
        net.op("DynamicQuantizeLinear", ["x"], "xq xs xz", name="x_q")
        a = net.op("DequantizeLinear", ["xq", "xs", "xz"], "xf", name="x_qdq")
        f, _ = weight(net, S8, "channel", axis=1)
        h = net.op("MatMul", [a, f], "h", name="mm")
        net.op("Add", [h, net.const("b", np.ones(N, np.float32))], "y", name="add")

    return graph(name, build, shape)


def float_table(name: str, kind: Any, bits: int) -> Case:
    """GatherBlockQuantized of float8 or float4 codes."""

    def build(net: Net) -> None:
        net.inputs.clear()
        net.input("i", ("M",), I64)
        table = net.const("t", rng(1).standard_normal((64, 128)).astype(kind))
        ins = [table, "i", net.const("s", np.full((64, 4), 0.1, np.float32))]
        attrs = {"bits": bits, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
        net.op("ms:GatherBlockQuantized", ins, "y", name="dq", **attrs)

    case = graph(name, build)
    case.feeds = [{"i": np.arange(m)} for m in ROWS]
    return case


def plain(name: str) -> Case:
    """A float model: nothing to judge."""
    return graph(name, lambda net: net.op("MatMul", ["x", net.const("w", np.ones((K, N), np.float32))], "y", name="mm"))


def cases() -> Iterator[Case]:
    for how in ("reader", "tied", "scale", "copies"):
        yield two_products(f"two-{how}", how)
    yield tensor_scales("two-scalars-equal", True)
    yield tensor_scales("two-scalars-different", False)
    for op in ("Relu", "Clip", "Sigmoid", "LeakyRelu"):
        for gemm in (False, True):
            yield followed(f"then-{op}-{'gemm' if gemm else 'matmul'}", op, gemm=gemm)
    yield followed("then-Relu-read-twice", "Relu", "Add")
    yield followed("then-quantize", "Q")
    yield followed("then-quantize-int8", "Q", element=S8)
    yield residual("residual")
    yield exposed("weight-is-output")
    for element, how in ((INT4, "block"), (S8, "channel"), (S8, "tensor"), (S8, "block")):
        yield embedding(f"table-{'int4' if element == INT4 else 'int8'}-{how}", element, how)
    yield embedding("table-lookup-first", S8, "tensor", lookup_first=True)
    for how in ("fold", "zero", "unpack", "scale"):
        yield spelled(f"spelled-{how}", how)
    yield cached("cache-transposed", False)
    yield cached("cache-reshaped", True)
    for act, label in ((U8, "u8"), (S8, "s8")):
        for how in ("transpose", "reshape"):
            yield moved(f"moved-{how}-{label}", act, how)
        yield scores(f"scores-{label}", act)
        yield shared_integer(f"shared-{label}", act, False)
        yield shared_integer(f"tied-{label}", act, True)
    for out_q in (False, True):
        yield gemm_bias(f"bias-fits{'-q' if out_q else ''}", fits=True, out_q=out_q)
        yield gemm_bias(f"bias-of-another-scale{'-q' if out_q else ''}", fits=False, out_q=out_q)
    yield gemm_bias("gemm-without-zero", fits=True, zero=False)
    yield float8("float8-weight", activations=False)
    yield float8("float8-both", activations=True)
    yield bfloat("bfloat16")
    yield blocks_of_rank_3("rank-3-blocks")
    yield dynamic_bias("dynamic-bias-known-shape", (2, 3, K))
    yield dynamic_bias("dynamic-bias-symbols", ("M", 3, K))
    yield float_table("table-f8e4m3", ml_dtypes.float8_e4m3fn, 8)
    yield float_table("table-f8e5m2", ml_dtypes.float8_e5m2, 8)
    yield float_table("table-f4e2m1", ml_dtypes.float4_e2m1fn, 4)
    yield plain("float")
