"""Graphs whose neighbourhood decides: shared weights, readers of a result, data movement, dequantizes spelled out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.verify.build import ROWS, Array, Case, Net, pack, rows
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


def moved(name: str, act: int, how: str, opset: int = 21) -> Case:
    """Data movement between an activation's dequantize and the product."""

    def build(net: Net) -> None:
        a = activation(net, "x", act)
        f, _ = weight(net, S8, "channel", axis=1)
        if how == "transpose":
            a = net.op("Transpose", [a], "t", name="t", perm=[1, 0])
        else:
            a = net.op("Reshape", [a, net.const("to", np.array([-1, K]))], "t", name="t")
        net.op("MatMul", [a, f], "y", name="mm")

    shape = (K, "M") if how == "transpose" else ("M", 2, K)
    return graph(name, build, shape, blame=(*BLAME, "t"), opset=opset)


def pooled(name: str, act: int, opset: int) -> Case:
    """A MaxPool between an activation's dequantize and a float op."""

    def build(net: Net) -> None:
        a = activation(net, "x", act)
        net.op("Exp", [net.op("MaxPool", [a], "t", name="t", kernel_shape=[2, 2])], "y", name="exp")

    return graph(name, build, ("M", 8, 6, 6), blame=(*BLAME, "t"), weights=0, opset=opset)


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
            yield moved(f"moved-{how}-{label}-opset13", act, how, 13)
        for opset in (13, 21):
            yield pooled(f"pooled-{label}-opset{opset}", act, opset)
        yield scores(f"scores-{label}", act)
        yield shared_integer(f"shared-{label}", act, False)
        yield shared_integer(f"tied-{label}", act, True)
