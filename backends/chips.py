"""Chips by the words that a target takes after its colon, and what this machine has."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CHIPS: dict[str, frozenset[str]] = {
    "sse": frozenset({"x86_64"}),
    "avx2": frozenset({"x86_64", "avx2"}),
    "avx2vnni": frozenset({"x86_64", "avx2", "vnni", "avx_vnni"}),
    "avx512": frozenset({"x86_64", "avx2", "avx512"}),
    "avx512vnni": frozenset({"x86_64", "avx2", "avx512", "vnni", "avx512_vnni"}),
    "arm64": frozenset({"arm64", "neon"}),
}
"""Architecture word -> features. ``vnni``: u8 x s8 products do not saturate, by whichever instructions."""

SM = (75, 80, 86, 89, 90, 100, 120)
"""CUDA architectures that a target may name; a chip has the features of every lower one."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})


def features_of(cpuinfo: str) -> frozenset[str]:
    """The features that a Linux ``/proc/cpuinfo`` text tells of; empty when it tells of none."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    words = frozenset(found[1].split()) if found else frozenset()
    out = {"x86_64"} if "sse2" in words else set()
    out |= words & {"avx2", "avx_vnni", "avx512_vnni", "amx_int8", "i8mm"}
    if words >= _AVX512:
        out.add("avx512")
    if words & {"avx_vnni", "avx512_vnni"}:
        out.add("vnni")
    if "asimd" in words:
        out |= {"arm64", "neon"}
    if "asimddp" in words:
        out.add("dotprod")
    return frozenset(out)


def detect_features() -> frozenset[str]:
    """This machine's features. Without ``/proc/cpuinfo`` only the machine type is known and no row serves."""
    path = Path("/proc/cpuinfo")
    if path.is_file() and (found := features_of(path.read_text(errors="replace"))):
        return found
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return CHIPS["arm64"]
    return CHIPS["sse"] if machine in ("x86_64", "amd64") else frozenset({"unknown"})
