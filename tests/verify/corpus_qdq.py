"""Graphs spelled with QuantizeLinear and DequantizeLinear: what this runtime fuses by itself, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.verify.build import LOW_BITS, ROWS, Array, Case, Net, rng, rows

FLOAT, F16, S8, U8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8
S16, U16, S32 = TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32
INT4, UINT4, INT2, UINT2 = TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2
K, N = 256, 128
RANGE = {
    INT4: (-8, 8),
    UINT4: (0, 16),
    INT2: (-2, 2),
    UINT2: (0, 4),
    S8: (-127, 128),
    U8: (0, 256),
    S16: (-32767, 32768),
}


def codes_of(element: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    low, high = RANGE[element]
    values = rng(11, seed, element).integers(low, high, shape)
    return values if element in LOW_BITS else values.astype({S8: np.int8, U8: np.uint8, S16: np.int16}[element])


def spread(small: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zeros at the shape of the codes."""
    if small.ndim == 0:
        return np.broadcast_to(small, shape)
    if small.size == 1:
        return np.broadcast_to(small.reshape(()), shape)
    if block:
        return np.repeat(small, block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return np.broadcast_to(small.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def weight(
    net: Net,
    element: int,
    how: str,
    *,
    shape: tuple[int, ...] = (K, N),
    axis: int = 0,
    block: int = 32,
    zero: bool = False,
    name: str = "w",
    f16: bool = False,
    as_input: str = "",
    domain: str = "",
) -> tuple[str, Array]:
    """A DequantizeLinear ``<name>_dq`` of a constant; ``how``: block, channel, tensor, tensor1. Also its float64 value.

    ``as_input`` names what is a graph input with a default instead of a constant: scale or codes.
    """
    codes = codes_of(element, shape, seed=len(name))
    if how == "block":
        small = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
    else:
        small = {"channel": (shape[axis],), "tensor": (), "tensor1": (1,)}[how]
    r = rng(12, len(name), element)
    top = RANGE[element][1]
    scales = np.asarray((0.5 + r.random(small)) / top, np.float16 if f16 else np.float32)
    low, high = RANGE[element]
    middle = (low + high) // 2 if element not in (INT4, INT2, S8, S16) else 0
    zeros = np.full(small, middle, np.int64) if not zero else np.asarray(r.integers(low, high, small))
    ins = [net.const(name, codes, element), net.const(f"{name}_scale", scales)]
    if zero or middle:
        zero_values = zeros if element in LOW_BITS else zeros.astype(codes.dtype)
        ins.append(net.const(f"{name}_zero", zero_values, element))
    if as_input == "scale":
        net.input(f"{name}_scale", list(small), F16 if f16 else FLOAT)
    if as_input == "codes":
        net.input(name, list(shape), element)
    attrs: dict[str, Any] = {} if how.startswith("tensor") else {"axis": axis}
    if how == "block":
        attrs["block_size"] = block
    kind = f"{domain}:DequantizeLinear" if domain else "DequantizeLinear"
    out = net.op(kind, ins, f"{name}_f", name=f"{name}_dq", **attrs)
    wide = block if how == "block" else 0
    s, z = spread(scales.astype(np.float64), shape, axis, wide), spread(zeros.astype(np.float64), shape, axis, wide)
    return out, (codes.astype(np.float64) - z) * s


def activation(
    net: Net, value: str, element: int = U8, name: str = "", domain: str = "", f16: bool = False, span: float = 8.0
) -> str:
    """QuantizeLinear and DequantizeLinear of ``value``, called ``<name>_q`` and ``<name>_qdq``."""
    name = name or value
    step = span / {U8: 255, S8: 255, U16: 65535, S16: 65535}[element]
    zero = {U8: 128, S8: 0, U16: 32768, S16: 0}[element]
    kind = {U8: np.uint8, S8: np.int8, U16: np.uint16, S16: np.int16}[element]
    s = net.const(f"{name}_s", np.array(step, np.float16 if f16 else np.float32))
    z = net.const(f"{name}_z", np.array(zero, kind))
    prefix = f"{domain}:" if domain else ""
    net.op(f"{prefix}QuantizeLinear", [value, s, z], f"{name}_qv", name=f"{name}_q")
    return net.op(f"{prefix}DequantizeLinear", [f"{name}_qv", s, z], f"{name}_dqv", name=f"{name}_qdq")


def finish(
    name: str,
    net: Net,
    expect: Callable[[dict[str, Array]], Array],
    *,
    blame: tuple[str, ...],
    shape: tuple[int | str, ...] = ("M", K),
    out: int = FLOAT,
    weights: int = K * N,
    element: Any = np.float32,
) -> Case:
    net.output("y", out)
    return Case(name, net.model(), [{"x": rows(shape, m, element)} for m in ROWS], expect, blame, weights)


def weight_only(
    name: str,
    element: int,
    how: str,
    *,
    op: str = "MatMul",
    opset: int = 21,
    bias: bool = False,
    batched: bool = False,
    act: int = FLOAT,
    relu: bool = False,
    left: bool = False,
    **config: Any,
) -> Case:
    """x @ dequantize(w), w as [K, N]; ``op``: MatMul, Gemm, or with w as [N, K] GemmT (transB) and TransposeMatMul."""
    net = Net(opset)
    shape: tuple[int | str, ...] = ("M", 2, K) if batched else ("M", K)
    if left:
        shape = (N, "M")
    x = net.input("x", shape, act)
    flipped = op in ("GemmT", "TransposeMatMul")
    config.setdefault("axis", {"block": 0, "channel": 1}.get(how, 0) ^ flipped)
    f, value = weight(net, element, how, shape=(N, K) if flipped else (K, N), f16=act == F16, **config)
    value = value.T if flipped else value
    beta = rng(13).standard_normal(N).astype(np.float16 if act == F16 else np.float32)
    if op == "TransposeMatMul":
        f = net.op("Transpose", [f], "w_t", name="transpose", perm=[1, 0])
    last = "h" if relu or (bias and op not in ("Gemm", "GemmT")) else "y"
    if op in ("Gemm", "GemmT"):
        ins = [x, f] + ([net.const("beta", beta)] if bias else [])
        net.op("Gemm", ins, last, name="mm", transB=int(op == "GemmT"))
    else:
        net.op("MatMul", [f, x] if left else [x, f], last, name="mm")
        if bias:
            net.op("Add", [last, net.const("beta", beta)], "y" if not relu else "h2", name="add")
            last = "y" if not relu else "h2"
    if relu:
        net.op("Relu", [last], "y", name="relu")

    def expect(feed: dict[str, Array]) -> Array:
        a = feed["x"].astype(np.float64)
        out = value @ a if left else a @ value + (beta.astype(np.float64) if bias else 0.0)
        return np.maximum(out, 0) if relu else out

    blame = ("w_dq", "mm", "transpose")
    return finish(
        name, net, expect, blame=blame, shape=shape, out=act, element=np.float16 if act == F16 else np.float32
    )


def cases() -> Iterator[Case]:
    for label, element in (("int4", INT4), ("uint4", UINT4)):
        for block in (16, 32, 64, 128):
            yield weight_only(f"wo-{label}-b{block}", element, "block", block=block)
        yield weight_only(f"wo-{label}-b32-zero", element, "block", zero=True)
        yield weight_only(f"wo-{label}-channel", element, "channel")
    yield weight_only("wo-int8-b32", S8, "block")
    yield weight_only("wo-uint8-b32", U8, "block")
    yield weight_only("wo-int2-b32", INT2, "block", opset=25)
    yield weight_only("wo-uint2-b32", UINT2, "block", opset=25)
    yield weight_only("wo-int2-b16", INT2, "block", block=16, opset=25)
    yield weight_only("wo-int4-b256", INT4, "block", block=256)
    yield weight_only("wo-int8-channel", S8, "channel")
    yield weight_only("wo-int8-channel-opset13", S8, "channel", opset=13)
    yield weight_only("wo-uint8-channel", U8, "channel")
    yield weight_only("wo-int2-channel", INT2, "channel", opset=25)
    yield weight_only("wo-int8-channel-ms", S8, "channel", domain="ms")
    yield weight_only("wo-int4-gemm-bias", INT4, "block", op="Gemm", bias=True)
    yield weight_only("wo-int4-gemm", INT4, "block", op="Gemm")
    yield weight_only("wo-int4-add", INT4, "block", bias=True)
    yield weight_only("wo-int4-batched", INT4, "block", batched=True)
    yield weight_only("wo-int4-batched-add", INT4, "block", batched=True, bias=True)
    yield weight_only("wo-int8-transpose", S8, "channel", op="TransposeMatMul")
    yield weight_only("wo-int4-b8", INT4, "block", block=8)
    yield weight_only("wo-int4-tensor", INT4, "tensor")
    yield weight_only("wo-int8-tensor", S8, "tensor")
    yield weight_only("wo-int8-tensor1", S8, "tensor1")
    yield weight_only("wo-int4-transpose", INT4, "block", op="TransposeMatMul")
    yield weight_only("wo-int4-transpose-channel", INT4, "channel", op="TransposeMatMul")
    yield weight_only("wo-int8-transpose-block", S8, "block", op="TransposeMatMul")
    yield weight_only("wo-int4-gemmT", INT4, "block", op="GemmT")
    yield weight_only("wo-int8-gemmT", S8, "channel", op="GemmT")
    yield weight_only("wo-int16", S16, "channel")
    yield weight_only("wo-int4-left", INT4, "block", left=True)
    yield weight_only("wo-int4-scale-overridable", INT4, "block", as_input="scale")
    yield weight_only("wo-int4-codes-overridable", INT4, "block", as_input="codes")
    yield weight_only("wo-int4-f16", INT4, "block", act=F16)
    yield weight_only("wo-int8-f16", S8, "channel", act=F16)
    yield weight_only("wo-int4-relu", INT4, "block", relu=True)
    yield weight_only("wo-int4-add-relu", INT4, "block", relu=True, bias=True)
    yield weight_only("wo-int4-gemm-relu", INT4, "block", op="Gemm", relu=True)
