"""Memory of capturing and writing a big ONNX model: ``python benchmarks/onnx_memory.py [--gib 1] [--tensors 64]``.

Makes a model of equal MatMul weights, in a data file and (below 2 GiB) in one file; captures each and writes it again,
as it is and with every weight replaced by a computation on it, each in a process of its own. Prints JSON: the peak of
the memory that this process alone holds (USS), less what it held before, in MiB, beside the size of one tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
from circumstances import circumstances

MIB = 1 << 20


def make(path: Path, total: int, tensors: int, *, external: bool) -> None:
    """A chain of ``tensors`` square MatMuls with ``total`` bytes of random weights."""
    from qcompiler.backends.onnx.emit import emit_onnx
    from qcompiler.dtypes import F32
    from qcompiler.ir import Graph, TensorType
    from qcompiler.payload import RandomPayload

    side = int((total / tensors / 4) ** 0.5)
    graph = Graph("big")
    x = graph.add_input("x", TensorType(F32, (1, side)))
    for i in range(tensors):
        w = graph.add_const(f"w{i}", RandomPayload(i, F32, (side, side)))
        x = graph.create("onnx.MatMul", [x, w], results=[(f"y{i}", TensorType(F32, (1, side)))]).result
    graph.add_output(x)
    emit_onnx(graph, path, external=external)


def child(path: Path, out: Path, mode: str) -> None:
    """Capture ``path`` and write ``out``, watching this process; prints one line of JSON."""
    from qcompiler.backends.onnx.emit import emit_onnx
    from qcompiler.backends.onnx.load import load_onnx
    from qcompiler.dtypes import F16
    from qcompiler.payload import computed

    process = psutil.Process()
    before = peak = process.memory_full_info().uss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, process.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    graph = load_onnx(path)
    loaded = time.perf_counter()
    if mode == "computed":
        for value in graph.consts.values():
            source = value.payload
            assert source is not None
            value.payload = computed("half", lambda p: p.array().astype(np.float16), [source], F16, source.shape)
    info = emit_onnx(graph, out, external=True if mode != "inline" else None)
    emitted = time.perf_counter()
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "mode": mode,
                "input_mib": round(sum(p.stat().st_size for p in path.parent.glob(path.name + "*")) / MIB),
                "output_mib": round((info.nbytes + info.data_nbytes) / MIB),
                "peak_uss_mib": round((peak - before) / MIB, 1),
                "load_s": round(loaded - started, 2),
                "emit_s": round(emitted - loaded, 2),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("IN", "OUT", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), Path(args.child[1]), args.child[2])
        return
    total = int(args.gib * (1 << 30))
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for external in (True, False) if total < 2 * (1 << 30) - MIB else (True,):
            source = Path(folder) / f"in{int(external)}.onnx"
            make(source, total, args.tensors, external=external)
            for mode in ("copy", "computed") if external else ("copy", "inline"):
                out = Path(folder) / "out.onnx"
                command = [sys.executable, __file__, "--child", str(source), str(out), mode]
                line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"source": "data file" if external else "one file", **json.loads(line)})
                print(rows[-1], flush=True)
                assert len(onnx.load(out, load_external_data=False).graph.initializer) == args.tensors
    if args.json is not None:
        tensor_mib = round(total / args.tensors / MIB, 1)
        found = circumstances("benchmarks/onnx_memory.py", "onnx", "numpy", tensors=args.tensors, tensor_mib=tensor_mib)
        args.json.write_text(json.dumps(found | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
