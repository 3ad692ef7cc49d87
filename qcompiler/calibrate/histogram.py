"""One histogram of all the values that pass by, whose memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

PIECE = 1 << 18
"""Values that are counted at a time, so that the temporary arrays stay small beside a big activation."""


def pieces(x: Array) -> Iterator[Array]:
    """``x`` flat and in float32 (float64 where it is that), a bounded piece at a time; NaN and infinity are refused.

    Raises CalibrationError that says how many values are no numbers.
    """
    flat = np.asarray(x).reshape(-1)
    wide = np.float64 if flat.dtype == np.float64 or flat.dtype.kind in "iu" else np.float32
    for at in range(0, flat.size, PIECE):
        piece = flat[at : at + PIECE].astype(wide, copy=False)
        # Sums do not overflow to NaN, so one pass tells whether all are finite unless huge values add up to infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            total = piece.sum()
        if not np.isfinite(total) and not (finite := np.isfinite(piece)).all():
            bad = int(finite.size - np.count_nonzero(finite))
            nan = int(np.count_nonzero(np.isnan(piece)))
            raise CalibrationError(f"holds {nan} NaN and {bad - nan} infinite values in one piece of {piece.size}")
        yield piece


class Histogram:
    """Counts of values in at most ``bins`` bins of one width, a power of two; exact zeros are counted apart.

    Bin ``i`` holds the values in ``[i * width, (i + 1) * width)``. The width is the least power of two by which
    ``bins`` bins span zero, the least and the greatest value so far. When the span grows, the width doubles and
    neighbouring bins are added: since bins lie at whole multiples of the width that merges counts exactly. What the
    histogram says in the end does not depend on the order of the values nor on how they were cut into batches, and a
    quantile read from it is off by less than one bin, which is at most ``2 * span / (bins - 2)`` wide.
    """

    def __init__(self, bins: int) -> None:
        if bins < 4:
            raise ValueError(f"a histogram needs at least 4 bins, not {bins}")
        self.bins = bins
        self.exponent: int | None = None
        """The width is two to this power; None before the first value that is not zero."""
        self.first = 0
        """Index of the bin that ``counts[0]`` counts."""
        self.counts: Counts = np.zeros(0, np.int64)
        self.zeros = 0
        self.lo, self.hi = math.inf, -math.inf
        """Exact least and greatest value; infinite while there is none."""

    @property
    def width(self) -> float:
        """Width of a bin; 1.0 before the first value that is not zero."""
        return 1.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """How many values were counted, zeros included."""
        return self.zeros + int(self.counts.sum())

    @property
    def edges(self) -> Floats:
        """The ``len(counts) + 1`` edges of the bins."""
        return (self.first + np.arange(len(self.counts) + 1, dtype=np.float64)) * self.width

    def add(self, x: Array) -> None:
        """Count all of ``x``, finite values of any shape; raises CalibrationError for NaN and infinity."""
        for piece in pieces(x):
            self._add(piece)

    def _add(self, piece: Array) -> None:
        lo, hi = float(piece.min()), float(piece.max())
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        if lo == hi == 0.0:
            self.zeros += piece.size
            return
        self._make_room()
        assert self.exponent is not None
        # Scaling f32 by a power of two is exact unless it overflows, or a tiny negative value becomes zero.
        if not -100 < self.exponent <= 0:
            piece = piece.astype(np.float64)
        index = np.floor(piece * piece.dtype.type(math.ldexp(1.0, -self.exponent))).astype(np.intp)
        first = min(math.floor(lo / self.width), self.first, 0)  # bin 0 is always there
        last = max(math.floor(hi / self.width), self.first + len(self.counts) - 1, 0)
        found = np.bincount(index - first, minlength=last - first + 1)
        none = piece.size - int(np.count_nonzero(piece))
        found[-first] -= none
        self.zeros += none
        if len(self.counts):
            at = self.first - first
            found[at : at + len(self.counts)] += self.counts
        self.first, self.counts = first, found.astype(np.int64, copy=False)

    def _make_room(self) -> None:
        """Double the width until ``bins`` bins span zero and every value so far."""
        wanted = _exponent(min(self.lo, 0.0), max(self.hi, 0.0), self.bins)
        if self.exponent is None:
            self.exponent = wanted
        elif wanted > self.exponent:
            shift, self.exponent = wanted - self.exponent, wanted
            if len(self.counts):
                index = (self.first + np.arange(len(self.counts))) >> shift
                self.first = int(index[0])
                merged = np.zeros(int(index[-1]) - self.first + 1, np.int64)
                np.add.at(merged, index - self.first, self.counts)
                self.counts = merged

    def state(self) -> dict[str, Array]:
        """Everything it knows, as arrays; :meth:`restore` reads it back."""
        place = [0 if self.exponent is None else 1, self.exponent or 0, self.first, self.zeros]
        return {"counts": self.counts, "place": np.array(place, np.int64), "ends": np.array([self.lo, self.hi])}

    def restore(self, state: dict[str, Array]) -> None:
        """Take over what :meth:`state` gave; raises ValueError where that cannot be."""
        counts, place, ends = state["counts"], state["place"], state["ends"]
        if counts.ndim != 1 or len(counts) > self.bins or place.shape != (4,) or ends.shape != (2,):
            raise ValueError("a histogram of another form")
        known, exponent, first, zeros = (int(v) for v in place)
        self.exponent, self.first, self.zeros = (exponent if known else None), first, zeros
        self.counts, (self.lo, self.hi) = counts.astype(np.int64), (float(ends[0]), float(ends[1]))


def _exponent(lo: float, hi: float, bins: int) -> int:
    """The least e for which ``floor(hi / 2**e) - floor(lo / 2**e) + 1 <= bins``."""
    e = math.frexp((hi - lo) / bins)[1] - 2 if math.isfinite(hi - lo) else 1000
    while math.floor(math.ldexp(hi, -e)) - math.floor(math.ldexp(lo, -e)) + 1 > bins:
        e += 1
    return e
