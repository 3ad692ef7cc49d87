"""Which of ONNX Runtime's nodes computes a W8A8 linear layer fastest: what the ranks of the integer rows rest on.

    python benchmarks/integer_linear.py --seconds 0.3 --json benchmarks/results/integer_linear.json

Nodes of one shape take turns; the fastest call of each counts (microseconds), since what disturbs a call only adds.
``dyn3``: three layers that read one float activation. ``codes``: the result is quantized. Random data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from circumstances import circumstances
from onnx import NodeProto, TensorProto, helper, numpy_helper

MS = "com.microsoft"
SHAPES = ((768, 768), (768, 3072), (2048, 2048))
ROWS = (1, 16, 128)
F, U8, S8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> NodeProto:
    domain = "" if op in ("DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul", "Reshape") else MS
    return helper.make_node(op, list(inputs), list(outputs), domain=domain, **attrs)


def session(
    nodes: Sequence[NodeProto],
    x: tuple[str, int, Sequence[Any]],
    outputs: Mapping[str, int],
    constants: Mapping[str, Any],
    threads: int,
) -> ort.InferenceSession:
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    used = {i for n in nodes for i in n.input}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    graph = helper.make_graph(list(nodes), "g", [helper.make_tensor_value_info(*x)], results, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def candidates(k: int, n: int, m: int, threads: int) -> dict[str, tuple[ort.InferenceSession, dict[str, Any]]]:
    """Name -> session and feed."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.integers(-127, 128, (k, n)).astype(np.int8) for i in range(3)}
    f = np.float32
    c: dict[str, Any] = {
        **weights,
        "wu": weights["w0"].view(np.uint8) ^ np.uint8(0x80),
        "s": f(0.01),
        "z": np.uint8(120),
        "zs": np.int8(3),
        "ws": np.full(n, 0.01, f),
        "wz": np.zeros(n, np.int8),
        "wuz": np.uint8(128),
        "bias": np.ones(n, f),
        "bias32": np.ones(n, np.int32),
        "ys": f(1),
        "yz": np.uint8(128),
        "flat": np.array([-1, k], np.int64),
        "deep": np.array([1, -1, n], np.int64),
    }
    x = rng.standard_normal((m, k)).astype(f)
    q = rng.integers(0, 256, (m, k)).astype(np.uint8)
    floats, codes = ("x", F, ["m", k]), ("q", U8, ["m", k])
    out: dict[str, tuple[ort.InferenceSession, dict[str, Any]]] = {}

    def add(name: str, nodes: Sequence[NodeProto], source: Any, outputs: Mapping[str, int], value: Any) -> None:
        out[name] = (session(nodes, source, outputs, c, threads), {source[0]: value})

    for count in (1, 3):
        results = {f"y{i}": F for i in range(count)}
        each = [node("DynamicQuantizeMatMul", ["x", f"w{i}", "ws", "", "bias"], [f"y{i}"]) for i in range(count)]
        add(f"dyn{count} DynamicQuantizeMatMul each", each, floats, results, x)
        shared = [node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"])]
        shared += [
            node("MatMulIntegerToFloat", ["q", f"w{i}", "qs", "ws", "qz", "", "bias"], [f"y{i}"]) for i in range(count)
        ]
        add(f"dyn{count} DynamicQuantizeLinear, MatMulIntegerToFloat each", shared, floats, results, x)
    to_float = {
        "u8s8": (["q", "w0", "s", "ws", "z", "", "bias"], codes, q),
        "u8u8": (["q", "wu", "s", "ws", "z", "wuz", "bias"], codes, q),
        "s8s8": (["q", "w0", "s", "ws", "zs", "", "bias"], ("q", S8, ["m", k]), (q ^ np.uint8(0x80)).view(np.int8)),
    }
    for name, (inputs, source, value) in to_float.items():
        add(
            f"float {name} MatMulIntegerToFloat", [node("MatMulIntegerToFloat", inputs, ["y"])], source, {"y": F}, value
        )
    requantized = [
        node("MatMulIntegerToFloat", to_float["u8s8"][0], ["f"]),
        node("QuantizeLinear", ["f", "ys", "yz"], ["y"]),
    ]
    gemm = ["q", "s", "z", "w0", "ws", "wz", "bias32", "ys", "yz"]
    add("codes MatMulIntegerToFloat, QuantizeLinear", requantized, codes, {"y": U8}, q)
    add("codes QGemm", [node("QGemm", gemm, ["y"])], codes, {"y": U8}, q)
    plain = [node("QLinearMatMul", ["q", "s", "z", "w0", "ws", "wz", "ys", "yz"], ["y"])]
    add("codes QLinearMatMul, no bias", plain, codes, {"y": U8}, q)
    deep = ("q", U8, ["b", "m", k])
    add("codes 3-D MatMulIntegerToFloat, QuantizeLinear", requantized, deep, {"y": U8}, q[None])
    around = [
        node("Reshape", ["q", "flat"], ["q2"]),
        node("QGemm", ["q2", *gemm[1:]], ["y2"]),
        node("Reshape", ["y2", "deep"], ["y"]),
    ]
    add("codes 3-D Reshape, QGemm, Reshape", around, deep, {"y": U8}, q[None])
    return out


def measured(
    found: Mapping[str, tuple[ort.InferenceSession, dict[str, Any]]], seconds: float
) -> dict[str, dict[str, float]]:
    """Fastest and median call of each, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for s, feed in found.values():
        s.run(None, feed)
    end = time.perf_counter() + seconds * len(found)
    while time.perf_counter() < end:
        for name, (s, feed) in found.items():
            begin = time.perf_counter()
            s.run(None, feed)
            times[name].append(time.perf_counter() - begin)
    return {
        name: {"fastest_us": round(min(t) * 1e6, 1), "median_us": round(float(np.median(t)) * 1e6, 1), "calls": len(t)}
        for name, t in times.items()
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=0.3, help="for each node of each shape")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    runs = []
    for k, n in SHAPES:
        for m in ROWS:
            runs.append({"k": k, "n": n, "m": m, "nodes": measured(candidates(k, n, m, a.threads), a.seconds)})
            best = ", ".join(f"{name} {t['fastest_us']:.0f}" for name, t in runs[-1]["nodes"].items())  # type: ignore[attr-defined]
            print(f"K={k} N={n} M={m}: {best}", flush=True)
    found = circumstances("benchmarks/integer_linear.py", "onnxruntime", threads=a.threads, seconds=a.seconds)
    found["runs"] = runs
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
