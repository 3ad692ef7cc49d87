"""Observers: streaming says what all values at once would say, in whatever order and pieces they come."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibrate.histogram import PIECE, Histogram, pieces
from qcompiler.calibrate.observers import ChannelObserver, Method, Observer, RangeObserver, RowSample
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.scheme import parse_scheme
from tests.calibrate.samples import KINDS

U8 = parse_scheme("uint8 tensor asym")
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
floats = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32))


def exact_counts(x: np.ndarray, histogram: Histogram) -> np.ndarray:
    """Counts of the values of ``x`` that are not zero, bin by bin, in float64 and one value at a time."""
    out = np.zeros(len(histogram.counts), np.int64)
    for value in x.astype(np.float64):
        if value:
            out[int(np.floor(value / histogram.width)) - histogram.first] += 1
    return out


@settings(deadline=None)
@given(floats, st.integers(1, 5), st.randoms(use_true_random=False))
def test_growth_loses_nothing(x: np.ndarray, parts: int, random) -> None:  # type: ignore[no-untyped-def]
    """Merged bins hold what one histogram of all values would: order and batches leave no trace."""
    whole, streamed = Histogram(64), Histogram(64)
    whole.add(x)
    order = list(range(len(x)))
    random.shuffle(order)
    for piece in np.array_split(x[order], parts):
        streamed.add(piece)
    assert streamed.exponent == whole.exponent
    assert (streamed.first, streamed.zeros) == (whole.first, whole.zeros)
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    np.testing.assert_array_equal(whole.counts, exact_counts(x, whole))
    assert (whole.lo, whole.hi) == (x.min(), x.max())
    assert whole.total == x.size


@given(floats)
def test_bins_are_as_narrow_as_their_number_allows(x: np.ndarray) -> None:
    histogram = Histogram(64)
    histogram.add(x)
    assert len(histogram.counts) <= 64
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    if histogram.exponent is not None:
        assert histogram.width <= 2 * span / 62


def test_values_at_the_ends_of_f32_are_counted() -> None:
    x = np.array([1e-45, -1e-45, 3e38, -3e38, 0.0], np.float32)
    for values in (x[:2], x, x[2:4]):
        histogram = Histogram(64)
        histogram.add(values)
        assert histogram.total == values.size
        np.testing.assert_array_equal(histogram.counts, exact_counts(values, histogram))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_any_number_can_be_watched(dtype: type) -> None:
    x = np.arange(100).astype(dtype)
    for method in METHODS:
        observer = RangeObserver(method)
        observer.update(x.reshape(10, 10))
        lo, hi = observer.range(U8)
        assert lo == 0
        assert 90 < hi <= 99
        assert observer.seen == 100


@given(floats, st.integers(1, 4))
def test_minmax_is_exact_and_includes_zero(x: np.ndarray, parts: int) -> None:
    observer = RangeObserver()
    for piece in np.array_split(x, parts):
        observer.update(piece)
    assert observer.range(U8) == (min(x.min(), 0), max(x.max(), 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_range_lies_within_the_extremes(method: Method, kind: str) -> None:
    x = KINDS[kind](20_000)
    observer = RangeObserver(method)
    observer.update(x)
    for scheme in (U8, parse_scheme("int8 tensor sym")):
        lo, hi = observer.range(scheme)
        assert min(x.min(), 0) <= lo <= 0 <= hi <= max(x.max(), 0)
        assert lo < hi


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [*(lambda m=m: RangeObserver(m) for m in METHODS), ChannelObserver, RowSample])
def test_what_is_no_number_is_refused(make, bad: float) -> None:  # type: ignore[no-untyped-def]
    x = np.ones((3, PIECE // 2), np.float32)
    x[2, -1] = bad
    with pytest.raises(CalibrationError, match=r"holds (1 NaN and 0|0 NaN and 1)"):
        make().update(x)


def test_sums_that_overflow_are_no_infinity() -> None:
    x = np.full(100, 3e38, np.float32)
    assert sum(p.size for p in pieces(x)) == 100


def test_nothing_seen_is_told() -> None:
    for observer in (RangeObserver("mse"), ChannelObserver(), RowSample()):
        observer.update(np.zeros((0, 4), np.float32))
        assert observer.seen == 0
    assert RangeObserver("mse").range(U8) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_have_a_range(method: Method) -> None:
    observer = RangeObserver(method)
    observer.update(np.zeros(10, np.float32))
    assert observer.range(U8) == (0.0, 0.0)
    assert observer.seen == 10


def test_wrong_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="minmax, percentile, mse, entropy"):
        RangeObserver("mean")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="above 50"):
        RangeObserver("percentile", 12)
    with pytest.raises(RecipeError, match="at least one row"):
        RowSample(0)


# -- channels and rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_ranges(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    observer = ChannelObserver(axis)
    shapes = (x, x * 2, -x)
    for each in shapes:
        observer.update(each)
    every = np.concatenate([np.moveaxis(s, axis, -1).reshape(-1, x.shape[axis]) for s in shapes])
    np.testing.assert_array_equal(observer.lo, every.min(0))
    np.testing.assert_array_equal(observer.hi, every.max(0))
    np.testing.assert_array_equal(observer.absmax, np.abs(every).max(0))


def test_channels_cannot_change() -> None:
    observer = ChannelObserver()
    observer.update(np.ones((2, 3), np.float32))
    with pytest.raises(CalibrationError, match="4 channels along axis -1, and 3 before"):
        observer.update(np.ones((2, 4), np.float32))


def test_few_rows_are_all_kept_in_order() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    sample = RowSample(8)
    sample.update(x[0])
    sample.update(x[1])
    np.testing.assert_array_equal(sample.rows, x.reshape(6, 4))


def test_the_sample_does_not_depend_on_batches() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    whole, streamed, other = RowSample(50), RowSample(50), RowSample(50)
    whole.update(x)
    for piece in np.array_split(x, 13):
        streamed.update(piece)
        other.update(piece[:, :2] + 1)
    np.testing.assert_array_equal(whole.rows, streamed.rows)
    np.testing.assert_array_equal(other.rows, whole.rows[:, :2] + 1)  # one seed: the same rows of another value


def test_the_sample_is_uniform() -> None:
    """Each of 400 rows is kept by about a quarter of 2000 samples: within five standard deviations for all of them."""
    counts = np.zeros(400)
    for seed in range(2000):
        sample = RowSample(100, seed)
        for piece in np.array_split(np.arange(400, dtype=np.float32)[:, None], 3):
            sample.update(piece)
        assert len(sample.rows) == 100
        counts[sample.rows[:, 0].astype(int)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


# -- states ------------------------------------------------------------------------------------------------------

OBSERVERS = [*(lambda m=m: RangeObserver(m) for m in METHODS), lambda: ChannelObserver(-1), lambda: RowSample(20)]


@pytest.mark.parametrize("make", OBSERVERS)
def test_a_state_restores_what_was_seen(make) -> None:  # type: ignore[no-untyped-def]
    """A restored observer goes on as the first one would have."""
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    first: Observer = make()
    first.update(x[:30])
    again: Observer = make()
    again.restore({k: v.copy() for k, v in first.state().items()})
    assert again.key() == first.key()
    for each in (first, again):
        each.update(3 * x[30:])
    assert again.seen == first.seen
    for key, value in first.state().items():
        np.testing.assert_array_equal(again.state()[key], value)


@pytest.mark.parametrize("make", OBSERVERS)
def test_a_damaged_state_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    first: Observer = make()
    first.update(np.ones((4, 4), np.float32))
    for key in first.state():
        broken = first.state()
        del broken[key]
        with pytest.raises((KeyError, ValueError)):
            make().restore(broken)


def test_stand_ins_have_what_passes_ask_for() -> None:
    ranged, channels, rows = RangeObserver("entropy"), ChannelObserver(1), RowSample()
    for observer in (ranged, channels, rows):
        observer.stand_in((2, 7, 3))
        assert observer.seen
    lo, hi = ranged.range(U8)
    assert -1 <= lo < 0 < hi <= 1
    np.testing.assert_array_equal(channels.absmax, np.ones(7))
    assert rows.rows.shape == (16, 3)
