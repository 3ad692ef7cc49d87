"""Passes scale: time of the w4a16 recipe's graph work (no weight is read) on graphs of 2k, 8k and 32k nodes.

    python benchmarks/pass_scaling.py --json benchmarks/results/pass_scaling.json

Each node count is timed ``--runs`` times in turn; the ratio is time per node against the smallest graph's. Linear
growth is a ratio near 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

from qcompiler import recipe
from qcompiler.backends import backend_of
from qcompiler.dtypes import F32, INT64
from qcompiler.ir import Graph, TensorType, Value
from qcompiler.payload import RandomPayload, constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.text import show

HIDDEN = 64


def block(g: Graph, x: Value, number: int) -> Value:
    """A gated feed-forward block with what surrounds it: 16 nodes, 3 of them linear layers."""

    def op(name: str, *operands: Value, **attrs: object) -> Value:
        return g.create(f"onnx.{name}", operands, attrs, [(g.fresh(f"b{number}.{name}"), x.type)]).result

    def linear(v: Value, what: str) -> Value:
        w = g.add_const(f"blocks.{number}.{what}.weight", RandomPayload(number, F32, (HIDDEN, HIDDEN)))
        return op("MatMul", v, w)

    two = g.local("two") or g.add_const("two", constant([2.0], F32))
    norm = op("Div", x, op("Sqrt", op("ReduceMean", op("Pow", x, two))))
    gate = linear(norm, "gate")
    up = linear(op("Identity", norm), "up")
    silu = op("Mul", gate, op("Sigmoid", gate))
    down = linear(op("Mul", silu, up), "down")
    out = op("Add", x, down)
    return op("Identity", op("Transpose", op("Transpose", out, perm=(0, 1)), perm=(0, 1)))


def build(nodes: int) -> Graph:
    """A graph of about ``nodes`` nodes: an embedding, then blocks."""
    g = Graph()
    ids = g.add_input("ids", TensorType(INT64, ("n",)))
    table = g.add_const("embed.weight", RandomPayload(0, F32, (100, HIDDEN)))
    x = g.create("onnx.Gather", [table, ids], {}, [("h", TensorType(F32, ("n", HIDDEN)))]).result
    number = 0
    while len(g) < nodes:
        x = block(g, x, number)
        number += 1
    g.add_output(x)
    return g


def measure(nodes: int) -> dict[str, float]:
    """Seconds of each pass, and of printing and reading the graph, for one freshly built graph."""
    graph = build(nodes)
    ctx = Context(backend_of("ort-cpu").target("ort-cpu:avx2"))
    begin = time.perf_counter()
    run(graph, recipe.load("w4a16").passes, ctx)
    total = time.perf_counter() - begin
    begin = time.perf_counter()
    text = show(graph, digests=False)
    parse(text)
    assert all(s.status == "fused" for s in ctx.ledger), "a site was not fused: the benchmark would measure nothing"
    return {"nodes": len(graph), "passes": total, "text": time.perf_counter() - begin, **ctx.passes_s}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--nodes", type=int, nargs="+", default=[2000, 8000, 32000])
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    rows: dict[int, list[dict[str, float]]] = {n: [] for n in a.nodes}
    for _ in range(a.runs):
        for n in a.nodes:
            rows[n].append(measure(n))
    found = []
    for n, runs in rows.items():
        median = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        found.append({"asked": n, **median, "us_per_node": 1e6 * median["passes"] / n})
    for row in found:
        row["ratio"] = row["us_per_node"] / found[0]["us_per_node"]
        print(f"{row['asked']:>6} nodes: passes {row['passes']:.2f} s, text {row['text']:.2f} s, "
              f"{row['us_per_node']:.0f} us a node, ratio {row['ratio']:.2f}")  # fmt: skip
    if a.json is not None:
        command = "python benchmarks/pass_scaling.py"
        a.json.write_text(
            json.dumps({"command": command, "python": platform.python_version(), "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
