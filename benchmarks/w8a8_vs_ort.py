"""W8A8 by qcompiler against onnxruntime.quantization, on the same models and the same calibration samples.

    python benchmarks/w8a8_vs_ort.py [--models mnist minilm] [--samples 64] [--held 200] [--rounds 15]

Each artifact is made in a process of its own; "peak MiB" is the most private memory (USS) that it and its children had,
sampled every 10 ms.
The peers run at their defaults, with their own preprocessing: ``quantize_static`` (QDQ, MinMax) and
``quantize_dynamic``. What is counted as a compute op is every convolution and matrix product in the graph that the
runtime makes of a file; those in integer kernels are its QLinear*, *Integer*, QGemm, MatMulNBits and QAttention nodes.
Latency: the artifacts of one model run the same held-out samples in turn, sample by sample, in an order that changes;
the ratio is of medians per sample. The results go to ``benchmarks/results/w8a8_vs_ort.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import psutil
from circumstances import circumstances
from memory import private_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.realmodels import MODELS, RealModel, model

RESULTS = Path(__file__).parent / "results" / "w8a8_vs_ort"
INTEGER = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"} | {
    "DynamicQuantizeMatMul",
    "MatMulNBits",
    "QAttention",
}
FLOAT = {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv"} | {
    "TransposeMatMul",
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
}
OURS = {"static": "w8a8", "dynamic": "w8a8-dynamic", "smooth": "w8a8-smooth"}
PEER = {"static": "quantize_static", "dynamic": "quantize_dynamic"}


# -- making, in a process of its own ---------------------------------------------------------------------------


def make(name: str, tool: str, kind: str, source: Path, out: Path, samples: int) -> None:
    """Write the artifact of ``tool`` (ours, ort) and ``kind`` (static, dynamic, smooth)."""
    feeds = model(name).calibration(samples)
    if tool == "ours":
        from qcompiler import api

        api.compile(source, recipe=OURS[kind], calibration=None if kind == "dynamic" else feeds, out=out)
        return
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.items, None)

    prepared = out.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception as e:
        print(f"quant_pre_process failed ({type(e).__name__}); without symbolic shapes", file=sys.stderr)
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    if kind == "static":
        quantize_static(str(prepared), str(out), Reader())
    else:
        quantize_dynamic(str(prepared), str(out))
    prepared.unlink()


def made(name: str, tool: str, kind: str, source: Path, out: Path, samples: int) -> dict[str, Any]:
    """Run :func:`make` in a subprocess: seconds, peak MiB, and what it said where it failed."""
    script = str(Path(__file__).resolve())
    command = [sys.executable, script, "--make", name, tool, kind, str(source), str(out), str(samples)]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        # the peer's preprocessing leaves files in the working directory
        environment = os.environ | {"QCOMPILER_CACHE": "off"}
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=out.parent)
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, private_bytes(watched))
            time.sleep(0.01)  # between two samples of its memory
        log.seek(0)
        said = log.read().decode(errors="replace")
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak >> 20}
    if child.returncode != 0 or not out.exists():
        found["failed"] = said.strip().splitlines()[-1][:300] if said.strip() else f"exit {child.returncode}"
    return found


# -- measuring -------------------------------------------------------------------------------------------------


def session(path: Path, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def walk(graph: onnx.GraphProto) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from walk(inner)


def kernels(path: Path, folder: Path) -> dict[str, Any]:
    """The compute ops and the leftover Q/DQ of the graph that the runtime makes of ``path``."""
    optimized = folder / "optimized.onnx"
    session(path, optimized)
    types = [n.op_type for n in walk(onnx.load(str(optimized)).graph)]
    integer, floating = sum(t in INTEGER for t in types), sum(t in FLOAT for t in types)
    return {
        "integer": integer,
        "float": floating,
        "share": round(integer / max(integer + floating, 1), 4),
        "dequantizes": types.count("DequantizeLinear"),
        "mib": round(path.stat().st_size / 2**20, 2),
    }


def latency(paths: dict[str, Path], feeds: list[dict[str, Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds a sample, the artifacts in turn on each sample."""
    sessions = {key: session(path) for key, path in paths.items()}
    times: dict[str, list[float]] = {key: [] for key in paths}
    rng = random.Random(0)
    for s in sessions.values():
        s.run(None, feeds[0])
    for _ in range(rounds):
        for feed in feeds[:8]:
            for key in rng.sample(sorted(sessions), len(sessions)):
                start = time.perf_counter()
                sessions[key].run(None, feed)
                times[key].append(time.perf_counter() - start)
    return {key: round(statistics.median(t) * 1e3, 4) for key, t in times.items()}


def measure(real: RealModel, folder: Path, samples: int, held: int, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    source = real.fetch(folder)
    feeds = real.held(held)
    floats = session(source)
    reference = [floats.run(None, f) for f in feeds]
    rows: dict[str, dict[str, Any]] = {}
    paths = {"float": source}
    for tool, kinds in (("ours", OURS), ("ort", PEER)):
        for kind in kinds:
            key, out = f"{tool} {kind}", folder / f"{tool}-{kind}.onnx"
            rows[key] = made(real.name, tool, kind, source, out, samples)
            if "failed" in rows[key]:
                continue
            try:
                rows[key] |= kernels(out, folder)
                found = [session_run(out, f) for f in feeds]
            except Exception as e:
                rows[key]["failed"] = f"the runtime: {e}"[:300]
                continue
            rows[key]["quality"] = round(real.metric(reference, found, feeds), 5)
            paths[key] = out
    floating = real.metric(reference, reference, feeds)
    for key, ms in latency(paths, feeds, rounds).items():
        rows.setdefault(key, {})["ms"] = ms
    rows["float"]["quality"] = round(floating, 5)
    return {"model": real.name, "kind": real.kind, "measure": real.measure, "rows": rows}


_open: dict[Path, ort.InferenceSession] = {}


def session_run(path: Path, feed: dict[str, Any]) -> list[Any]:
    if path not in _open:
        _open.clear()
        _open[path] = session(path)
    return list(_open[path].run(None, feed))


# -- telling ---------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | artifact | integer share | left DQ | quality | ms (ratio to float) | peak MiB | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        base = r["rows"]["float"]["ms"]
        for key, row in r["rows"].items():
            if "failed" in row:
                lines.append(f"| {r['model']} | {key} | failed: {row['failed'][:90]} | | | | {row['peak_mib']} | |")
                continue
            share = f"{row['integer']}/{row['integer'] + row['float']}" if "integer" in row else ""
            lines.append(
                f"| {r['model']} | {key} | {share} | {row.get('dequantizes', '')} | {row['quality']} ({r['measure']}) "
                f"| {row['ms']} ({row['ms'] / base:.2f}) | {row.get('peak_mib', '')} | {row.get('mib', '')} |"
            )
    return "\n".join(lines) + "\n\n" + verdict(results)


def verdict(results: list[dict[str, Any]]) -> str:
    """How often ours is at least equal, and better, on each measure."""
    out = []
    for kind in PEER:
        for key, sign, slack in (("share", 1, 0.0), ("quality", 1, 0.0), ("ms", -1, 0.0), ("peak_mib", -1, 0.0)):
            better = equal = worse = 0
            names = []
            for r in results:
                a, b = r["rows"].get(f"ours {kind}", {}), r["rows"].get(f"ort {kind}", {})
                if key not in b or "failed" in b:
                    better += 1
                elif key not in a or sign * a[key] < sign * b[key] - slack:
                    worse += 1
                    names.append(r["model"])
                elif a[key] == b[key]:
                    equal += 1
                else:
                    better += 1
            where = f" (worse: {', '.join(names)})" if names else ""
            out.append(f"{kind} {key}: better {better}, equal {equal}, worse {worse}{where}")
    return "\n".join(f"- {line}" for line in out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--make", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", default=[m.name for m in MODELS])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="a folder for the artifacts")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    if args.make:
        name, tool, kind, source, out, samples = args.make
        make(name, tool, kind, Path(source), Path(out), int(samples))
        return
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = (args.keep or Path(scratch)).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            results.append(measure(model(name), folder, args.samples, args.held, args.rounds))
            print(table(results[-1:]), flush=True)
    text = table(results)
    print(text)
    if not args.dry:
        about = circumstances("benchmarks/w8a8_vs_ort.py", "onnxruntime", "onnx", "numpy", samples=args.samples)
        RESULTS.with_suffix(".json").write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
        head = f"# W8A8 against onnxruntime.quantization\n\n`{about['command']}`, commit {about['commit']}\n\n"
        RESULTS.with_suffix(".md").write_text(head + text)


if __name__ == "__main__":
    np.seterr(over="ignore")
    main()
