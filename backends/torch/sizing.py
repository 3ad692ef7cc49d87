"""Inputs for the phases of a program: as many rows as a phase has, through the sizes that the program leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcompiler.backends.onnx.workload import Size
from qcompiler.backends.torch.workload import TorchWorkload, guesses
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.target import Phase

PAST = 4
"""How many tokens a cache is given."""
BIG = 256 << 20
"""Bytes of constants above which a prefill is run with :data:`FEW` rows: torch's low-bit kernels take one path from 5
rows on."""
FEW = 64
_SMALLER = (256, 128, 64, 32, 16, 8, 4, 2, 1)

Feeds = dict[str, dict[str, Array]]


def constant_bytes(graph: Graph) -> int:
    """Bytes of everything that the program stores, regions included."""
    return sum(v.payload.nbytes for g in graph.graphs() for v in g.consts.values() if v.payload is not None)


def phase_feeds(graph: Graph, phases: Sequence[Phase]) -> Iterator[Feeds]:
    """Candidate inputs by phase, the likeliest first; nothing where a type is not made up.

    A phase that the program cannot take, for example for its longest sequence, gets as many rows as it can.
    """
    work = TorchWorkload(graph, {})
    if work.refusal():
        return
    most = FEW if constant_bytes(graph) > BIG else None
    for tokens in (True, False):
        feeds = {p.name: _sized(work, p.m if most is None else min(p.m, most), tokens=tokens) for p in phases}
        yield {name: feed for name, feed in feeds.items() if feed is not None}
    for feed in guesses(graph, 0):
        yield {p.name: feed for p in phases}


def _sized(work: TorchWorkload, m: int, *, tokens: bool) -> dict[str, Array] | None:
    """Inputs of ``m`` rows, or of as many below that as the program takes. ``tokens``: along a sequence where there is
    one, else along the batch."""
    sequences = tokens and "rows" in work.roles.values()
    for rows in (m, *(s for s in _SMALLER if s < m), 2, 3):
        try:
            return work.feed(Size(1, rows, PAST) if sequences else Size(rows, rows if tokens else 1, PAST))
        except InputError:
            continue  # out of the program's ranges
    return None
