"""What the runtime itself does with a graph, measured without the product: the yardstick of every verdict.

A graph is *bad* when it does not load or run, when its numbers are off, when a node's temporary memory holds the whole
expanded weight, or when a float operation runs on a dequantized tensor.
"""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.verify.build import Case

TOLERANCE = 0.05
"""Share of the largest output. int8 activations cost under 0.01 and one step of an 8-bit output 0.02; the wrong answers
of this runtime are off by 0.1 to 1."""
FLOAT_HEAVY = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "Gather", "Einsum"}
)


@dataclass
class Seen:
    """What the runtime did. ``bad`` lists why the graph must be refused; empty when it runs fused."""

    bad: list[str] = field(default_factory=list)
    ops: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    temp: int = 0


def measure(cases: list[Case]) -> list[Seen]:
    """One child process for all of them; the arrays travel through a folder."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for i, case in enumerate(cases):
            onnx.save(case.model, f"{folder}/{i}.onnx")
            jobs.append({"feeds": case.feeds})
        Path(folder, "jobs.pkl").write_bytes(pickle.dumps(jobs))
        subprocess.run([sys.executable, "-m", "tests.verify.measure", folder], check=True, timeout=600)
        raw = pickle.loads(Path(folder, "out.pkl").read_bytes())
        return [
            _judge(case, r, Path(folder, f"{i}.opt.onnx")) for i, (case, r) in enumerate(zip(cases, raw, strict=True))
        ]


def _judge(case: Case, raw: dict[str, Any], optimized: Path) -> Seen:
    seen = Seen()
    if "error" in raw:
        seen.bad.append(f"does not run: {raw['error'][:160]}")
    if optimized.exists():
        model = onnx.load(optimized)
        nodes = list(_nodes(model.graph))
        seen.ops = dict(Counter(n.op_type for n in nodes))
        seen.bad += _float_on_dequantized(nodes, model)
        grown = _float_elements(model) - _float_elements(case.model)
        if case.weights and grown >= case.weights:
            seen.bad.append(f"{grown} float elements were folded into initializers")
    if "error" in raw:
        return seen
    seen.temp = max((m["temp"] for m in raw["memory"]), default=0)
    if case.weights and seen.temp >= 4 * case.weights:
        seen.bad.append(f"temporary memory {seen.temp} holds the weight of {4 * case.weights} bytes")
    if raw["unpacked"]:
        seen.bad.append(f"{raw['unpacked']} fallback lines")
    if case.expect is not None:
        for feed, out in zip(case.feeds, raw["outputs"], strict=True):
            want = case.expect(feed)
            off = np.abs(out.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30)
            seen.error = max(seen.error, float(off)) if np.isfinite(off) else float("inf")
    if seen.error > TOLERANCE:
        seen.bad.append(f"off by {seen.error:.3f} of the largest output")
    return seen


def _float_elements(model: Any) -> int:
    """Elements of float initializers of two dimensions or more."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in floats and len(t.dims) > 1)


def _nodes(graph: Any) -> Any:
    for node in graph.node:
        yield node
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(a.g)


MOVES = frozenset({"Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Concat", "Cast", "Flatten", "Split"})
INTEGER_KERNELS = frozenset(
    {
        "QLinearMatMul",
        "QLinearConv",
        "QGemm",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "MaxPool",
        "NhwcMaxPool",
    }
)


def _float_on_dequantized(nodes: list[Any], model: Any) -> list[str]:
    """Float operations that read a DequantizeLinear, directly or through data movement.

    Leaving integers for good is no fault: a dequantize of what an integer kernel made, which feeds no product and is
    not quantized again.
    """
    made = {o: n for n in nodes for o in n.output}
    readers: dict[str, list[Any]] = {}
    for n in nodes:
        for i in n.input:
            readers.setdefault(i, []).append(n)
    out = []
    for n in nodes:
        if n.op_type != "DequantizeLinear":
            continue
        source = made.get(n.input[0])
        while source is not None and source.op_type in MOVES:  # a Gather picks rows: what is expanded is small
            source = made.get(source.input[0])
        reached, work = [], [n]
        while work:
            for r in readers.get(work.pop().output[0], []):
                reached.append(r)
                if r.op_type in MOVES:
                    work.append(r)
        computes = [r for r in reached if r.op_type not in MOVES]
        exits = source is not None and source.op_type in INTEGER_KERNELS | {"Gather"}
        again = any(q.op_type == "QuantizeLinear" for c in computes for o in c.output for q in readers.get(o, []))
        again |= any(c.op_type == "QuantizeLinear" for c in computes)
        heavy = any(c.op_type in FLOAT_HEAVY | {"MatMulNBits"} for c in computes)
        if computes and (heavy or again or not exits):
            out.append(f"{n.name} feeds {sorted({c.op_type for c in computes})}")
        if not computes and any(r.op_type in MOVES for r in reached) and not exits:
            out.append(f"{n.name} feeds nothing but data movement")
    return out


def _open(path: str, folder: str, feeds: list[dict[str, Any]]) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 1
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = path.replace(".onnx", ".opt.onnx")
    memory = Path(folder, "memory.csv")
    memory.unlink(missing_ok=True)
    options.add_session_config_entry("session.collect_node_memory_stats_to_file", str(memory))
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
    kept = os.dup(2)
    os.dup2(log.fileno(), 2)
    out: dict[str, Any] = {"outputs": [], "memory": []}
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        out["outputs"] = [session.run(None, feeds[0])[0]]  # one row: copies of the activation stay small
        del session
        options.add_session_config_entry("session.collect_node_memory_stats_to_file", "")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        out["outputs"] += [session.run(None, f)[0] for f in feeds[1:]]
    except Exception as e:
        out["error"] = str(e)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    log.seek(0)
    out["unpacked"] = log.read().decode(errors="replace").count("Falling back to using unpacked compute mode")
    if memory.exists():
        for row in csv.DictReader(memory.read_text().splitlines()):
            out["memory"].append({"node": row["#name"], "temp": int(row["total_temp_allocations"])})
    return out


def main(folder: str) -> None:
    jobs = pickle.loads(Path(folder, "jobs.pkl").read_bytes())
    out = [_open(f"{folder}/{i}.onnx", folder, job["feeds"]) for i, job in enumerate(jobs)]
    Path(folder, "out.pkl").write_bytes(pickle.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
