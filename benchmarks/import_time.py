"""How long `import qcompiler` and `qcompiler --help` take, and what they load.

    python benchmarks/import_time.py --json benchmarks/results/import_time.json

Every measurement is a fresh process; the cases are interleaved, and one round is run beforehand so that files are in
the page cache. ``import qcompiler`` is timed from inside the interpreter, the rest as a shell sees it; beside
the wall time stands the processor time (user and system), which a busy machine stretches less. The bounds are
those that this project sets itself: 50 ms for the import, 300 ms for the help.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

INSIDE = "import time; t = time.perf_counter(); import qcompiler; print(time.perf_counter() - t)"
SCRIPT = str(Path(sys.executable).with_name("qcompiler"))
CASES: dict[str, tuple[list[str], float | None]] = {
    "python": ([sys.executable, "-c", "pass"], None),
    "import qcompiler": ([sys.executable, "-c", INSIDE], 50.0),
    "qcompiler --help": ([SCRIPT, "--help"], 300.0),
    "qcompiler compile --help": ([SCRIPT, "compile", "--help"], None),
    "qcompiler explain QC101": ([SCRIPT, "explain", "QC101"], None),
}


def measure(name: str) -> tuple[float, float]:
    """Milliseconds of one run in a fresh process: wall time (from inside for the import) and processor time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(CASES[name][0], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - begin
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return 1000 * (float(done.stdout) if name == "import qcompiler" else wall), 1000 * busy


def loaded() -> int:
    """How many modules `qcompiler --help` loads."""
    script = "import sys; from qcompiler.cli import status; status(['--help']); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=20)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    for name in CASES:
        measure(name)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(a.runs):
        for name in CASES:
            runs[name].append(measure(name))
    rows = []
    for name, pairs in runs.items():
        bound = CASES[name][1]
        times, busy = (sorted(round(p[i], 2) for p in pairs) for i in (0, 1))
        row = {"case": name, "median_ms": statistics.median(times), "cpu_median_ms": statistics.median(busy)}
        rows.append(row | {"bound_ms": bound, "runs_ms": times, "cpu_runs_ms": busy})
        within = f"  (bound {bound:.0f} ms)" if bound else ""
        print(f"{name:<26} {row['median_ms']:7.1f} ms, {row['cpu_median_ms']:7.1f} ms of processor{within}")
    if a.json is not None:
        found = {
            "command": shlex.join(["python", "benchmarks/import_time.py", *sys.argv[1:]]),
            "commit": commit(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version()} | {n: version(n) for n in ("typer", "rich")},
            "settings": {"runs": a.runs, "warm_up": 1, "interleaved": True, "load_average": os.getloadavg()[0]},
            "modules_loaded_by_help": loaded(),
            "rows": rows,
        }
        a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
