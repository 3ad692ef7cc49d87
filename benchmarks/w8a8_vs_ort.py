"""W8A8 by qcompiler against onnxruntime.quantization, on the same models and the same calibration samples.

    python benchmarks/w8a8_vs_ort.py [--models mnist minilm] [--samples 64] [--held 200] [--rounds 15] [--merge]

Each artifact is made in a process of its own; "peak MiB" is the most private memory (USS) that it and its children had,
sampled every 10 ms.
The peers run at their defaults, with their own preprocessing: ``quantize_static`` (QDQ, MinMax) and
``quantize_dynamic``. What is counted as a compute op is every convolution and matrix product in the graph that the
runtime makes of a file; those in integer kernels are its QLinear*, *Integer*, QGemm, MatMulNBits and QAttention nodes.
Latency: the artifacts of one model run the same held-out samples in turn, sample by sample, in an order that changes.
Each is open twice, and all are opened anew :data:`OPENINGS` times, since where a session's memory lies moves its time;
the "A/A" of a model is the largest ratio between two sessions of one file.
Ours is called better or worse than the peer in latency where the ratio is beyond the A/A, and in quality where the
difference keeps its sign in 95 % of the resamples of the held-out samples (paired bootstrap, two-sided); it is equal
elsewhere. Shares and memory are compared as they are. The results go to ``benchmarks/results/w8a8_vs_ort.json`` and
``.md``; with ``--merge`` those of the models that were not run stay.
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
OPENINGS = 5
RESAMPLES = 2000


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


def latency(paths: dict[str, Path], feeds: list[dict[str, Any]], rounds: int) -> tuple[dict[str, float], float]:
    """Median milliseconds a sample, the artifacts in turn on each sample; and the A/A ratio, at least 1."""
    times: dict[tuple[str, int], list[float]] = {(key, twin): [] for key in paths for twin in range(2)}
    rng = random.Random(0)
    for _ in range(OPENINGS):
        sessions = {key: session(paths[key[0]]) for key in rng.sample(sorted(times), len(times))}
        for s in sessions.values():
            s.run(None, feeds[0])
        for _ in range(-(-rounds // OPENINGS)):
            for feed in feeds[:8]:
                for key in rng.sample(sorted(sessions), len(sessions)):
                    start = time.perf_counter()
                    sessions[key].run(None, feed)
                    times[key].append(time.perf_counter() - start)
    apart = [abs(np.log(statistics.median(times[k, 0]) / statistics.median(times[k, 1]))) for k in paths]
    found = {k: round(statistics.median(times[k, 0] + times[k, 1]) * 1e3, 4) for k in paths}
    return found, round(float(np.exp(max(apart))), 4)


def interval(real: RealModel, ours: list[float], theirs: list[float]) -> list[float]:
    """Where the difference in quality lies in 95 % of the resamples of the held-out samples."""
    a, b, rng = np.array(ours), np.array(theirs), np.random.default_rng(0)
    picks = rng.integers(0, len(a), (RESAMPLES, len(a)))
    found = [real.overall(a[p]) - real.overall(b[p]) for p in picks]
    return [round(float(q), 6) for q in np.percentile(found, [2.5, 97.5])]


def measure(real: RealModel, folder: Path, samples: int, held: int, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    source = real.fetch(folder)
    feeds = real.held(held)
    floats = session(source)
    reference = [floats.run(None, f) for f in feeds]
    rows: dict[str, dict[str, Any]] = {}
    paths, scores = {"float": source}, {}
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
            scores[key] = real.scores(reference, found, feeds)
            rows[key]["quality"] = round(real.overall(scores[key]), 5)
            paths[key] = out
    for kind in PEER:
        if scores.keys() >= {f"ours {kind}", f"ort {kind}"}:
            rows[f"ours {kind}"]["gain"] = interval(real, scores[f"ours {kind}"], scores[f"ort {kind}"])
    floating = real.metric(reference, reference, feeds)
    times, twins = latency(paths, feeds, rounds)
    for key, ms in times.items():
        rows.setdefault(key, {})["ms"] = ms
    rows["float"]["quality"] = round(floating, 5)
    about = {"model": real.name, "kind": real.kind, "measure": real.measure, "held": len(feeds), "aa": twins}
    return about | {"rows": rows}


_open: dict[Path, ort.InferenceSession] = {}


def session_run(path: Path, feed: dict[str, Any]) -> list[Any]:
    if path not in _open:
        _open.clear()
        _open[path] = session(path)
    return list(_open[path].run(None, feed))


# -- telling ---------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model (held-out, A/A) | artifact | integers | left DQ | quality | ms (ratio to float) | peak MiB | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        base, name = r["rows"]["float"]["ms"], f"{r['model']} ({r['held']}, {r['aa']:.3f})"
        for key, row in r["rows"].items():
            if "failed" in row:
                lines.append(f"| {name} | {key} | failed: {row['failed'][:90]} | | | | {row['peak_mib']} | |")
                continue
            share = f"{row['integer']}/{row['integer'] + row['float']}" if "integer" in row else ""
            lines.append(
                f"| {name} | {key} | {share} | {row.get('dequantizes', '')} | {row['quality']} ({r['measure']}) "
                f"| {row['ms']} ({row['ms'] / base:.2f}) | {row.get('peak_mib', '')} | {row.get('mib', '')} |"
            )
    return "\n".join(lines) + "\n\n" + verdict(results)


def verdict(results: list[dict[str, Any]]) -> str:
    """How often ours is at least equal, and better, on each measure."""
    out = []
    for kind in PEER:
        for key in ("share", "quality", "ms", "peak_mib"):
            names: dict[int, list[str]] = {1: [], 0: [], -1: []}
            for r in results:
                names[against_peer(r, kind, key)].append(r["model"])
            where = [f" ({word}: {', '.join(names[s])})" for s, word in ((0, "equal"), (-1, "worse")) if names[s]]
            counts = f"better {len(names[1])}, equal {len(names[0])}, worse {len(names[-1])}"
            out.append(f"{kind} {key}: {counts}{''.join(where)}")
    return "\n".join(f"- {line}" for line in out) + "\n"


def against_peer(result: dict[str, Any], kind: str, key: str) -> int:
    """1 where ours is better, 0 where the two are equal, -1 where it is worse."""
    ours, peer = result["rows"].get(f"ours {kind}", {}), result["rows"].get(f"ort {kind}", {})
    if key not in peer or "failed" in peer:
        return 1
    if key not in ours or "failed" in ours:
        return -1
    if key == "quality":
        low, high = ours["gain"]
        return 1 if low > 0 else -1 if high < 0 else 0
    gain = float(np.log(ours[key] / peer[key])) * (1 if key == "share" else -1)
    slack = float(np.log(result["aa"])) if key == "ms" else 0.0
    return 0 if abs(gain) <= slack else 1 if gain > 0 else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--make", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", default=[m.name for m in MODELS])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="a folder for the artifacts")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--merge", action="store_true", help="keep the written results of the other models")
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
    if args.merge:
        known = json.loads(RESULTS.with_suffix(".json").read_text())["results"]
        made = {r["model"]: r for r in (*known, *results)}
        results = [made[m.name] for m in MODELS if m.name in made]
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
