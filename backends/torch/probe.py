"""The child process that runs a ``.pt2`` file and watches its low-bit calls, so that a crash there is a finding and no
crash here.

``python -m qcompiler.backends.torch.probe`` reads one job a line from standard input and answers with one line each,
both JSON. A job::

    {"path": file, "at": file or null, "capability": "avx2" or "", "threads": 1, "device": "cuda" or "",
     "phases": [{"name": "decode", "feed": {"names": [...], "arrays": npz}}, ...]}

and its answer::

    {"loaded": true, "error": "", "runs": [{"phase": "decode", "ok": true, "error": "", "peak": bytes,
      "ops": {label: {"ran": [names of operators inside], "temp": bytes, "m": rows, "elements": of activation
       and result, "off": relative error or null}}}]}

``temp`` is what was allocated inside a low-bit call at once, its results left out; ``off`` the relative root mean
square error against float64. The name of the op that runs is in the file ``at``, for when the process dies of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "qcompiler.op:"


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Open the program and run it on each feed; never raises for what the program does."""
    if job.get("capability"):
        os.environ["ATEN_CPU_CAPABILITY"] = job["capability"]  # read when torch is first imported
    import torch

    out: dict[str, Any] = {"loaded": False, "error": "", "runs": []}
    torch.set_num_threads(int(job.get("threads", 1)))
    try:
        watched = _open(Path(job["path"]), job.get("at"), str(job.get("device", "")))
        out["loaded"] = True
    except Exception as e:  # whatever torch says of the file
        out["error"] = _line(e)
        return out
    for phase in job["phases"]:
        run: dict[str, Any] = {"phase": phase["name"], "ok": False, "error": "", "peak": 0, "ops": {}}
        try:
            run |= watched.measured(_feed(phase["feed"]))
            run["ok"] = True
        except Exception as e:
            run["error"] = _line(e)
        out["runs"].append(run)
    return out


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:400]


def _feed(feed: Mapping[str, Any]) -> dict[str, Any]:
    from qcompiler.backends.onnx.probe import read_arrays

    return dict(zip(feed["names"], read_arrays(feed["arrays"]), strict=True))


def _open(path: Path, at: str | None, device: str) -> Any:
    if device:
        from qcompiler.backends.torch.watching_gpu import OnDevice

        return OnDevice.of(path, at).on(device)
    from qcompiler.backends.torch.watching import Watched

    return Watched.of(path, at)


def main() -> None:
    """Serve jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runtime prints must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(perform(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
