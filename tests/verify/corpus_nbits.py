"""Graphs around ``com.microsoft.MatMulNBits``: every configuration that the CPU kernel treats differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.verify.build import ROWS, Array, Case, NBits, Net, bf16, rng, rows

FLOAT, F16, BF16, U8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.UINT8
BLAME = ("site",)


def nbits(
    name: str,
    *,
    acc: int | None = 4,
    zeros: str = "none",
    scales: str = "const",
    codes: str = "const",
    act: int = FLOAT,
    bias: bool = False,
    g_idx: bool = False,
    rank2: bool = False,
    flat_scales: bool = False,
    batched: bool = False,
    attrs: dict[str, Any] | None = None,
    bits: int = 4,
    bs: int = 64,
    n: int = 128,
    k: int = 256,
    opset: int = 21,
) -> Case:
    """One MatMulNBits called ``site``. ``scales``, ``codes``: const, input, default; ``zeros`` also packed or float."""
    w = NBits(n, k, bits, bs, asym=zeros != "none")
    net, extra = Net(opset), dict[str, Array]()
    shape: tuple[int | str, ...] = ("M", 2, k) if batched else ("M", k)
    x = net.input("x", shape, act)
    if g_idx:
        w.scales = np.repeat(w.scales[:, :1], w.scales.shape[1], axis=1)
    f16 = np.float16 if act == F16 else np.float32
    scale_values: Array = w.scales.astype(f16) if act != BF16 else bf16(w.scales)
    given = {"b": w.packed(), "s": scale_values, "z": w.packed_zeros()}
    if rank2:
        given["b"] = given["b"].reshape(n, -1)
    if flat_scales:
        given["s"] = given["s"].reshape(-1)
    if zeros == "float":
        given["z"] = w.zeros.astype(f16)
    for key, how in (("b", codes), ("s", scales), ("z", "input" if zeros == "input" else "const")):
        if key == "z" and zeros == "none":
            continue
        element = helper.np_dtype_to_tensor_dtype(given[key].dtype)
        if how in ("input", "default"):
            net.input(key, given[key].shape, element)
        if how in ("const", "default"):
            net.const(key, given[key])
        if how == "input":
            extra[key] = given[key]
    ins = [x, "b", "s", "z" if zeros != "none" else "", "", ""]
    if g_idx:
        ins[4] = net.const("g", (np.arange(k) // bs).astype(np.int32))
    beta = rng(3).standard_normal(n).astype(f16) if bias else np.zeros(n)
    if bias:
        ins[5] = net.const("bias", beta)
    while ins[-1] == "":
        ins.pop()
    more = {} if acc is None else {"accuracy_level": acc}
    net.op("ms:MatMulNBits", ins, "y", name="site", K=k, N=n, bits=bits, block_size=bs, **more, **(attrs or {}))
    net.output("y", act, [*shape[:-1], n])
    element = {F16: np.float16, FLOAT: np.float32}.get(act, np.float32)

    def feed(m: int) -> dict[str, Array]:
        a = rows(shape, m, element)
        return {"x": bf16(a) if act == BF16 else a, **extra}

    value = w.value(scale_values.astype(np.float64))
    return Case(
        name,
        net.model(),
        [feed(m) for m in ROWS],
        lambda f: f["x"].astype(np.float64) @ value.T + beta.astype(np.float64),
        BLAME,
        n * k,
    )


def wrapped(name: str, how: str, **config: Any) -> Case:
    """The same node inside an If branch or a model-local function; its name stays ``site``."""
    case = nbits(name, **config)
    graph = case.model.graph
    node = graph.node[0]
    if how == "if":
        branches = [
            helper.make_graph([node], b, [], [helper.make_tensor_value_info("y", FLOAT, None)])
            for b in ("then_branch", "else_branch")
        ]
        branches[1].node[0].name = "other"
        branches[1].node[0].output[0] = "y2"
        branches[1].output[0].name = "y2"
        outer = helper.make_node("If", ["flag"], ["out"], name="if", then_branch=branches[0], else_branch=branches[1])
        graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
        case.feeds = [{**f, "flag": np.array(True)} for f in case.feeds]
        case.blame = ("site", "other")
    else:
        opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 21)]
        body = helper.make_function("local", "Fused", list(node.input), ["y"], [node], opsets)
        case.model.functions.append(body)
        case.model.opset_import.append(helper.make_opsetid("local", 1))
        outer = helper.make_node("Fused", list(node.input), ["out"], name="call", domain="local")
    del graph.node[:]
    graph.node.append(outer)
    graph.output[0].name = "out"
    return case


def grid() -> Iterator[Case]:
    for bits in (2, 4, 8):
        for bs in (16, 32, 64, 128, 256):
            for acc in (0, 4):
                yield nbits(f"nbits{bits}-g{bs}-acc{acc}", bits=bits, bs=bs, acc=acc, k=512)


def cases() -> Iterator[Case]:
    yield from grid()
    for bits in (2, 4, 8):
        yield nbits(f"nbits{bits}-default-acc", bits=bits, acc=None)
        yield nbits(f"nbits{bits}-zp", bits=bits, zeros="packed")
        yield nbits(f"nbits{bits}-zp-float", bits=bits, zeros="float")
        yield nbits(f"nbits{bits}-zp-input", bits=bits, zeros="input")
        yield nbits(f"nbits{bits}-bias", bits=bits, bias=True)
        yield nbits(f"nbits{bits}-f16", bits=bits, act=F16)
        yield nbits(f"nbits{bits}-g_idx", bits=bits, g_idx=True)
        yield nbits(f"nbits{bits}-codes-input", bits=bits, codes="input")
        yield nbits(f"nbits{bits}-codes-overridable", bits=bits, codes="default")
        yield nbits(f"nbits{bits}-scales-input", bits=bits, scales="input")
        yield nbits(f"nbits{bits}-scales-overridable", bits=bits, scales="default")
    yield nbits("nbits4-scales-input-acc0", scales="input", acc=0)
    yield nbits("nbits4-zp-input-acc0", zeros="input", acc=0)
    yield nbits("nbits4-f16-acc0", act=F16, acc=0)
    yield nbits("nbits4-f16-zp-float", act=F16, zeros="float")
    for acc in (1, 2, 3):
        yield nbits(f"nbits4-acc{acc}", acc=acc)
        yield nbits(f"nbits8-acc{acc}", bits=8, acc=acc)
    yield nbits("nbits4-g_idx-acc0", g_idx=True, acc=0)
    yield nbits("nbits2-g_idx-acc0", g_idx=True, bits=2, acc=0)
    for bits in (3, 5, 6, 7):
        yield odd_bits(bits)
    yield nbits("nbits4-g8", bs=8)
    yield nbits("nbits4-g512", bs=512, k=512)
    yield nbits("nbits4-bf16", act=BF16)
    yield nbits("nbits4-rank2", rank2=True)
    yield nbits("nbits4-flat-scales", flat_scales=True)
    yield nbits("nbits4-k100", bs=32, k=100)
    yield nbits("nbits8-k20", bs=32, k=20, bits=8)
    yield nbits("nbits4-n1", n=1)
    yield nbits("nbits4-n17", n=17)
    yield nbits("nbits4-batched", batched=True)
    yield wrapped("nbits4-in-if", "if")
    yield wrapped("nbits8-acc0-in-if", "if", bits=8, acc=0)
    yield wrapped("nbits4-in-function", "function")
    yield wrapped("nbits8-acc0-in-function", "function", bits=8, acc=0)


def odd_bits(bits: int) -> Case:
    """A width that the schema admits and no kernel has; the bytes are never read."""
    case = nbits(f"nbits{bits}", bits=4, k=256, bs=32)
    node = case.model.graph.node[0]
    for a in node.attribute:
        if a.name == "bits":
            a.i = bits
    blob = np.zeros((128, 8, 32 * bits // 8), np.uint8)
    case.model.graph.initializer[0].CopyFrom(helper.make_tensor("b", U8, blob.shape, blob.tobytes(), raw=True))
    return case
