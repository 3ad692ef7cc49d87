"""Tile configurations: which a kernel takes for a problem, from tables that ship with the package and a cache on disk.

Nothing is searched when a kernel is called. A table ``tables/sm_90.json`` maps a kernel to entries ``{"m", "n", "k",
"tile"}``; the entry with the least distance in octaves of N * K among those of the nearest M (from above, else the
largest) is taken. ``benchmarks/tune_tiles.py`` writes the tables; what it finds for other shapes on a user's GPU goes
into the cache (``$QCOMPILER_CACHE/tiles/sm_90.json``), whose entries for exactly that N and K come first.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qcompiler.backends.triton.architectures import architecture
from qcompiler.errors import InputError

ENVIRONMENT = "QCOMPILER_CACHE"


@dataclass(frozen=True, order=True)
class Tile:
    """A kernel's shape: rows of the activation (``bm``), output features (``bn``) and reduction (``bk``) a block works
    on at a time, warps, pipeline stages, blocks along K (``split``), rows of blocks that share weights in L2
    (``grouped``)."""

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3
    split: int = 1
    grouped: int = 8


@dataclass(frozen=True)
class Entry:
    """``tile`` for problems of up to ``m`` rows and about ``n`` x ``k`` weights."""

    m: int
    n: int
    k: int
    tile: Tile

    def to_json(self) -> dict[str, Any]:
        return {"m": self.m, "n": self.n, "k": self.k, "tile": asdict(self.tile)}


Table = dict[str, tuple[Entry, ...]]


def read_table(text: str) -> Table:
    """Parse a table; raises InputError that names what is wrong."""
    try:
        found = json.loads(text)
        return {
            str(kernel): tuple(Entry(int(e["m"]), int(e["n"]), int(e["k"]), Tile(**e["tile"])) for e in entries)
            for kernel, entries in found["kernels"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"a table of tiles cannot be read ({type(e).__name__}: {e}); remove it or tune again"
        ) from None


def write_table(table: Table, about: str) -> str:
    """Inverse of :func:`read_table`; ``about`` says how the entries were chosen."""
    kernels = {name: [e.to_json() for e in entries] for name, entries in sorted(table.items())}
    return json.dumps({"about": about, "kernels": kernels}, indent=1) + "\n"


@functools.cache
def shipped(sm: int) -> Table:
    """The table of ``sm``, else of the newest older architecture with no more shared memory, else that with least."""
    folder = resources.files("qcompiler.backends.triton").joinpath("tables")
    known = sorted(int(f.name[3:-5]) for f in folder.iterdir() if f.name.startswith("sm_") and f.name.endswith(".json"))
    if not known:
        return {}
    room = architecture(sm).shared
    older = [a for a in known if a <= sm and architecture(a).shared <= room]
    nearest = max(older) if older else min(known, key=lambda a: architecture(a).shared)
    return read_table(folder.joinpath(f"sm_{nearest}.json").read_text(encoding="utf-8"))


def cache_path(sm: int) -> Path | None:
    """Where tuned tiles of this user's GPU are kept; None where the cache is off."""
    given = os.environ.get(ENVIRONMENT, "")
    if given == "off":
        return None
    home = Path(given) if given else Path.home() / ".cache" / "qcompiler"
    return home / "tiles" / f"sm_{sm}.json"


@functools.cache
def cached(sm: int) -> Table:
    """What the cache holds; empty where there is none."""
    path = cache_path(sm)
    return read_table(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def tile_for(kernel: str, sm: int, m: int, n: int, k: int) -> Tile:
    """The tile of ``kernel`` for M x N x K on ``sm``; raises InputError where no table knows the kernel."""
    own = tuple(e for e in cached(sm).get(kernel, ()) if (e.n, e.k) == (n, k))
    for entries in (own, shipped(sm).get(kernel, ())):
        if entries:
            reach = [e.m for e in entries if e.m >= m]
            rows = min(reach) if reach else max(e.m for e in entries)
            near = [e for e in entries if e.m == rows]
            return min(near, key=lambda e: abs(math.log2(e.n * e.k) - math.log2(max(n * k, 1)))).tile
    raise InputError(f"no table of tiles for sm_{sm} knows the kernel {kernel!r}; the installation is damaged")
