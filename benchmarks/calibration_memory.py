"""Peak memory of calibrating with 512 samples against 32: it depends on one batch, not on their number.

    python benchmarks/calibration_memory.py [--samples 32 512] [--models mnist super_resolution]

Two kinds of rows for each of the four observers. *compile*: ``qcompiler compile -r w8a8 --calibration DATA.npz`` in a
process of its own, evidence included. *observe*: a Calibrator alone that watches every float value of the model, in a
process of its own, from before it to after it. Memory is private (USS) of the process and its children, sampled every
20 ms. The cache of calibration is off. The law is a ratio of at most 1.3; the script fails when a row breaks it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from circumstances import circumstances
from memory import private_bytes

DATA = Path(os.environ.get("QCOMPILER_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results" / "calibration_memory.json"
MODELS = {"mnist": "mnist/mnist-8.onnx", "super_resolution": "onnx/super_resolution_op15.onnx"}
OBSERVERS = ("minmax", "percentile", "mse", "entropy")
LAW = 1.3


def digits(count: int) -> dict[str, np.ndarray]:
    """Test images of MNIST."""
    data = gzip.decompress((DATA / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(data, np.uint8, count * 784, 16).reshape(count, 1, 28, 28)
    return {"Input3": images.astype(np.float32)}


def pictures(count: int) -> dict[str, np.ndarray]:
    """Smooth luminance pictures of 224 x 224: sums of waves."""
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 224, dtype=np.float32)
    out = np.zeros((count, 1, 224, 224), np.float32)
    for picture in out[:, 0]:
        for _ in range(6):
            fx, fy, phase = rng.uniform(0, 30, 3)
            picture += np.sin(fx * grid[None] + fy * grid[:, None] + phase)
    return {"input": np.clip(out / 12 + 0.5, 0, 1)}


SAMPLES = {"mnist": digits, "super_resolution": pictures}


def observe(model: Path, data: Path, observer: str) -> int:
    """Watch every float result of ``model`` over ``data``; the peak of private memory meanwhile."""
    from qcompiler.backends import backend_of
    from qcompiler.backends.onnx.load import load_onnx
    from qcompiler.calibrate.calibrator import Calibrator
    from qcompiler.calibrate.data import open_data
    from qcompiler.calibrate.observers import RangeObserver

    graph = load_onnx(model)
    results = [r for op in graph for r in op.results if r.tensor.dtype is not None and r.tensor.dtype.is_float]
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    calibrator = Calibrator(open_data(data), backend_of("ort-cpu").runner)
    calibrator.observe(graph, {r.name: [RangeObserver(observer)] for r in results})  # type: ignore[arg-type]
    done.set()
    watcher.join()
    return peak


def watched(command: list[str]) -> tuple[int, float]:
    """Run ``command`` to its end: the peak of its private memory, and its time; fails when it does."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"QCOMPILER_CACHE": "off"})
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        peak = max(peak, private_bytes(process))
        time.sleep(0.02)  # between two samples of its memory
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    return peak, time.perf_counter() - begin


def measure(kind: str, model: Path, data: Path, observer: str, folder: Path) -> tuple[int, float]:
    """Peak and time of one row."""
    if kind == "compile":
        command = [sys.executable, "-m", "qcompiler", "compile", str(model), "-o", str(folder / "out.onnx")]
        command += ["-r", "w8a8", "--calibration", str(data), "--json"]
        return watched([*command, "--set", f"insert-activation-qdq.observer={observer}"])
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--child", str(model), str(data), observer]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout), time.perf_counter() - begin


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--samples", type=int, nargs=2, default=[32, 512])
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--observers", nargs="+", choices=OBSERVERS, default=list(OBSERVERS))
    p.add_argument("--kinds", nargs="+", choices=["compile", "observe"], default=["compile", "observe"])
    p.add_argument("--json", type=Path, default=RESULTS)
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        model, data, observer = a.child
        print(observe(Path(model), Path(data), observer))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as scratch:
        folder = Path(scratch)
        for name in a.models:
            for count in a.samples:
                np.savez(folder / f"{name}{count}.npz", **SAMPLES[name](count))
            for kind in a.kinds:
                for observer in a.observers:
                    found = {
                        count: measure(kind, DATA / MODELS[name], folder / f"{name}{count}.npz", observer, folder)
                        for count in a.samples
                    }
                    few, many = (found[c] for c in a.samples)
                    row: dict[str, Any] = {"model": name, "kind": kind, "observer": observer}
                    row |= {"peak_bytes": {str(c): found[c][0] for c in a.samples}, "ratio": many[0] / few[0]}
                    row |= {"seconds": {str(c): round(found[c][1], 1) for c in a.samples}}
                    rows.append(row)
                    peaks = " -> ".join(f"{found[c][0] / 2**20:.0f}" for c in a.samples)
                    print(
                        f"{name} {kind} {observer}: {peaks} MiB, ratio {row['ratio']:.3f}, {many[1]:.0f} s", flush=True
                    )
    worst = max(rows, key=lambda r: float(r["ratio"]))
    out = circumstances("benchmarks/calibration_memory.py", "numpy", "onnxruntime", law=LAW)
    a.json.write_text(json.dumps(out | {"runs": rows, "worst_ratio": worst["ratio"]}, indent=1) + "\n")
    print(f"worst ratio {worst['ratio']:.3f} ({worst['model']} {worst['kind']} {worst['observer']}), the law is {LAW}")
    if worst["ratio"] > LAW:
        sys.exit(1)


if __name__ == "__main__":
    main()
