"""Graphs with quantized activations: static and dynamic W8A8, convolutions, element-wise operations, KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.verify.build import ROWS, Array, Case, Net, rng, rows
from tests.verify.corpus_qdq import (
    F16,
    FLOAT,
    INT4,
    S8,
    S16,
    U8,
    U16,
    K,
    N,
    activation,
    codes_of,
    finish,
    weight,
)

SPAN = 8.0


def fake(x: Array, element: int = U8, span: float = SPAN) -> Array:
    """QuantizeLinear and DequantizeLinear of :func:`activation` in float64."""
    step = np.float64(np.float32(span / {U8: 255, S8: 255, U16: 65535, S16: 65535}[element]))
    low, high = {U8: (-128, 127), S8: (-128, 127), U16: (-32768, 32767), S16: (-32768, 32767)}[element]
    return np.clip(np.round(x.astype(np.float64) / step), low, high) * step


def static(
    name: str,
    *,
    act: int = U8,
    wt: int = S8,
    how: str = "channel",
    out_q: bool = False,
    op: str = "MatMul",
    bias: str = "",
    batched: bool = False,
    relu: bool = False,
    opset: int = 21,
    domain: str = "",
    f16: bool = False,
    twice: bool = False,
    **config: Any,
) -> Case:
    """Q/DQ of x, DQ of a weight, MatMul or Gemm (GemmT: transB), perhaps bias, Relu and an output Q/DQ."""
    net = Net(opset)
    shape: tuple[int | str, ...] = ("M", 2, K) if batched else ("M", K)
    x = net.input("x", shape, F16 if f16 else FLOAT)
    a = activation(net, x, act, domain=domain, f16=f16, span=SPAN)
    flipped = op == "GemmT"
    config.setdefault("axis", {"block": 0, "channel": 1}.get(how, 0) ^ flipped)
    f, value = weight(net, wt, how, shape=(N, K) if flipped else (K, N), domain=domain, f16=f16, **config)
    value = value.T if flipped else value
    beta = np.zeros(N)
    ins = [a, f]
    if bias:
        beta = rng(13).standard_normal(N)
        if bias == "int32":
            step = SPAN / 255 * 0.01
            whole = np.round(beta / step).astype(np.int32)
            s = net.const("beta_s", np.array(step, np.float32))
            b = net.op("DequantizeLinear", [net.const("beta", whole), s], "beta_f", name="beta_dq")
            beta = whole * np.float64(np.float32(step))
        else:
            b = net.const("beta", beta.astype(np.float16 if f16 else np.float32))
    last = net.op(
        "Gemm" if op != "MatMul" else "MatMul",
        ins + ([b] if bias and op != "MatMul" else []),
        "h",
        name="mm",
        **({"transB": int(flipped)} if op != "MatMul" else {}),
    )
    if bias and op == "MatMul":
        last = net.op("Add", [last, b], "h2", name="add")
    if relu:
        last = net.op("Relu", [last], "h3", name="relu")
    span = 0.0
    if out_q:
        span = 256.0
        last = activation(net, last, act, name="o", domain=domain, f16=f16, span=span)
    if twice:
        g, other = weight(net, wt, how, name="ww", axis=config["axis"])
        second = net.op("MatMul", [a, g], "g", name="mm2")
        last = net.op("Concat", [last, second], "both", name="concat", axis=-1)
    net.op("Identity", [last], "y", name="out")

    def expect(feed: dict[str, Array]) -> Array:
        y = fake(feed["x"], act) @ value + beta
        y = np.maximum(y, 0) if relu else y
        y = fake(y, act, span) if out_q else y
        return np.concatenate([y, fake(feed["x"], act) @ other], -1) if twice else y

    blame = ("mm", "w_dq", "x_qdq", "x_q", "o_q", "o_qdq", "add", "relu", "mm2", "ww_dq")
    return finish(
        name,
        net,
        expect,
        blame=blame,
        shape=shape,
        out=F16 if f16 else FLOAT,
        element=np.float16 if f16 else np.float32,
    )


def dynamic(
    name: str,
    *,
    spelled: str = "integer",
    wt: int = S8,
    how: str = "channel",
    bias: bool = False,
    batched: bool = False,
    order: str = "product",
    opset: int = 21,
) -> Case:
    """DynamicQuantizeLinear, then MatMulInteger + Cast + Mul (``integer``) or DQ + MatMul (``qdq``)."""
    net = Net(opset)
    shape: tuple[int | str, ...] = ("M", 2, K) if batched else ("M", K)
    x = net.input("x", shape)
    net.op("DynamicQuantizeLinear", [x], "xq xs xz", name="x_q")
    if spelled == "qdq":
        a = net.op("DequantizeLinear", ["xq", "xs", "xz"], "xf", name="x_dq")
        f, value = weight(net, wt, how, axis={"block": 0}.get(how, 1))
        last = net.op("MatMul", [a, f], "h", name="mm")
    else:
        codes = codes_of(wt, (K, N), seed=1)
        scales = np.asarray((0.5 + rng(12).random(() if how == "tensor" else (N,))) / 127, np.float32)
        middle = 128 if wt == U8 else 0
        ins = ["xq", net.const("w", codes, wt), "xz", net.const("w_zero", np.array(middle, codes.dtype))]
        net.op("MatMulInteger", ins, "hi", name="mm")
        net.op("Cast", ["hi"], "hf", name="cast", to=FLOAT)
        ws = net.const("w_scale", scales)
        if order == "product":
            net.op("Mul", ["xs", ws], "ss", name="scales")
            last = net.op("Mul", ["hf", "ss"], "h", name="scale")
        else:
            net.op("Mul", ["hf", "xs"], "h1", name="scale1")
            last = net.op("Mul", ["h1", ws], "h", name="scale")
        value = (codes.astype(np.float64) - middle) * scales
    beta = rng(13).standard_normal(N).astype(np.float32) if bias else np.zeros(N)
    if bias:
        last = net.op("Add", [last, net.const("beta", beta)], "hb", name="add")
    net.op("Identity", [last], "y", name="out")
    blame = ("mm", "w_dq", "x_dq", "x_q", "cast", "scale", "scale1", "add")
    return finish(name, net, lambda f: f["x"].astype(np.float64) @ value + beta, blame=blame, shape=shape)


def conv(
    name: str,
    *,
    dims: int = 2,
    act: int = U8,
    wt: int = S8,
    how: str = "channel",
    out_q: bool = True,
    bias: str = "",
    relu: bool = False,
    depthwise: bool = False,
    f16: bool = False,
) -> Case:
    """Q/DQ, DQ of the filter, Conv of kernel 1, perhaps bias and Relu, Q/DQ."""
    net = Net()
    cin, cout = 16, 16 if depthwise else 32
    shape: tuple[int | str, ...] = ("M", cin, *([5] * dims))
    x = net.input("x", shape, F16 if f16 else FLOAT)
    a = activation(net, x, act, f16=f16, span=SPAN)
    filters = (cout, 1 if depthwise else cin, *([1] * dims))
    f, value = weight(net, wt, how, shape=filters, axis=0, f16=f16)
    ins = [a, f]
    beta = rng(13).standard_normal(cout)
    if bias == "int32":
        step = np.float32(SPAN / 255 * 0.01)
        whole = np.round(beta / step).astype(np.int32)
        s = net.const("beta_s", np.array(step))
        ins.append(net.op("DequantizeLinear", [net.const("beta", whole), s], "beta_f", name="beta_dq"))
        beta = whole * np.float64(step)
    elif bias:
        ins.append(net.const("beta", beta.astype(np.float16 if f16 else np.float32)))
    last = net.op("Conv", ins, "h", name="conv", group=cin if depthwise else 1)
    if relu:
        last = net.op("Relu", [last], "h2", name="relu")
    if out_q:
        last = activation(net, last, act, name="o", f16=f16, span=32.0)
    net.op("Identity", [last], "y", name="out")

    def expect(feed: dict[str, Array]) -> Array:
        v = value.reshape(cout, -1)
        xs = fake(feed["x"], act)
        y = np.einsum("mc...,c->mc...", xs, v[:, 0]) if depthwise else np.einsum("mc...,oc->mo...", xs, v)
        y = y + (beta if bias else np.zeros(cout)).reshape(-1, *([1] * dims))
        y = np.maximum(y, 0) if relu else y
        return fake(y, act, 32.0) if out_q else y

    blame = ("conv", "w_dq", "x_qdq", "x_q", "o_q", "o_qdq", "relu")
    # a convolution's scratch grows with the image and says nothing about its weight, so none is looked for (weights=0)
    return finish(
        name,
        net,
        expect,
        blame=blame,
        shape=shape,
        out=F16 if f16 else FLOAT,
        weights=0,
        element=np.float16 if f16 else np.float32,
    )


def elementwise(
    name: str,
    op: str,
    *,
    inputs: int = 1,
    out_q: bool = True,
    in_q: bool = True,
    act: int = U8,
    out_span: float = SPAN,
    opset: int = 21,
    **attrs: Any,
) -> Case:
    """Q/DQ, a float operation without weights, Q/DQ. Only its structure is judged: what it computes is not compared."""
    net = Net(opset)
    x = net.input("x", ("M", 8, 6, 6))
    values = [activation(net, x, act, name=f"x{i}", span=SPAN) if in_q else x for i in range(inputs)]
    if op == "Reshape":
        values.append(net.const("to", np.array([0, -1])))
    if op == "Transpose":
        attrs["perm"] = [0, 2, 3, 1]
    last = net.op(op, values, "h", name="op", **attrs)
    if out_q:
        last = activation(net, last, act, name="o", span=out_span)
    net.op("Identity", [last], "y", name="out")
    net.output("y")
    blame = ("op", "x0_q", "x0_qdq", "x1_qdq", "x1_q", "o_q", "o_qdq")
    return Case(name, net.model(), [{"x": rows(("M", 8, 6, 6), m)} for m in ROWS], None, blame)


def matmuls() -> Iterator[Case]:
    for act in (U8, S8):
        for wt in (U8, S8):
            for how in ("tensor", "channel"):
                for out_q in (False, True):
                    label = f"{'u8' if act == U8 else 's8'}{'u8' if wt == U8 else 's8'}-{how}{'-q' if out_q else ''}"
                    yield static(f"w8a8-{label}", act=act, wt=wt, how=how, out_q=out_q)
    yield static("w8a8-asym", wt=U8, zero=True, out_q=True)
    yield static("w8a8-batched", batched=True)
    yield static("w8a8-gemm", op="Gemm")
    yield static("w8a8-gemmT", op="GemmT")
    yield static("w8a8-gemmT-q", op="GemmT", out_q=True)
    yield static("w8a8-gemm-int32-bias", op="Gemm", bias="int32")
    yield static("w8a8-gemm-float-bias-q", op="Gemm", bias="float", out_q=True)
    yield static("w8a8-add-float-bias-q", bias="float", out_q=True)
    yield static("w8a8-gemm-float-bias", op="Gemm", bias="float")
    yield static("w8a8-add-float-bias", bias="float")
    yield static("w8a8-add-float-bias-batched", bias="float", batched=True)
    yield static("w8a8-relu-q", relu=True, out_q=True)
    yield static("w8a8-add-relu-q", relu=True, bias="float", out_q=True)
    yield static("w8a8-relu-q-s8", relu=True, out_q=True, act=S8)
    yield static("w8a8-gemm-relu-q-s8", relu=True, out_q=True, act=S8, op="Gemm", bias="float")
    yield static("w8a8-ms-domain", domain="ms", out_q=True)
    yield static("w8a8-opset13", opset=13, out_q=True)
    yield static("w8a8-opset25", opset=25)
    yield static("w8a8-u16", act=U16, wt=S8)
    yield static("w8a8-s16", act=S16, wt=S16, out_q=True)
    yield static("w8a8-f16", f16=True)
    yield static("w8a8-f16-q", f16=True, out_q=True)
    yield static("w8a8-block", how="block")
    yield static("w8a8-block-q", how="block", out_q=True)
    yield static("w8a8-block-zero", how="block", zero=True, wt=U8)
    yield static("w4a8-block", how="block", wt=INT4)
    yield static("w4a8-channel", how="channel", wt=INT4)
    yield static("w4a8-channel-q", how="channel", wt=INT4, out_q=True)
    yield static("w8a8-u8-two-readers", twice=True)
    yield static("w8a8-s8-two-readers", twice=True, act=S8)


def dynamics() -> Iterator[Case]:
    for wt, label in ((S8, "s8"), (U8, "u8")):
        for how in ("tensor", "channel"):
            yield dynamic(f"dyn-{label}-{how}", wt=wt, how=how)
    yield dynamic("dyn-bias", bias=True)
    yield dynamic("dyn-batched-bias", bias=True, batched=True)
    yield dynamic("dyn-muls-in-sequence", order="sequence")
    yield dynamic("dyn-qdq", spelled="qdq")
    yield dynamic("dyn-qdq-batched", spelled="qdq", batched=True)
    yield dynamic("dyn-qdq-bias", spelled="qdq", bias=True)
    yield dynamic("dyn-qdq-bias-batched", spelled="qdq", bias=True, batched=True)
    yield dynamic("dyn-qdq-block", spelled="qdq", how="block")


def convs() -> Iterator[Case]:
    for dims in (1, 2, 3):
        yield conv(f"conv{dims}d", dims=dims)
    yield conv("conv-s8", act=S8)
    yield conv("conv-u8-weight", wt=U8, how="tensor")
    yield conv("conv-depthwise", depthwise=True)
    yield conv("conv-int32-bias", bias="int32")
    yield conv("conv-float-bias", bias="float")
    yield conv("conv-relu", relu=True)
    yield conv("conv-relu-s8", relu=True, act=S8)
    yield conv("conv-no-output-q", out_q=False)
    yield conv("conv-no-output-q-bias", out_q=False, bias="int32")
    yield conv("conv-u16", act=U16)
    yield conv("conv-f16", f16=True)


def elementwises() -> Iterator[Case]:
    for op in ("Sigmoid", "LeakyRelu", "Softmax", "GlobalAveragePool"):
        yield elementwise(f"ew-{op}", op)
    yield elementwise("ew-AveragePool", "AveragePool", kernel_shape=[2, 2])
    yield elementwise("ew-MaxPool", "MaxPool", kernel_shape=[2, 2])
    for op in ("Add", "Mul"):
        yield elementwise(f"ew-{op}", op, inputs=2)
    yield elementwise("ew-Concat", "Concat", inputs=2, axis=1)
    for op in ("Sub", "Div"):
        yield elementwise(f"ew-{op}", op, inputs=2)
    for op in ("Tanh", "Erf", "Sqrt", "Abs", "ReduceMean", "Relu", "Gelu"):
        yield elementwise(f"ew-{op}", op)
    yield elementwise("ew-Softmax-no-output-q", "Softmax", out_q=False)
    yield elementwise("ew-Add-u16", "Add", inputs=2, act=U16)
    yield elementwise("ew-Transpose", "Transpose")
    yield elementwise("ew-Transpose-other-scale", "Transpose", out_span=5.0)
    yield elementwise("ew-Reshape-other-scale", "Reshape", out_span=5.0)
    yield elementwise("ew-MaxPool-other-scale", "MaxPool", out_span=5.0, kernel_shape=[2, 2])
    yield elementwise("ew-pair-left", "Identity")
    yield elementwise("ew-Tanh-exit", "Tanh", out_q=False)


def cases() -> Iterator[Case]:
    yield from matmuls()
    yield from dynamics()
    yield from convs()
    yield from elementwises()
