"""Time to capture and write ONNX graphs of many nodes: ``python benchmarks/onnx_capture.py``.

A chain of MatMuls, with and without ``If`` nodes; processor seconds of :func:`load_onnx`, :func:`emit_onnx` and, beside
them, of onnx-graphsurgeon's own import and export of the same model. The cost per node must not grow with the graph;
graphsurgeon's own does where graphs are nested, which is why it is shown each graph alone.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from circumstances import circumstances
from onnx import TensorProto, helper

from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.text import show

SIZES = ((8000, 0), (16000, 0), (32000, 0), (4000, 500), (8000, 1000), (16000, 2000))


def chain(nodes: int, branches: int) -> onnx.ModelProto:
    """``nodes`` MatMuls in a row, and ``branches`` Ifs that capture their values."""

    def branch(i: int, side: str) -> onnx.GraphProto:
        node = helper.make_node("Identity", [f"v{i + 1}"], [f"{side}{i}"])
        return helper.make_graph([node], side, [], [helper.make_tensor_value_info(f"{side}{i}", 1, [1, 2])])

    steps = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(nodes)]
    steps += [
        helper.make_node("If", ["c"], [f"r{i}"], then_branch=branch(i, "a"), else_branch=branch(i, "b"))
        for i in range(branches)
    ]
    held = [TensorProto(name=f"w{i}", data_type=1, dims=[2, 2], raw_data=bytes(16)) for i in range(nodes)]
    given = [helper.make_tensor_value_info("v0", 1, [1, 2]), helper.make_tensor_value_info("c", 9, [])]
    out = [helper.make_tensor_value_info(f"v{nodes}", 1, [1, 2])]
    return helper.make_model(helper.make_graph(steps, "chain", given, out, held), ir_version=10)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return round(time.process_time() - started, 2), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--graphsurgeon-up-to", type=int, default=1 << 30, help="nodes; its import is slow on nested graphs"
    )
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        for nodes, branches in SIZES:
            model = chain(nodes, branches)
            onnx.save(model, source)
            load_s, graph = timed(lambda: load_onnx(source))
            emit_s, _ = timed(lambda: emit_onnx(graph, out))  # noqa: B023
            show_s, _ = timed(lambda: show(graph))  # noqa: B023
            row: dict[str, Any] = {
                "nodes": nodes,
                "ifs": branches,
                "load_s": load_s,
                "emit_s": emit_s,
                "show_s": show_s,
            }
            if nodes <= args.graphsurgeon_up_to:
                row["gs_import_s"], theirs = timed(lambda: gs.import_onnx(model))  # noqa: B023
                row["gs_export_s"], _ = timed(lambda: gs.export_onnx(theirs))  # noqa: B023
            rows.append(row)
            print(row, flush=True)
    if args.json is not None:
        found = circumstances("benchmarks/onnx_capture.py", "onnx", "onnx-graphsurgeon", clock="processor seconds")
        args.json.write_text(json.dumps(found | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
