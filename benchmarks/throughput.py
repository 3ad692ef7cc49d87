"""Weights per second of ``qcompiler compile`` against ONNX Runtime's MatMulNBitsQuantizer, process against process.

    python benchmarks/throughput.py --gb 1 --runs 5 --json benchmarks/results/throughput.json

Both make int4, groups of 128, with zero points, for accuracy_level 4, from the same float model with external data.
The two take turns, so that the machine's drift falls on both. Ours includes the verdict and the evidence from the
runtime; theirs is load, quantize, save.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bigmodel import write_chain

WIDTH = 4096
LAYER = WIDTH * WIDTH * 4

THEIRS = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
q = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), block_size=128, is_symmetric=False, accuracy_level=4)
q.process()
q.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
"""


def timed(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, default=1.0)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-bench-"))
    try:
        model = folder / "model.onnx"
        weights = write_chain(model, max(1, round(a.gb * 2**30 / LAYER)), WIDTH) // 4
        out = folder / "ours.onnx"
        ours = [
            sys.executable,
            "-m",
            "qcompiler",
            "compile",
            str(model),
            "-o",
            str(out),
            "--target",
            "ort-cpu",
            "--json",
        ]
        theirs = [sys.executable, "-c", THEIRS, str(model), str(folder / "theirs.onnx")]
        timed(ours)
        pairs = []
        for _ in range(a.runs):
            (folder / "theirs.onnx.data").unlink(missing_ok=True)
            pairs.append((timed(ours), timed(theirs)))
        report = json.loads(out.with_name("ours.onnx.report.json").read_text())
    finally:
        shutil.rmtree(folder)
    mine, other = (statistics.median(t) for t in zip(*pairs, strict=True))
    ratios = sorted(t / o for o, t in pairs)
    found = {
        "weights": weights,
        "ours_s": mine,
        "theirs_s": other,
        "ours_weights_per_s": weights / mine,
        "theirs_weights_per_s": weights / other,
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "ours_timing": report["timing"],
        "verdict": report["verdict"],
    }
    print(f"ours {weights / mine / 1e6:.1f} M weights/s, theirs {weights / other / 1e6:.1f} M weights/s, "
          f"ratio {found['ratio_median']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip
    if a.json is not None:
        command = f"python benchmarks/throughput.py --gb {a.gb} --runs {a.runs}"
        a.json.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
