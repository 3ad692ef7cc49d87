"""The law of memory: what compiling a graph needs depends on its largest tensor, not on its size (L6)."""

from __future__ import annotations

import ctypes
import os
import sys

from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.payload import Payload

BASE_BYTES = 100 << 20
"""Interpreter, NumPy and the ONNX libraries, measured once they are imported."""
TORCH_BYTES = 300 << 20
"""torch and its ONNX exporter, where the source is a torch model."""
BLOCK_BYTES = 64 << 20
"""Row blocks of the float weight that are in flight while one tensor is quantized."""
EVIDENCE_BYTES = 300 << 20
"""The runtime in its own process, and the float model beside the artifact where both are small enough to compare."""


def predicted_peak(graph: Graph) -> int:
    """Bytes of private memory that quantizing ``graph`` needs at its peak: the law that streaming keeps (L6).

    The largest tensor in codes of a byte each and packed once more, the row blocks in flight, and what the process or
    the runtime beside it takes anyway. Mapped input pages do not count.
    """
    largest = max((_elements(v.payload) for g in graph.graphs() for v in g.consts.values()), default=0)
    base = BASE_BYTES + (TORCH_BYTES if "torch" in sys.modules else 0)
    return base + max(BLOCK_BYTES + 2 * largest, EVIDENCE_BYTES)


def _elements(payload: Payload | None) -> int:
    return 0 if payload is None else payload.size


def give_back() -> None:
    """Return freed memory to the system where the C library can: holes that big arrays leave add up from run to run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def bound(graph: Graph, limit: int) -> None:
    """Raise InputError when compiling ``graph`` would need more private memory than ``limit`` bytes."""
    need = predicted_peak(graph)
    if need > limit:
        raise InputError(
            f"compiling needs about {need / 2**20:.0f} MiB of private memory at its peak, the bound is "
            f"{limit / 2**20:.0f} MiB; raise --max-ram"
        )
