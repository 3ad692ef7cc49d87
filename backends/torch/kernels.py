"""torch's low-bit CPU kernels as rows, and the targets ``torch-cpu`` and ``torch-cuda``.

A row stands here because a test runs that kernel, compares its numbers and watches what it allocates. Rows of kernels
that compute on codes of activations stand in :mod:`qcompiler.backends.torch.kernels_integer`.
"""

from __future__ import annotations

import re

from qcompiler.backends.torch.kernels_integer import INTEGER_ROWS
from qcompiler.errors import InputError
from qcompiler.target import KernelRow, Reason, Target

CPU_ROWS: tuple[KernelRow, ...] = (*INTEGER_ROWS,)

SM = (75, 80, 86, 89, 90, 100, 120)
"""CUDA architectures that a target may name."""


def chips(name: str) -> tuple[str, ...]:
    """The architecture words that target ``name`` takes; empty for a target that is not here."""
    return {"torch-cpu": (), "torch-cuda": tuple(f"sm_{s}" for s in SM)}.get(name, ())


def target(spec: str) -> Target:
    """``torch-cpu`` (this machine's chip), ``torch-cpu:ARCH``, ``torch-cuda``, ``torch-cuda:sm_XX``."""
    name, _, arch = spec.partition(":")
    if name == "torch-cpu":
        return Target(name, arch, frozenset(), CPU_ROWS, "aten")
    found = re.fullmatch(r"sm_(\d+)", arch or "sm_80")
    if name != "torch-cuda" or found is None:
        raise InputError(f"no target {spec!r} here; known: torch-cpu, torch-cuda, each with an optional :ARCH")
    none = Reason("QC206", "torch-cuda has no kernels yet", "compile for torch-cpu")
    absent = tuple((op, none) for op in ("q.linear", "q.embedding", "q.linear_dyn", "q.linear_static"))
    return Target(name, arch, frozenset({"cuda"}), (), "aten", absent)
