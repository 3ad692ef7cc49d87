"""Rows held back from the ranges of all others: what is fitted to those can be judged on these."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qcompiler.calibrate.histogram import pieces
from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError, RecipeError


class HeldBack:
    """A uniform sample of at most ``limit`` rows along the last axis, and the range of each channel over the others.

    A range that was fitted to the very rows it is judged on never clips them, and so looks better than it is. Reservoir
    sampling by random keys, as :class:`~qcompiler.calibrate.observers.RowSample`; a row that leaves the reservoir goes
    into the ranges. Of a stream of fewer than ``2 * limit`` rows :meth:`parts` holds back half.
    """

    def __init__(self, limit: int = 512, seed: int = 0) -> None:
        if limit < 1:
            raise RecipeError(f"a sample holds at least one row, not {limit}")
        self.limit, self.seed = limit, seed
        self.seen = 0
        self._rows: Array = np.zeros((0, 0), np.float32)
        self._keys: Array = np.zeros(0)
        self._lo: Array = np.zeros(0, np.float32)
        self._hi: Array = np.zeros(0, np.float32)
        self._passed = 0
        self._rng = np.random.default_rng(seed)

    def parts(self) -> tuple[Array, Array, Array]:
        """Rows ``[R, K]``, and the least and greatest value ``[K]`` of each channel over all other rows.

        With a single row in all, the ranges are its own.
        """
        extra = min(len(self._rows) - 1, len(self._rows) - self._passed // 2)
        if extra <= 0 and len(self._lo):
            return self._rows, self._lo, self._hi
        order = np.argsort(self._keys)
        held, rest = self._rows[np.sort(order[extra:])], self._rows[order[: max(extra, 1)]]
        return held, *_joined(self._lo, self._hi, rest)

    def update(self, x: Array) -> None:
        """See one more activation, of any shape; raises CalibrationError for NaN, infinity and another width."""
        x = np.asarray(x)
        for _ in pieces(x):
            pass  # refuses what is no number
        if not x.size:
            return
        flat = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        if self._passed and flat.shape[1] != self._rows.shape[1]:
            raise CalibrationError(f"has rows of {flat.shape[1]} values, and of {self._rows.shape[1]} before")
        keys = self._rng.random(len(flat))
        bar = self._keys.max() if len(self._keys) >= self.limit else math.inf
        chosen = keys < bar
        both = np.concatenate([self._keys, keys[chosen]])
        new = flat[chosen].astype(np.float32, copy=False)
        rows = np.concatenate([self._rows, new]) if self._passed else new
        self._lo, self._hi = _joined(self._lo, self._hi, flat[~chosen])
        if len(both) > self.limit:
            stays = np.zeros(len(both), bool)
            stays[np.argpartition(both, self.limit - 1)[: self.limit]] = True
            self._lo, self._hi = _joined(self._lo, self._hi, rows[~stays])
            both, rows = both[stays], rows[stays]
        self._keys, self._rows = both, np.ascontiguousarray(rows)
        self._passed += len(flat)
        self.seen += x.size

    def state(self) -> dict[str, Array]:
        """Everything it knows, as arrays."""
        counts = np.array([self.seen, self._passed], np.int64)
        return {"counts": counts, "rows": self._rows, "keys": self._keys, "lo": self._lo, "hi": self._hi}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what :meth:`state` of an observer with the same :meth:`key` gave; raises ValueError."""
        counts, rows, keys = state["counts"], state["rows"], state["keys"]
        if counts.shape != (2,) or rows.ndim != 2 or keys.shape != rows.shape[:1] or len(rows) > self.limit:
            raise ValueError("rows of another form")
        self.seen, self._passed = (int(v) for v in counts)
        self._rows, self._keys, self._lo, self._hi = rows, keys, state["lo"], state["hi"]
        self._rng = np.random.default_rng(self.seed)
        self._rng.bit_generator.advance(self._passed)  # type: ignore[attr-defined]  # PCG64 draws one number a row

    def key(self) -> str:
        """Text that names what is remembered."""
        return f"held back {self.limit} {self.seed}"

    def stand_in(self, shape: tuple[int, ...]) -> None:
        """Pretend to have seen values in -1..1 of ``shape``."""
        width = shape[-1] if shape else 1
        self.update(np.random.default_rng(self.seed).uniform(-1, 1, (16, width)).astype(np.float32))


def _joined(lo: Array, hi: Array, rows: Array) -> tuple[Array, Array]:
    """The ranges with those of ``rows`` taken in."""
    if not len(rows):
        return lo, hi
    low, high = rows.min(axis=0).astype(np.float32), rows.max(axis=0).astype(np.float32)
    return (np.minimum(lo, low), np.maximum(hi, high)) if len(lo) else (low, high)
