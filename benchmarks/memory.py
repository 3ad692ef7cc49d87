"""Peak private memory of compiling an 8 GB and a 2 GB model to int4: it depends on the largest tensor, not the model.

    python benchmarks/memory.py --gb 2 8 --json benchmarks/results/memory.json

Private memory is the unique set size (USS) of the whole process tree, sampled every 20 ms while ``qcompiler compile``
runs, evidence included: mapped pages of the input are shared with the page cache and do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from bigmodel import write_chain

WIDTH = 4096
LAYER = WIDTH * WIDTH * 4


def private_bytes(root: psutil.Process) -> int:
    """USS of a process and all its descendants; those that end meanwhile count nothing."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for p in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += p.memory_full_info().uss
    return total


def compile_watched(model: Path, out: Path, recipe: str) -> dict[str, object]:
    """Compile in a process of its own; its peak, its time, and what its report says."""
    command = [sys.executable, "-m", "qcompiler", "compile", str(model), "-o", str(out), "--target", "ort-cpu"]
    begin = time.perf_counter()
    child = subprocess.Popen([*command, "--recipe", recipe, "--json"], stdout=subprocess.DEVNULL)
    watched, peak, samples = psutil.Process(child.pid), 0, 0
    while child.poll() is None:
        peak, samples = max(peak, private_bytes(watched)), samples + 1
        time.sleep(0.02)
    report = json.loads(out.with_name(out.name + ".report.json").read_text())
    return {
        "exit": child.returncode,
        "verdict": report["verdict"],
        "evidence": sorted({s["evidence"] for s in report["sites"]}),
        "fused": report["totals"]["fused"],
        "sites": report["totals"]["sites"],
        "peak_uss_bytes": peak,
        "samples": samples,
        "wall_s": round(time.perf_counter() - begin, 1),
        "artifact_bytes": report["artifact"]["bytes"],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, nargs="+", default=[2.0, 8.0])
    p.add_argument("--recipe", default="w4a16")
    p.add_argument("--folder", type=Path, help="where to put the models (a temporary folder by default)")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    rows = []
    for gb in a.gb:
        folder = Path(tempfile.mkdtemp(prefix="qcompiler-bench-", dir=a.folder))
        try:
            model = folder / "model.onnx"
            weights = write_chain(model, max(1, round(gb * 2**30 / LAYER)), WIDTH)
            row = {"weight_bytes": weights, **compile_watched(model, folder / "out.onnx", a.recipe)}
        finally:
            shutil.rmtree(folder)
        rows.append(row)
        print(f"{weights / 2**30:.1f} GiB of weights: peak {row['peak_uss_bytes'] / 2**20:.0f} MiB private, "
              f"{row['wall_s']} s, {row['verdict']}, evidence {row['evidence']}")  # fmt: skip
    ratio = rows[-1]["peak_uss_bytes"] / rows[0]["peak_uss_bytes"]
    print(f"peak of the last against the first: {ratio:.3f}")
    if a.json is not None:
        command = f"python benchmarks/memory.py --gb {' '.join(map(str, a.gb))}"
        a.json.write_text(json.dumps({"command": command, "rows": rows, "peak_ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
