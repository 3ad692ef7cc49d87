"""Weights per second of the quantizer of one matrix, against ONNX Runtime's packer for MatMulNBits.

    python benchmarks/quantize_throughput.py --json benchmarks/results/quantize_throughput.json

The matrix lies in a mapped file whose pages are cached. Cases take turns, one round is run beforehand, and each ratio
to the packer (always 4 bits, groups of 128, all processors) is of one round. *packed* includes writing the codes
in the layout of MatMulNBits, which is what ONNX Runtime does too; the others end at codes of a byte each. Beside the
wall time stands the processor time of all threads, which a busy machine stretches less. Quality is the signal to noise
ratio of the dequantized weight.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.capi.onnxruntime_pybind11_state import quantize_matmul_4bits

from qcompiler.backends.onnx import layouts
from qcompiler.clipping import Clip
from qcompiler.dtypes import BF16, F16, F32, Array, DType
from qcompiler.payload import FilePayload
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import parse_scheme

BASE = "ort 4 bits g128 asym [K,N] f32, packed"
Run = Callable[[], tuple[float, int]]
"""One run: decibels and bytes of what it made."""


def ours(weight: FilePayload, text: str, axis: int, threads: int, clip: Clip, pack: bool) -> Run:
    """``axis`` 1 is a weight [N, K]; 0 is [K, N], whose codes come out as [N, K]."""
    scheme = parse_scheme(text)
    scheme = scheme.with_axis(1 - axis if scheme.granularity == "channel" else axis)

    def run() -> tuple[float, int]:
        found = quantize_weight(weight, scheme, clip=clip, transpose=axis == 0, threads=threads)
        zeros = 0 if found.zero is None else found.zero.size
        size = (found.codes.size + zeros) * scheme.bits // 8 + found.scale.nbytes
        if pack and found.zero is not None:
            packed = layouts.blocks(found.codes, scheme.bits, scheme.group[0])
            size = packed.nbytes + layouts.pack_zeros(found.zero, scheme.bits).nbytes + found.scale.nbytes
        return 10 * math.log10(found.stats["sum_sq"] / found.stats["sum_sq_error"]), size

    return run


def theirs(weight: FilePayload, block: int) -> Run:
    """ONNX Runtime's packer; its quality is found once, outside the clock."""
    k, n = weight.shape
    groups = k // block

    def call() -> tuple[Array, Array, Array]:
        packed = np.zeros((n, groups, block // 2), np.uint8)
        scales, zeros = np.zeros((n, groups), np.float32), np.zeros((n, (groups + 1) // 2), np.uint8)
        quantize_matmul_4bits(packed, weight.array(), scales, zeros, block, n, k, False)
        return packed, scales, zeros

    w, (packed, scales, zeros) = weight.array(), call()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, groups, block).astype(np.float32)
    middle = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(n, -1)[:, :groups, None]
    lost = ((codes - middle) * scales[..., None]).reshape(n, k) - w.T
    quality = 10 * math.log10(np.square(w, dtype=np.float64).sum() / np.square(lost, dtype=np.float64).sum())
    return lambda: (quality, sum(a.nbytes for a in call()))


# scheme, axis, dtype of the weight, threads, clip, packed
CASES: list[tuple[str, int, DType, int, Clip, bool]] = [
    ("int4 g128 asym", 1, F32, 1, "absmax", False),
    ("int4 g128 asym", 0, F32, 1, "absmax", False),
    ("int4 g128 asym", 0, F32, 1, "absmax", True),
    ("int4 g128 asym", 1, F32, 2, "absmax", False),
    ("int4 g128 asym", 0, F32, 2, "absmax", False),
    ("int4 g128 asym", 0, F32, 2, "absmax", True),
    ("int4 g128 asym", 1, F16, 2, "absmax", False),
    ("int4 g128 asym", 1, BF16, 2, "absmax", False),
    ("int4 g128 sym", 1, F32, 2, "absmax", False),
    ("int4 g32 asym", 1, F32, 2, "absmax", False),
    ("int4 g32 asym", 0, F32, 2, "absmax", False),
    ("int8 channel sym", 1, F32, 2, "absmax", False),
    ("int8 channel sym", 0, F32, 2, "absmax", False),
    ("int4 g128 asym", 1, F32, 2, "mse", False),
    ("int4 g128 asym", 0, F32, 2, "mse", False),
]


def cases(folder: Path, size: int) -> dict[str, Run]:
    """What to run, by name; the weights are written to ``folder``."""
    files: dict[DType, FilePayload] = {}
    values = np.random.default_rng(0).standard_normal((size, size), np.float32) * np.float32(0.02)
    for element in (F32, F16, BF16):
        path = folder / element.name
        values.astype(element.storage).tofile(path)
        files[element] = FilePayload(path, 0, element, (size, size))
    out: dict[str, Run] = {BASE: theirs(files[F32], 128)}
    for text, axis, element, threads, clip, pack in CASES:
        name = f"{text} {'[N,K]' if axis else '[K,N]'} {element}, {threads} threads, {clip}{', packed' if pack else ''}"
        out[name] = ours(files[element], text, axis, threads, clip, pack)
    return out


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    p.add_argument("--runs", type=int, default=7)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    count = a.size * a.size
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as folder:
        todo = cases(Path(folder), a.size)
        for name, run in todo.items():
            quality, made = run()
            rows[name] = {"case": name, "sqnr_db": round(quality, 3), "bytes": made, "runs_ms": [], "cpu_runs_ms": []}
        for _ in range(a.runs):
            for name, run in todo.items():
                busy, begin = time.process_time(), time.perf_counter()
                run()
                rows[name]["runs_ms"].append(round(1000 * (time.perf_counter() - begin), 2))
                rows[name]["cpu_runs_ms"].append(round(1000 * (time.process_time() - busy), 2))
    for row in rows.values():
        for kind in ("", "cpu_"):
            times, base = row[f"{kind}runs_ms"], rows[BASE][f"{kind}runs_ms"]
            row[f"{kind}m_weights_per_s"] = round(count / statistics.median(times) / 1000, 1)
            ratios = sorted(b / t for b, t in zip(base, times, strict=True))
            row[f"{kind}ratio_to_ort"] = [round(r, 2) for r in (ratios[0], statistics.median(ratios), ratios[-1])]
        low, mid, high = row["ratio_to_ort"]
        print(f"{row['case']:<50} {row['m_weights_per_s']:7.1f} M weights/s, {row['cpu_m_weights_per_s']:7.1f} per "
              f"processor second, {mid:5.2f} x ORT ({low:.2f} to {high:.2f}), {row['sqnr_db']:.2f} dB")  # fmt: skip
    if a.json is not None:
        found = {
            "command": shlex.join(["python", "benchmarks/quantize_throughput.py", *sys.argv[1:]]),
            "commit": commit(),
            "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version()} | {n: version(n) for n in ("numpy", "onnxruntime")},
            "settings": {"size": a.size, "runs": a.runs, "warm_up": 1, "interleaved": True},
            "rows": list(rows.values()),
        }
        a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
