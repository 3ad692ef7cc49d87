"""What is remembered of the activations that pass a place: ranges, channel ranges, a sample of rows.

No observer grows with the number of values. Each has a state of arrays, by which the cache keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import numpy as np

from qcompiler.calibrate.histogram import Histogram, pieces
from qcompiler.calibrate.ranges import entropy_range, mse_range, percentile_range
from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.scheme import Scheme

Method = Literal["minmax", "percentile", "mse", "entropy"]


class Observer(Protocol):
    """Something that watches one value of the graph while data runs through it."""

    seen: int
    """How many numbers it was shown; 0 means that the place was never reached, or always empty."""

    def update(self, x: Array) -> None:
        """See one more activation, of any shape; raises CalibrationError for NaN and infinity."""

    def state(self) -> dict[str, Array]:
        """Everything it knows, as arrays."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what :meth:`state` of an observer with the same :meth:`key` gave; raises ValueError."""

    def key(self) -> str:
        """Text that names what is remembered: observers with the same key can share a state."""

    def stand_in(self, shape: tuple[int, ...]) -> None:
        """Pretend to have seen values in -1..1 of ``shape``: for planning, which runs nothing."""


class RangeObserver:
    """The range of a whole tensor: exact for ``minmax``, chosen from a streaming histogram for the other methods.

    ``percentile`` cuts that share off each end (99.99 leaves 0.01 % of the values beyond either); ``mse`` takes the
    range that loses the least of the values once they are quantized; ``entropy`` that of the least Kullback-Leibler
    divergence. Formulas and sources stand in :mod:`qcompiler.calibrate.ranges`.
    """

    def __init__(self, method: Method = "minmax", percentile: float = 99.99, bins: int = 4096) -> None:
        if method not in get_args(Method):
            raise RecipeError(f"a range is found by {', '.join(get_args(Method))}, not {method!r}")
        if not 50.0 < percentile <= 100.0:
            raise RecipeError(f"a percentile lies above 50 and is at most 100, not {percentile}")
        self.method, self.percentile = method, percentile
        self.seen = 0
        self.lo, self.hi = math.inf, -math.inf
        """The least and the greatest value seen; infinite while there is none."""
        self.histogram = None if method == "minmax" else Histogram(bins)

    def update(self, x: Array) -> None:
        if self.histogram is not None:
            self.histogram.add(x)
            self.lo, self.hi = self.histogram.lo, self.histogram.hi
        else:
            for piece in pieces(x):
                self.lo, self.hi = min(self.lo, float(piece.min())), max(self.hi, float(piece.max()))
        self.seen += int(np.size(x))

    def range(self, scheme: Scheme) -> tuple[float, float]:
        """The range to quantize under ``scheme``, ``lo <= 0 <= hi``; (0, 0) when nothing was seen."""
        if not self.seen:
            return 0.0, 0.0
        lo, hi = min(self.lo, 0.0), max(self.hi, 0.0)
        match self.method:
            case "minmax":
                return lo, hi
            case "percentile":
                assert self.histogram is not None
                return percentile_range(self.histogram, self.percentile)
            case "mse":
                assert self.histogram is not None
                return mse_range(self.histogram, scheme)
        assert self.histogram is not None
        return entropy_range(self.histogram, scheme)

    def state(self) -> dict[str, Array]:
        own = {"seen": np.array(self.seen, np.int64), "ends": np.array([self.lo, self.hi])}
        return own if self.histogram is None else self.histogram.state() | {"seen": own["seen"]}

    def restore(self, state: Mapping[str, Array]) -> None:
        seen, ends = int(state["seen"]), state["ends"]
        if self.histogram is not None:
            self.histogram.restore(dict(state))
            if self.histogram.total != seen:
                raise ValueError("a histogram that counted another number of values")
        self.seen, self.lo, self.hi = seen, float(ends[0]), float(ends[1])

    def key(self) -> str:
        return "minmax" if self.histogram is None else f"histogram {self.histogram.bins}"

    def stand_in(self, shape: tuple[int, ...]) -> None:
        self.update(np.linspace(-1.0, 1.0, 1024, dtype=np.float32))


class ChannelObserver:
    """The range of each slice along ``axis``: ``lo``, ``hi`` and ``absmax``, float32 or float64 ``[C]``.

    They are empty before the first value.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.seen = 0
        self.lo: Array = np.zeros(0, np.float32)
        self.hi: Array = np.zeros(0, np.float32)

    @property
    def absmax(self) -> Array:
        """The greatest magnitude of each channel."""
        out: Array = np.maximum(np.abs(self.lo), np.abs(self.hi))
        return out

    def update(self, x: Array) -> None:
        x = np.atleast_1d(np.asarray(x))
        for _ in pieces(x):
            pass  # refuses what is no number
        rest = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        if not x.size:
            return
        wide = np.float64 if x.dtype == np.float64 else np.float32
        lo, hi = x.min(axis=rest).astype(wide), x.max(axis=rest).astype(wide)
        if self.seen:
            if lo.shape != self.lo.shape:
                raise CalibrationError(f"has {lo.size} channels along axis {self.axis}, and {self.lo.size} before")
            lo, hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)
        self.lo, self.hi = lo, hi
        self.seen += x.size

    def state(self) -> dict[str, Array]:
        return {"seen": np.array(self.seen, np.int64), "lo": self.lo, "hi": self.hi}

    def restore(self, state: Mapping[str, Array]) -> None:
        lo, hi = state["lo"], state["hi"]
        if lo.ndim != 1 or lo.shape != hi.shape:
            raise ValueError("channel ranges of another form")
        self.seen, self.lo, self.hi = int(state["seen"]), lo, hi

    def key(self) -> str:
        return f"channels {self.axis}"

    def stand_in(self, shape: tuple[int, ...]) -> None:
        count = shape[self.axis] if shape else 1
        self.update(np.stack([-np.ones(count, np.float32), np.ones(count, np.float32)]).reshape(2, count))


class RowSample:
    """A uniform sample of at most ``rows`` rows along the last axis: ``rows`` is float ``[R, K]``, in order of arrival.

    Each row draws a number from the seed and the rows with the least numbers stay (reservoir sampling by random
    keys, after Li 1994, "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))"). The draw of a row
    depends on its place in the stream alone: samples with one seed of values with the same number of rows hold the
    same rows.
    """

    def __init__(self, rows: int = 512, seed: int = 0) -> None:
        if rows < 1:
            raise RecipeError(f"a sample holds at least one row, not {rows}")
        self.limit, self.seed = rows, seed
        self.seen = 0
        self.rows: Array = np.zeros((0, 0), np.float32)
        self._keys: Array = np.zeros(0)
        self._passed = 0
        self._rng = np.random.default_rng(seed)

    def update(self, x: Array) -> None:
        x = np.asarray(x)
        for _ in pieces(x):
            pass  # refuses what is no number
        if not x.size:
            return
        flat = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        keys = self._rng.random(len(flat))
        if len(self.rows):
            if flat.shape[1] != self.rows.shape[1]:
                raise CalibrationError(f"has rows of {flat.shape[1]} values, and of {self.rows.shape[1]} before")
        bar = self._keys.max() if len(self._keys) >= self.limit else math.inf
        chosen = np.flatnonzero(keys < bar)
        if len(chosen) > self.limit:
            chosen = np.sort(chosen[np.argpartition(keys[chosen], self.limit - 1)[: self.limit]])
        both = np.concatenate([self._keys, keys[chosen]])
        new = flat[chosen].astype(np.float64 if flat.dtype == np.float64 else np.float32, copy=False)
        rows = np.concatenate([self.rows, new]) if len(self.rows) else new
        if len(both) > self.limit:
            kept = np.sort(np.argpartition(both, self.limit - 1)[: self.limit])
            both, rows = both[kept], rows[kept]
        self._keys, self.rows = both, np.ascontiguousarray(rows)
        self._passed += len(flat)
        self.seen += x.size

    def state(self) -> dict[str, Array]:
        counts = np.array([self.seen, self._passed], np.int64)
        return {"counts": counts, "rows": self.rows, "keys": self._keys}

    def restore(self, state: Mapping[str, Array]) -> None:
        counts, rows, keys = state["counts"], state["rows"], state["keys"]
        if counts.shape != (2,) or rows.ndim != 2 or keys.shape != rows.shape[:1] or len(rows) > self.limit:
            raise ValueError("a sample of another form")
        self.seen, self._passed = (int(v) for v in counts)
        self.rows, self._keys = rows, keys
        self._rng = np.random.default_rng(self.seed)
        self._rng.bit_generator.advance(self._passed)  # type: ignore[attr-defined]  # PCG64 draws one number a row

    def key(self) -> str:
        return f"rows {self.limit} {self.seed}"

    def stand_in(self, shape: tuple[int, ...]) -> None:
        width = shape[-1] if shape else 1
        self.update(np.random.default_rng(self.seed).uniform(-1, 1, (min(self.limit, 16), width)).astype(np.float32))
