"""The child process that opens models in ONNX Runtime, so that a crash there is a finding and no crash here.

``python -m qcompiler.backends.onnx.probe`` reads one job a line from standard input and answers with one line each,
both JSON. Arrays travel through ``.npz`` files, in order and without names. A job::

    {"model": path, "feeds": [{"names": [...], "arrays": npz}, ...], "outputs": folder or null,
     "level": "all" or "none", "optimized": path or null, "external": file name or null, "prepack": true,
     "profile": false, "threads": 1, "session": {key: value}}

and its answer::

    {"loaded": true, "error": "", "executed": {node: {"op": type, "inputs": [[dtype, shape], ...]}},
     "runs": [{"ok": true, "error": "", "names": [...], "arrays": npz or null, "unpacked": 0,
               "memory": {node: temporary bytes}}]}

``executed`` is filled when ``profile`` is asked for: a weight that was packed for its kernel is no input there.
``unpacked`` counts the log lines by which ``MatMulNBits`` says that it falls back to expanding its weight; ``memory``
is the largest temporary allocation of each node so far: feed the smallest first.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FALLBACK = "Falling back to using unpacked compute mode"
_HASH = re.compile(r"_\d{6,}\Z")
"""The runtime appends a hash to the node names of its memory statistics."""


def write_arrays(path: str, arrays: Sequence[Any]) -> None:
    """Arrays to a file, in order."""
    with open(path, "wb") as f:
        np.savez(f, *arrays)


def read_arrays(path: str) -> list[Any]:
    """Inverse of :func:`write_arrays`."""
    with np.load(path) as found:
        return [found[f"arr_{i}"] for i in range(len(found.files))]


class Log:
    """What is written to file descriptor 2 from here on; the runtime logs there, past ``sys.stderr``."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self.kept = os.dup(2)
        self.read_to = 0
        os.dup2(self.file.fileno(), 2)

    def count(self, text: str) -> int:
        """How often ``text`` was logged since the last call."""
        self.file.seek(self.read_to)
        found = self.file.read()
        self.read_to += len(found)
        self.file.seek(0, os.SEEK_END)
        return found.count(text.encode())

    def close(self) -> None:
        os.dup2(self.kept, 2)
        os.close(self.kept)
        self.file.close()


def options_of(job: dict[str, Any], folder: str) -> Any:
    """Session options: the defaults, and what the job asks for."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 1
    options.intra_op_num_threads = int(job.get("threads", 1))
    if job.get("level") == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if job.get("optimized"):
        options.optimized_model_filepath = job["optimized"]
        if job.get("external"):
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", job["external"])
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if not job.get("prepack", True):
        options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in job.get("session", {}).items():
        options.add_session_config_entry(key, value)
    if job.get("feeds"):
        options.add_session_config_entry("session.collect_node_memory_stats_to_file", f"{folder}/memory.csv")
    if job.get("profile"):
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
    return options


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Open the model and run it on each feed; never raises for what the model does."""
    import onnxruntime as ort

    out: dict[str, Any] = {"loaded": False, "error": "", "runs": [], "executed": {}}
    with tempfile.TemporaryDirectory(prefix="qcompiler.probe.") as folder:
        log = Log()
        session = None
        try:
            session = ort.InferenceSession(job["model"], options_of(job, folder), providers=["CPUExecutionProvider"])
            out["loaded"] = True
            for number, feed in enumerate(job.get("feeds", [])):
                out["runs"].append(_run(session, feed, number, job.get("outputs"), folder, log))
            if job.get("profile"):
                out["executed"] = _executed(Path(session.end_profiling()))
        except Exception as e:
            out["error"] = str(e)
        finally:
            del session
            log.close()
    return out


def _run(session: Any, feed: Any, number: int, outputs: str | None, folder: str, log: Log) -> dict[str, Any]:
    run: dict[str, Any] = {"ok": False, "error": "", "names": [], "arrays": None, "unpacked": 0, "memory": {}}
    log.count(FALLBACK)
    try:
        found = session.run(None, dict(zip(feed["names"], read_arrays(feed["arrays"]), strict=True)))
        run["ok"] = True
        if outputs is not None:
            pairs = zip(session.get_outputs(), found, strict=True)
            kept = {o.name: a for o, a in pairs if isinstance(a, np.ndarray) and a.dtype.kind in "biuf"}
            run["names"], run["arrays"] = list(kept), f"{outputs}/{number}.npz"
            write_arrays(run["arrays"], list(kept.values()))
    except Exception as e:
        run["error"] = str(e)
    run["unpacked"] = log.count(FALLBACK)
    statistics = Path(folder, "memory.csv")
    if statistics.exists():
        for row in csv.DictReader(statistics.read_text().splitlines()):
            name = _HASH.sub("", row["#name"])
            run["memory"][name] = max(run["memory"].get(name, 0), int(row["total_temp_allocations"]))
    return run


def _executed(profile: Path) -> dict[str, Any]:
    """Node name -> type and inputs, of the kernels that ran."""
    out: dict[str, Any] = {}
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            args = event["args"]
            inputs = [[kind, shape] for entry in args.get("input_type_shape", []) for kind, shape in entry.items()]
            out.setdefault(name.removesuffix("_kernel_time"), {"op": args.get("op_name", ""), "inputs": inputs})
    return out


def main() -> None:
    """Serve jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runtime prints must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(perform(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
