"""The whole corpus through load, text and emit: ``python -m tests.backends.onnx.roundtrip_all``.

Prints what was wrong or refused and ends with ``N of N``; ``--json FILE`` writes the figures. Takes some minutes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.circumstances import circumstances
from tests.backends.onnx.corpus import KINDS, Case, backend_cases, file_cases
from tests.backends.onnx.roundtrip import Outcome, roundtrip
from tests.support import data_folder

_CASES: dict[str, list[Case]] = {}


def cases_of(part: str) -> list[Case]:
    """The cases of one part of the corpus, by name."""
    if part not in _CASES:
        _CASES[part] = list(backend_cases(part) if part in KINDS else file_cases(data_folder() / part))
    return _CASES[part]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for many small files, in memory where there is such a place: each is synced to its disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def _one(part: str, index: int, external: bool) -> tuple[str, str, str]:
    case = cases_of(part)[index]
    with scratch() as folder:
        try:
            outcome = roundtrip(case, Path(folder), external=external or None)
        except Exception as e:
            outcome = Outcome("wrong", f"{type(e).__name__}: {e}")
    return case.name, outcome.verdict, outcome.detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--part", action="append", help="parts of the corpus; all unless given")
    parser.add_argument("--external", action="store_true", help="put constants of 1 KiB and more into a data file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    parts = args.part or [*KINDS, *(p for p in ("onnx", "mnist", "ort_corpus") if (data_folder() / p).is_dir())]
    started = time.monotonic()
    refused: dict[str, str] = {}
    tables: dict[str, Counter[str]] = {}
    for part in parts:
        chosen = [i for i, c in enumerate(cases_of(part)) if args.only in c.name]
        tables[part] = Counter()
        with ProcessPoolExecutor(args.workers) as pool:
            pending = [(i, pool.submit(_one, part, i, args.external)) for i in chosen]
            for i, job in pending:
                try:
                    name, verdict, detail = job.result()
                except BrokenProcessPool:
                    name, verdict, detail = cases_of(part)[i].name, "wrong", "the process died"
                tables[part][verdict] += 1
                if verdict == "refused":
                    refused[name] = detail.replace(f"{data_folder()}/", "")
                if verdict in ("wrong", "refused") or args.verbose:
                    print(f"{verdict}: {name}: {detail[:400]}", flush=True)
        print(f"{part}: {dict(tables[part])}", flush=True)
    total = sum(tables.values(), Counter())
    survived = total["equal"] + total["structure"]
    ran = total["equal"] + total["wrong"]
    print(f"bit-equal outputs: {total['equal']} of {ran} models that run deterministically")
    print(f"same graph and same text: {survived} of {total.total() - total['refused']} ({total['refused']} refused)")
    if args.json is not None:
        figures = circumstances(
            "-m tests.backends.onnx.roundtrip_all", "onnx", "onnxruntime", optimizations="none", threads=1
        )
        figures |= {"seconds": round(time.monotonic() - started), "total": total, "parts": tables, "refused": refused}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
