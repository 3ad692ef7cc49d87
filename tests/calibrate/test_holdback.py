"""Rows held back: a partition of what passed, whatever the batches, and the same after a restore."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.calibrate.holdback import HeldBack
from qcompiler.errors import CalibrationError


def stream(rows: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).standard_normal((rows, 5)).astype(np.float32)


def shown(x: np.ndarray, limit: int, *cuts: int) -> HeldBack:  # type: ignore[type-arg]
    observer = HeldBack(limit)
    for part in np.split(x, cuts):
        observer.update(part)
    return observer


@pytest.mark.parametrize(("total", "held"), [(1000, 32), (64, 32), (63, 31), (40, 20), (5, 2), (2, 1)])
def test_every_row_is_held_back_or_in_the_ranges(total: int, held: int) -> None:
    x = stream(total)
    rows, lo, hi = shown(x, 32, total // 3).parts()
    assert len(rows) == held
    inside = {r.tobytes() for r in rows}
    rest = np.array([r for r in x if r.tobytes() not in inside])
    assert len(rest) == total - held
    np.testing.assert_array_equal(lo, rest.min(axis=0))
    np.testing.assert_array_equal(hi, rest.max(axis=0))


def test_batches_do_not_matter() -> None:
    x = stream(500)
    for a, b in zip(shown(x, 64).parts(), shown(x, 64, 1, 100, 101, 400).parts(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_is_taken_over() -> None:
    x = stream(500)
    first, again = shown(x[:300], 64), HeldBack(64)
    again.restore(first.state())
    for observer in (first, again):
        observer.update(x[300:])
    for a, b in zip(first.parts(), again.parts(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.seen == 2500
    with pytest.raises(ValueError, match="another form"):
        HeldBack(8).restore(first.state())


def test_one_row_is_its_own_range() -> None:
    rows, lo, hi = shown(stream(1), 8).parts()
    np.testing.assert_array_equal(rows[0], lo)
    np.testing.assert_array_equal(lo, hi)


def test_what_is_no_row_is_refused() -> None:
    observer = shown(stream(3), 8)
    with pytest.raises(CalibrationError, match="rows of 4 values, and of 5 before"):
        observer.update(np.ones((2, 4), np.float32))
    with pytest.raises(CalibrationError, match="1 NaN"):
        observer.update(np.array([[1, 2, 3, 4, np.nan]], np.float32))
