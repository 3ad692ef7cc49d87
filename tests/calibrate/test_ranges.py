"""Ranges from histograms against straightforward computations on the values themselves."""

import math

import numpy as np
import pytest

from qcompiler.calibrate.histogram import Histogram
from qcompiler.calibrate.observers import RangeObserver
from qcompiler.calibrate.ranges import SMOOTHING, divergence, quantile, squared_error
from qcompiler.clipping import affine_params
from qcompiler.dtypes import F32
from qcompiler.numerics import dequantize, quantize
from qcompiler.scheme import Scheme, parse_scheme
from tests.calibrate.samples import KINDS

U8, S8 = parse_scheme("uint8 tensor asym"), parse_scheme("int8 tensor sym")
N = 50_000


def error(x: np.ndarray, ends: tuple[float, float], scheme: Scheme) -> float:
    """Mean squared error of ``x`` quantized in the range ``ends``."""
    scale, zero = affine_params(np.array(ends[0]), np.array(ends[1]), scheme, F32)
    seen = dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme, F32)
    return float(np.mean(np.square(seen.astype(np.float64) - x)))


@pytest.mark.parametrize("percentile", [50.1, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_within_a_bin_of_the_exact_ones(kind: str, percentile: float) -> None:
    x = KINDS[kind](N)
    histogram = Histogram(2048)
    for piece in np.array_split(x, 7):
        histogram.add(piece)
    for share in (percentile / 100, 1 - percentile / 100):
        assert abs(quantile(histogram, share) - np.quantile(x.astype(np.float64), share)) <= histogram.width


def test_a_percentile_leaves_out_the_outlier() -> None:
    x = np.concatenate([KINDS["normal"](N), np.array([1000.0, -500.0], np.float32)])
    observer = RangeObserver("percentile", 99.9)
    observer.update(x)
    lo, hi = observer.range(U8)
    assert -4 < lo < -2.5
    assert 2.5 < hi < 4


@pytest.mark.parametrize("scheme", [U8, S8], ids=str)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"few values"}))
def test_the_error_from_the_histogram_is_that_of_the_values(kind: str, scheme: Scheme) -> None:
    """Within 3 %: the histogram has 2048 to 4096 bins, the tested ranges 255 steps, so a step spans several bins."""
    x = KINDS[kind](N)
    histogram = Histogram(4096)
    histogram.add(x)
    edges = histogram.edges
    left = np.maximum(edges[:-1], histogram.lo)
    right = np.minimum(edges[1:], histogram.hi)
    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    for factor in (1.0, 0.8, 0.5):
        ends = (lo * factor, hi * factor)
        found = squared_error(left, right, histogram.counts.astype(float), ends, scheme) / x.size
        assert found == pytest.approx(error(x, ends, scheme), rel=0.03)


@pytest.mark.parametrize("scheme", [U8, S8, parse_scheme("int4 tensor sym")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_loses_no_more_than_any_range_of_a_grid(kind: str, scheme: Scheme) -> None:
    """Against the full range, percentiles and a grid of shrunken ranges, on the values themselves; 3 % for bins."""
    x = KINDS[kind](N)
    observer = RangeObserver("mse")
    observer.update(x)
    found = error(x, observer.range(scheme), scheme)
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    grid = [(lo * f, hi * f) for f in np.linspace(0.05, 1, 40)]
    if not scheme.symmetric:
        grid += [(lo * f, hi * g) for f in np.linspace(0.1, 1, 7) for g in np.linspace(0.1, 1, 7)]
    for percentile in (99.0, 99.9, 99.99):
        other = RangeObserver("percentile", percentile)
        other.update(x)
        grid.append(other.range(scheme))
    assert found <= 1.03 * min(error(x, ends, scheme) for ends in grid) + 1e-12


# -- divergence --------------------------------------------------------------------------------------------------


def plain_divergence(counts: list[int], start: int, stop: int, levels: int) -> float:
    """What Migacz describes, one bin at a time."""
    reference = [float(c) for c in counts[start:stop]]
    n = len(reference)
    level_of = [max(level for level in range(levels) if level * n // levels <= i) for i in range(n)]
    quantized = [0.0] * n
    for level in range(levels):
        members = [i for i in range(n) if level_of[i] == level]
        nonzero = [i for i in members if reference[i] > 0]
        for i in nonzero:
            quantized[i] = sum(reference[j] for j in members) / len(nonzero)
    reference[0] += sum(counts[:start])
    reference[-1] += sum(counts[stop:])
    p = [r / sum(reference) for r in reference]
    q = [(1 - SMOOTHING) * v / sum(quantized) + SMOOTHING / n for v in quantized]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("seed", range(20))
def test_divergence_against_a_straightforward_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.uniform(0.2, 30), rng.integers(20, 90))
    start = int(rng.integers(0, 5))
    stop = int(rng.integers(start + 9, len(counts) + 1))
    levels = int(rng.integers(2, stop - start + 1))
    found = divergence(counts.astype(np.int64), start, stop, levels)
    assert found == pytest.approx(plain_divergence(counts.tolist(), start, stop, levels), rel=1e-9, abs=1e-12)


def test_divergence_is_zero_where_nothing_is_lost() -> None:
    counts = np.full(64, 5, np.int64)
    assert divergence(counts, 0, 64, 16) == pytest.approx(0.0, abs=1e-12)
    assert divergence(counts, 0, 48, 16) > 0.1
    assert divergence(np.zeros(8, np.int64), 0, 8, 2) == math.inf


@pytest.mark.parametrize(("kind", "most"), [("laplace", 0.97), ("heavy", 0.5)])
def test_entropy_clips_long_tails(kind: str, most: float) -> None:
    """The longer the tail, the more of it goes: as much as the classic search over 2048 magnitudes clips, about."""
    x = KINDS[kind](400_000)
    observer = RangeObserver("entropy")
    observer.update(x)
    for scheme in (U8, S8):
        lo, hi = observer.range(scheme)
        assert max(-lo, hi) < most * np.abs(x).max()
        if kind == "laplace":  # where tails are heavy, clipping costs more squared error than it saves
            assert error(x, (lo, hi), scheme) < error(x, (float(x.min()), float(x.max())), scheme)


def test_entropy_keeps_what_is_even() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 400_000).astype(np.float32)
    observer = RangeObserver("entropy")
    observer.update(x)
    lo, hi = observer.range(U8)
    assert hi > 0.97
    assert lo < -0.97
