"""A matrix read in tiles by several threads: what a tile is, what a thread works in, how the bytes come.

Tiles stay near the second-level cache and come through the payload's own ``rows`` where it has them, so that a mapped
model is never resident as a whole. NumPy releases the interpreter in every operation on a tile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from qcompiler.clipping import work_dtype
from qcompiler.dtypes import F16, Array
from qcompiler.payload import Payload

TILE = 1 << 19
"""Elements in a tile: smaller ones cost more in calls, larger ones more in the third-level cache."""

COLUMNS = 512
"""A tile that takes part of the columns takes at least so many: half a page of a mapped f32 file."""

PAD = 64
"""Bytes between the rows of codes to be transposed: at a power of two they would evict one another from the cache."""

SPAN = 4 << 20
"""Bytes of a file that one read may map. A tile of some columns touches every page of its rows: the kernel maps those
around the one asked for too."""

MAX_THREADS = 4

T = TypeVar("T")


def processors() -> int:
    """How many threads to use unless told: the processors this process may run on, at most MAX_THREADS."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, MAX_THREADS)


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a matrix; ``number`` counts row by row, ``band`` the tiles above it."""

    number: int
    band: int
    rows: slice
    cols: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start


def tiles(shape: tuple[int, int], high: int, wide: int) -> Iterator[Tile]:
    """The tiles of at most ``high`` rows and ``wide`` columns that cover a matrix, row by row."""
    rows, cols = shape
    number = 0
    for band, r in enumerate(range(0, rows, high)):
        for c in range(0, cols, wide):
            yield Tile(number, band, slice(r, min(r + high, rows)), slice(c, min(c + wide, cols)))
            number += 1


class Buffers:
    """What one thread works in: two tiles of the work dtype, one of codes. Pages never touched cost nothing."""

    def __init__(self, largest: int, highest: int, work: np.dtype[Any], code: np.dtype[Any]) -> None:
        self._floats = [np.empty(largest, work) for _ in range(2)]
        self._codes = np.empty(largest + PAD * highest, code)

    def floats(self, index: int, shape: tuple[int, int]) -> Array:
        return self._floats[index][: shape[0] * shape[1]].reshape(shape)

    def codes(self, shape: tuple[int, int]) -> Array:
        """Codes of a tile, with a gap after each row."""
        wide = shape[1] + PAD
        return self._codes[: shape[0] * wide].reshape(shape[0], wide)[:, : shape[1]]


class Reader:
    """Tiles of a float matrix in the dtype that codes are computed in."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.element: Final = payload.dtype
        self.work: Final = work_dtype(payload.dtype)
        self.limit: Final = 65536.0 if payload.dtype is F16 else np.inf
        """Finite values are smaller than this once read: f16 has no larger ones, see :func:`widen_f16`."""
        streams = (
            type(payload).rows is not Payload.rows
        )  # a payload without rows of its own would compute all each time
        self._array = None if streams else payload.array()

    def read(self, tile: Tile, out: Array) -> Array:
        """The values of ``tile`` in ``out``, where later passes over them find them in the cache."""
        rows = tile.rows
        step = rows.stop - rows.start
        if self._array is None:
            step = max(1, min(step, SPAN // max(1, self.payload.nbytes // self.payload.shape[0])))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            source = self.payload.rows(start, stop) if self._array is None else self._array[start:stop]
            raw, target = source[:, tile.cols], out[start - rows.start : stop - rows.start]
            if self.element is F16:
                widen_f16(raw, target)
            else:
                np.copyto(target, raw)
        return out


def widen_f16(raw: Array, out: Array) -> None:
    """f16 to f32, exactly, several times faster than NumPy casts; infinity and NaN become 2^16 and more.

    The exponent and mantissa move to their places in f32, and a multiplication by 2^(127 - 15) corrects the bias, which
    makes subnormals right as well. The arithmetic shift copies the sign; the mask clears all but one of the copies.
    """
    bits = out.view(np.int32)
    np.left_shift(raw.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
    np.right_shift(bits, 3, out=bits)
    np.bitwise_and(bits, np.int32(~0x70000000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)


def each(tasks: Sequence[T], step: Callable[[T, Buffers], None], buffers: Callable[[], Buffers], threads: int) -> None:
    """Call ``step`` for every task, in any order, each thread with buffers of its own; the first error ends it all."""
    todo, lock = iter(tasks), threading.Lock()

    def worker() -> None:
        nonlocal todo
        own = buffers()
        try:
            while True:
                with lock:
                    task = next(todo, None)
                if task is None:
                    return
                step(task, own)
        except BaseException:
            todo = iter(())
            raise

    count = min(threads, len(tasks))
    if count <= 1:
        worker()
        return
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(worker) for _ in range(count)]:
            future.result()
