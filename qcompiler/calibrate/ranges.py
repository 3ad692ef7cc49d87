"""Which range to quantize, read from a histogram: percentile, least squared error, least divergence.

Every range includes zero. Exact zeros have a code of their own under any range, so they are left out of errors and
divergences; within a bin the values count as spread evenly.
"""

from __future__ import annotations

import math

import numpy as np

from qcompiler.calibrate.histogram import Counts, Floats, Histogram
from qcompiler.clipping import affine_params
from qcompiler.dtypes import F32
from qcompiler.errors import RecipeError
from qcompiler.float_codes import table
from qcompiler.scheme import Scheme

COARSE = tuple(2.0 ** (-i / 8) for i in range(81))
"""What a range is shrunk by in the search for the least error: down to 1/1024, so that it can leave far outliers."""
FINE = tuple(2.0 ** (i / 64) for i in range(-7, 8))
"""Steps around the best of the coarse ones."""
CANDIDATES = 256
"""At most so many thresholds are tried in the search for the least divergence."""
SMOOTHING = 1e-4
"""Share of a quantized distribution that is spread evenly, so that no place has probability zero."""


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range between the ``100 - percentile`` and the ``percentile`` quantile, zero included."""
    share = percentile / 100
    return min(quantile(histogram, 1 - share), 0.0), max(quantile(histogram, share), 0.0)


def quantile(histogram: Histogram, share: float) -> float:
    """The value below which ``share`` of all values lie, off by less than the width of a bin.

    Interpolated linearly between the two nearest ranks, as :func:`numpy.quantile` does.
    """
    wanted = share * (histogram.total - 1)
    rank = math.floor(wanted)
    low, high = _ranked(histogram, rank), _ranked(histogram, min(rank + 1, histogram.total - 1))
    return low + (high - low) * (wanted - rank)


def _ranked(histogram: Histogram, rank: int) -> float:
    """About the value that ``rank`` values are less than: somewhere in the bin where it lies, exact for zero."""
    below = int(np.clip(-histogram.first, 0, len(histogram.counts)))  # bins of negative values, which end at zero
    counts = np.concatenate([histogram.counts[:below], [histogram.zeros], histogram.counts[below:]])
    upto = np.cumsum(counts)
    at = int(np.searchsorted(upto, rank, side="right"))
    if at == below:
        return 0.0
    inside = (rank - (upto[at] - counts[at]) + 0.5) / counts[at]
    left = (histogram.first + at - (at > below)) * histogram.width
    return float(np.clip(left + inside * histogram.width, histogram.lo, histogram.hi))


# -- least squared error -----------------------------------------------------------------------------------------


def mse_range(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range under which quantizing by ``scheme`` loses least: the sum of squared errors of all values.

    The whole range is shrunk by :data:`COARSE` and then :data:`FINE` factors, an asymmetric one afterwards at each end
    alone (the search of OMSE: Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient
    Inference"). The error of a bin is the exact integral of rounding and clipping over its evenly spread values.
    """
    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    if not len(histogram.counts):
        return lo, hi
    edges, counts = histogram.edges, histogram.counts
    filled = np.flatnonzero(counts)
    # Bins hold nothing beyond the extremes: an even spread there would make every range seem to clip.
    left = np.maximum(edges[filled], histogram.lo)
    right = np.maximum(np.minimum(edges[filled + 1], histogram.hi), left)
    weight = counts[filled].astype(np.float64)

    def best(tried: list[tuple[float, float]]) -> tuple[float, float]:
        return min(tried, key=lambda r: squared_error(left, right, weight, r, scheme))

    found = best([(lo * f, hi * f) for f in COARSE])
    ends = [(1, 1)]
    if not scheme.symmetric and lo < 0 < hi:
        ends += [(1, 0), (0, 1)]
    for move_lo, move_hi in ends:
        factors = FINE if (move_lo, move_hi) == (1, 1) else (*COARSE, *FINE)
        tried = [found]
        for f in factors:
            tried.append((max(found[0] * (f if move_lo else 1), lo), min(found[1] * (f if move_hi else 1), hi)))
        found = best(tried)
    return found


def squared_error(left: Floats, right: Floats, counts: Floats, ends: tuple[float, float], scheme: Scheme) -> float:
    """The sum of squared errors of ``counts`` values spread evenly over ``left..right``, quantized in ``ends``."""
    scale, zero = affine_params(np.array(ends[0]), np.array(ends[1]), scheme, F32)
    step = float(scale)
    if not scheme.dtype.is_integer:
        return _float_error(left, right, counts, step, scheme)
    offset = 0 if zero is None else int(zero)
    least, most = (scheme.dtype.qmin - offset) * step, (scheme.dtype.qmax - offset) * step
    a, b = np.clip(left, least, most), np.clip(right, least, most)
    rounding = (_rounding(b / step) - _rounding(a / step)) * step**3
    clipping = _clipping(left, right, least, most)
    width = right - left
    point = width <= 0
    mean = np.divide(rounding + clipping, width, out=np.zeros_like(width), where=~point)
    if point.any():
        at = left[point]
        nearest = np.clip(np.rint(at / step) * step, least, most)
        mean[point] = np.square(at - nearest)
    return float(np.dot(mean, counts))


def _clipping(left: Floats, right: Floats, least: float, most: float) -> Floats:
    """The integral over each bin of the squared distance from ``least..most``."""
    out: Floats = (_cubed(right - most) - _cubed(left - most) + _cubed(least - left) - _cubed(least - right)) / 3
    return out


def _float_error(left: Floats, right: Floats, counts: Floats, step: float, scheme: Scheme) -> float:
    """As :func:`squared_error` for float codes: between the middles of two neighbours the error is a parabola."""
    known = table(scheme.dtype)
    values = np.unique(known[~np.isnan(known)]) * step
    middles = (values[1:] + values[:-1]) / 2
    a, b = np.clip(left, values[0], values[-1]), np.clip(right, values[0], values[-1])
    from_start = np.concatenate([[0.0], np.cumsum((values[1:] - values[:-1]) ** 3 / 12)])  # from value to value

    def integral(x: Floats) -> Floats:
        at = np.searchsorted(middles, x)
        out: Floats = from_start[at] + (x - values[at]) ** 3 / 3
        return out

    width = right - left
    total = integral(b) - integral(a) + _clipping(left, right, float(values[0]), float(values[-1]))
    mean = np.divide(total, width, out=np.zeros_like(width), where=width > 0)
    point = width <= 0
    mean[point] = np.square(left[point] - values[np.searchsorted(middles, left[point])])
    return float(np.dot(mean, counts))


def _rounding(u: Floats) -> Floats:
    """The integral of ``(v - round(v))**2`` from 0 to ``u``: 1/12 for each whole step, a cubic in between."""
    whole = np.rint(u)
    out: Floats = whole / 12 + (u - whole) ** 3 / 3
    return out


def _cubed(x: Floats) -> Floats:
    out: Floats = np.maximum(x, 0.0) ** 3
    return out


# -- least divergence --------------------------------------------------------------------------------------------


def entropy_range(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range that, clipped at ``-t`` and ``t``, changes the distribution of the values least.

    For each threshold t the values beyond it are moved to its ends, and the Kullback-Leibler divergence of that
    distribution from its quantized form is taken (Migacz, "8-bit Inference with TensorRT", GTC 2017). Unlike there, a
    tensor of both signs keeps its own ends: the range is ``max(lo, -t) .. min(hi, t)``, and as many levels are
    counted as ``scheme`` has codes in it.
    """
    if not scheme.dtype.is_integer:
        raise RecipeError(f"the least divergence is found among even steps, and <{scheme.text}> has none; use 'mse'")
    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    counts, first = histogram.counts, histogram.first
    if not len(counts):
        return lo, hi
    below, above = max(-first, 0), max(first + len(counts), 0)
    most = max(below, above)
    best, chosen = math.inf, (lo, hi)
    for t in _thresholds(most):
        start, stop = max(-below, -t) - first, min(above, t) - first
        ends = max(lo, -t * histogram.width), min(hi, t * histogram.width)
        levels = code_count(*ends, scheme)
        if t < most and stop - start < levels:
            continue  # finer than the histogram can tell
        found = divergence(counts, start, stop, min(levels, stop - start))
        if found <= best:  # of equals the wider one
            best, chosen = found, ends
    return chosen


def _thresholds(most: int) -> list[int]:
    """Thresholds in bins, ascending, the whole range last."""
    step = max(1, most // CANDIDATES)
    return sorted({*range(most, 0, -step)})


def code_count(lo: float, hi: float, scheme: Scheme) -> int:
    """How many codes of ``scheme`` values in lo..hi take."""
    scale, _ = affine_params(np.array(lo), np.array(hi), scheme, F32)
    return min(round((hi - lo) / float(scale)) + 1, scheme.dtype.qmax - scheme.dtype.qmin + 1)


def divergence(counts: Counts, start: int, stop: int, levels: int) -> float:
    """Kullback-Leibler divergence of bins ``start:stop`` from their quantized form; infinite for an empty range.

    The first distribution has the counts outside added to its end bins. In the second each of ``levels`` runs of bins
    has its own counts (without those from outside) spread evenly over its filled bins.
    """
    p = counts[max(start, 0) : stop].astype(np.float64)
    if start < 0:  # the range reaches from zero to where the counts begin
        p = np.concatenate([np.zeros(-start), p])
    if stop > len(counts):
        p = np.concatenate([p, np.zeros(stop - len(counts))])
    n = len(p)
    if n == 0 or not p.any():
        return math.inf
    starts = np.unique((np.arange(levels) * n) // levels)
    filled = np.add.reduceat((p > 0).astype(np.float64), starts)
    mass = np.add.reduceat(p, starts)
    even = np.divide(mass, filled, out=np.zeros_like(mass), where=filled > 0)
    q = np.repeat(even, np.diff(np.append(starts, n))) * (p > 0)
    p[0] += counts[: max(start, 0)].sum()
    p[-1] += counts[stop:].sum()
    p /= p.sum()
    q = (1 - SMOOTHING) * q / q.sum() + SMOOTHING / n
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
