"""Compiles claims of sm_80 for AMD's gfx942 (MI300), the first of each row of ROWS or, asked for ``all``, every one;
prints, a line of JSON each, what came out.

In a process of its own, because inline assembly for NVIDIA is left out of all kernels here: their twins in plain Triton
take its place. ``maxnreg`` is NVIDIA's alone; two stages are what the 64 KiB of shared memory allow.
"""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatchcase
from typing import Any

import torch  # noqa: F401  # first: its import registers the operators of every family
import triton.language as tl

from qcompiler.backends.triton.claims import Claim, fake_mode
from qcompiler.backends.triton.device import pairs
from qcompiler.backends.triton.families import claims
from qcompiler.backends.triton.launching import Recorder, recording
from qcompiler.backends.triton.proving import compile_kernel, gpu_target

ROWS = ("wn.*.int4", "wn.gemv.mxfp4", "quantize", "a8.gemm.int8", "a8.gemm.w4", "gather", "kv.*", "grouped.int4")
FIGURES = re.compile(r"\.(vgpr_spill_count|sgpr_spill_count|vgpr_count):\s*(\d+)")
MATRIX = re.compile(r"\bv_(?:s?mfmac?)_\w+")


def outcome(claim: Claim) -> dict[str, Any]:
    """What compiling one claim gave: an error, or the sums and maxima over its kernels."""
    target = gpu_target("hip", "gfx942")

    def compile_it(kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], options: dict[str, Any]) -> Any:
        kept = {k: v for k, v in options.items() if k != "maxnreg"}
        kept["num_stages"] = min(2, kept.get("num_stages", 2))
        return compile_kernel(kernel, args, grid, kept, target)

    recorder = Recorder(80, compile_it)
    about = {"row": claim.row, "case": claim.case, "products": claim.products}
    try:
        with recording(recorder), fake_mode():
            claim.run()
    except Exception as e:  # triton raises errors of its own and of MLIR, without a common class
        return {**about, "error": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
    texts = [launch.compiled.asm["amdgcn"] for launch in recorder.launches]
    found = [{name: int(count) for name, count in FIGURES.findall(text)} for text in texts]
    return {
        **about,
        "error": "",
        "registers": max(f["vgpr_count"] for f in found),
        "spills": sum(f["vgpr_spill_count"] for f in found),
        "shared": max(int(launch.compiled.metadata.shared) for launch in recorder.launches),
        "matrix": sorted({m for text in texts for m in MATRIX.findall(text)}),
    }


if __name__ == "__main__":
    pairs.ASM = tl.constexpr(False)
    done: set[str] = set()
    for claim in claims(80):
        row = claim.row.partition("/")[2]
        if "all" in sys.argv or (row not in done and any(fnmatchcase(row, glob) for glob in ROWS)):
            done.add(row)
            print(json.dumps(outcome(claim)), flush=True)
