"""Graphs whose types, scales or shapes decide: biases of another scale, float codes, bfloat16, shapes all known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from tests.verify.build import ROWS, Array, Case, Net, bf16, rng
from tests.verify.corpus_graphs import I64, graph
from tests.verify.corpus_qdq import S8, U8, UINT4, K, N, activation, codes_of, weight


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
