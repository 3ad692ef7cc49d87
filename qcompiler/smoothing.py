"""SmoothQuant: factors that move the difficulty of quantizing from activations to weights, and the search for how far.

For linears ``y = x @ W^T`` that share the input ``x[.., K]`` and any positive ``s[K]``::

    x @ W^T  ==  (x / s) @ (W * s)^T        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

``max|x_j|`` is the largest magnitude of input channel j over the calibration data, ``max|w_j|`` that of column j over
the weights of all the linears. At alpha 0 all columns of the weights come to the same magnitude, at alpha 1 all
channels of the activation. Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models", ICML 2023, arXiv 2211.10438, equations 3 and 4. The paper chooses one alpha for a whole model;
here it is chosen for each group of linears, by the error of what the quantized group puts out; and channels that were
quiet in the calibration data count as loud as the median one (:func:`magnitudes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.clipping import affine_params
from qcompiler.dtypes import F32, Array, to_bytes
from qcompiler.errors import InputError
from qcompiler.numerics import dequantize, q_linear, quantize
from qcompiler.payload import CHUNK, Payload
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import Scheme

LIMIT = 1e5
"""Factors lie in 1/LIMIT..LIMIT: products with f32 values of ordinary size stay far from overflow and underflow."""

OUTPUTS = 1024
"""Output features of a group that are computed at a time."""


def smoothing_factors(x_absmax: Array, w_absmax: Array, alpha: float) -> Array:
    """``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``: float32 ``[K]``, positive and finite.

    ``x_absmax`` and ``w_absmax`` are ``[K]``, not negative. A channel has factor 1 where either is zero, infinite or
    NaN (it was never seen, or nothing reads it); other factors are limited to 1/LIMIT..LIMIT. Raises InputError for
    an alpha outside 0..1 or lengths that differ.
    """
    x, w = np.asarray(x_absmax, np.float64), np.asarray(w_absmax, np.float64)
    if x.ndim != 1 or x.shape != w.shape:
        raise InputError(f"the magnitudes of channels are two vectors [K], not {list(x.shape)} and {list(w.shape)}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is a number from 0 to 1, not {alpha}")
    known = np.isfinite(x) & np.isfinite(w) & (x > 0) & (w > 0)
    x, w = np.where(known, x, 1.0), np.where(known, w, 1.0)
    factors = x**alpha / w ** (1 - alpha)  # as operators: exponents 0, 0.5 and 1 are exact, the same bits everywhere
    out: Array = np.where(known, np.clip(factors, 1 / LIMIT, LIMIT), 1.0).astype(np.float32)
    return out


def magnitudes(absmax: Array) -> Array:
    """``absmax[K]`` with the quiet channels raised to the median of those that are not zero: float64 ``[K]``.

    A factor makes a quiet channel louder, up to the edge of the range at alpha 1. But channels that were quiet in the
    calibration data (features of a text that it did not hold) may be loud in other data, which then clips them: on a
    sentence encoder calibrated on captions and judged on news, alpha 0.8 gives cosine 0.97 without this and 0.99 with.
    """
    found = np.asarray(absmax, np.float64)
    heard = found[np.isfinite(found) & (found > 0)]
    return np.maximum(found, np.median(heard)) if len(heard) else found


def column_absmax(weight: Payload, axis: int) -> Array:
    """The largest magnitude of each slice of a matrix along ``axis`` (that of K): float64 ``[K]``, read piece by piece.

    NaN where a slice holds one.
    """
    found = np.zeros(weight.shape[axis])
    with np.errstate(invalid="ignore"):
        for start, part in row_pieces(weight):
            magnitudes = np.abs(part).max(axis=1 - axis)
            at = slice(start, start + len(part)) if axis == 0 else slice(None)
            found[at] = np.maximum(found[at], magnitudes)
    return found


def row_pieces(weight: Payload) -> Iterator[tuple[int, Array]]:
    """The rows of a tensor in pieces of about ``payload.CHUNK`` bytes, each with the number of its first row."""
    if not weight.size:
        return
    if type(weight).rows is Payload.rows:  # it has no rows of its own: asking for some would compute all each time
        yield 0, weight.array()
        return
    rows = weight.shape[0]
    step = max(1, CHUNK * rows // max(1, weight.nbytes))
    for start in range(0, rows, step):
        yield start, weight.rows(start, min(start + step, rows))


@dataclass(eq=False)
class Rescaled(Payload):
    """``source`` times ``factors`` along ``axis``, computed when it is read, in the dtype of ``source``.

    ``factors`` is ``[C]``, ``C`` the size of that axis. Rows are read from the source as rows, so it streams as that
    does. Raises InputError where the sizes differ.
    """

    source: Payload
    factors: Array
    axis: int

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.source.dtype, self.source.shape
        self.axis %= len(self.shape)
        if self.factors.shape != (self.shape[self.axis],):
            raise InputError(f"{list(self.factors.shape)} factors for axis {self.axis} of {list(self.shape)}")

    def _times(self, values: Array, factors: Array) -> Array:
        shape = [-1 if i == self.axis else 1 for i in range(values.ndim)]
        # f32 times f32 rounds once; narrower types go through f32, as NumPy would make of them
        out: Array = (values * factors.reshape(shape)).astype(values.dtype, copy=False)
        return out

    def array(self) -> Array:
        return self._times(self.source.array(), self.factors)

    def rows(self, start: int, stop: int) -> Array:
        part = self.source.rows(start, stop)
        return self._times(part, self.factors[start:stop] if self.axis == 0 else self.factors)

    def chunks(self, limit: int = CHUNK) -> Iterator[bytes | memoryview]:
        if self.dtype.packed:
            yield from super().chunks(limit)
            return
        for _, part in row_pieces(self):
            data = memoryview(to_bytes(part, self.dtype))
            for at in range(0, len(data), limit):
                yield data[at : at + limit]

    def release(self) -> None:
        """Forget what the source keeps."""
        self.source.release()

    def ref(self) -> str | None:
        return f"rescaled[axis={self.axis}]({self.source.ref() or self.dtype})"


# -- the search -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activation:
    """What is known of the input that a group of linears shares.

    ``rows`` is a sample of it ``[R, K]``; ``lo`` and ``hi`` are the least and greatest value of each channel over all
    *other* data, ``[K]``: candidates are fitted to those ranges and judged on the rows. Without that the largest alpha
    looks best: where all channels come to the same magnitude, every one of them clips what the data had no larger.
    """

    rows: Array
    lo: Array
    hi: Array

    @property
    def fitted(self) -> Array:
        """The largest magnitude of each channel outside ``rows``, ``[K]``."""
        out: Array = np.maximum(np.abs(self.lo), np.abs(self.hi))
        return out

    @property
    def absmax(self) -> Array:
        """The largest magnitude of each channel over all data, ``[K]``."""
        out: Array = np.maximum(self.fitted, np.abs(self.rows).max(axis=0, initial=0))
        return out


@dataclass(frozen=True)
class W8A8:
    """How a group is quantized: its weights ``[N, K]`` (granularity channel or tensor), and its per-tensor input."""

    weights: Scheme
    activations: Scheme

    def __post_init__(self) -> None:
        if self.weights.granularity not in ("channel", "tensor", "group"):
            raise InputError(f"<{self.weights}>: weights are quantized per channel, tensor or group here")
        if self.activations.granularity not in ("tensor", "token"):
            raise InputError(f"<{self.activations}>: activations are quantized per tensor or per token here")


def rounded_rows(known: Activation, factors: Array, scheme: Scheme) -> Array:
    """The rows of ``known`` divided by ``factors[K]``, quantized by ``scheme`` and dequantized: float32 ``[R, K]``.

    A static range is that of the data beside them: after the division by ``s`` it runs from ``min(lo_j / s_j)`` to
    ``max(hi_j / s_j)``, and clips rows that leave it. A dynamic one is taken from the rows, together or (per token)
    each for itself.
    """
    rows = (known.rows / factors).astype(np.float32)
    if not scheme.dynamic:
        lo, hi = np.asarray((known.lo / factors).min()), np.asarray((known.hi / factors).max())
    elif scheme.granularity == "tensor":
        lo, hi = np.asarray(rows.min()), np.asarray(rows.max())
    else:
        lo, hi = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    scale, zero = affine_params(lo.astype(np.float64), hi.astype(np.float64), scheme, F32)
    return dequantize(quantize(rows, scale, zero, scheme), scale, zero, scheme, F32)


def product_error(want: Array, rows: Array, weight: Array, factors: Array, scheme: Scheme) -> float:
    """Squared error of ``rows[R, K] @ quantized(weight * factors)^T`` against ``want[R, N]``, over the square of that.

    ``weight`` is ``[N, K]`` float32, ``rows`` what :func:`rounded_rows` gives. 0 where ``want`` is all zero and met.
    """
    axis = {"channel": 0, "group": 1, "tensor": None}[scheme.granularity]
    oriented = scheme.with_axis(axis)
    made = quantize_weight(weight * factors, oriented)
    noise = 0.0
    plain = made.zero is None and scheme.granularity != "group" and scheme.dtype.is_integer
    for at in range(0, len(weight), OUTPUTS):
        part = slice(at, at + OUTPUTS)
        if plain:  # the scale of a row goes to its sums, which leaves one product of floats
            got = (rows @ made.codes[part].astype(np.float32).T) * (made.scale if axis is None else made.scale[part])
        else:
            got = _general(rows, made.codes[part], made.scale, made.zero, oriented, part)
        noise += float(np.square(got - want[:, part], dtype=np.float64).sum())
    signal = float(np.square(want, dtype=np.float64).sum())
    return noise / signal if signal > 0 else (0.0 if noise == 0 else math.inf)


def _general(rows: Array, codes: Array, scale: Array, zero: Array | None, scheme: Scheme, part: slice) -> Array:
    """The product with codes of any scheme; parameters are ``[N]`` or ``[N, G]`` or, per tensor, ``[]``."""

    def shaped(params: Array) -> Array:
        return params.reshape(1, 1) if scheme.granularity == "tensor" else params.reshape(len(params), -1)[part]

    return q_linear(rows, codes, shaped(scale), None if zero is None else shaped(zero), None, scheme.with_axis(1))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a search found: ``alpha`` (None: no smoothing) and its error, and all that it tried.

    ``factors`` ``[K]`` are those of alpha for all the data, the rows that it was judged on included. ``errors`` are
    pairs of alpha and error: the mean over the linears of squared error over squared output.
    """

    alpha: float | None
    factors: Array
    error: float
    errors: tuple[tuple[float | None, float], ...]

    def error_of(self, alpha: float | None) -> float:
        """The error at ``alpha``; raises KeyError where it was not tried."""
        return dict(self.errors)[alpha]


def candidates(grid: Sequence[float], w_absmax: Array, known: Activation) -> list[tuple[float | None, Array]]:
    """Every alpha to try with its factors, the least smoothing first: none at all, then ``grid`` and 0.5 ascending.

    The factors are fitted to the data outside ``known.rows``.
    """
    alphas = sorted({*grid, 0.5})
    ones: Array = np.ones(len(w_absmax), np.float32)
    return [(None, ones), *((a, smoothing_factors(magnitudes(known.fitted), w_absmax, a)) for a in alphas)]


def search_alpha(
    known: Activation,
    weights: Sequence[Callable[[], Array]],
    w_absmax: Array,
    scheme: W8A8,
    grid: Sequence[float],
) -> Choice:
    """The alpha whose quantized group is nearest to the float one on ``known.rows``.

    ``weights`` give the matrices ``[N, K]`` float32, each asked for once and held alone; ``w_absmax`` is ``[K]`` over
    all of them. No smoothing and alpha 0.5 are always tried, so the result is at least as good as either on these
    rows; of equal errors the one with less smoothing wins. Raises InputError for an empty sample.
    """
    if not known.rows.size or not weights:
        raise InputError("a search needs rows of the activation and at least one weight")
    tried = candidates(grid, w_absmax, known)
    rounded = [rounded_rows(known, factors, scheme.activations) for _, factors in tried]
    totals = np.zeros(len(tried))
    for load in weights:
        weight = np.asarray(load(), np.float32)
        want = known.rows.astype(np.float32) @ weight.T
        for i, (_, factors) in enumerate(tried):
            totals[i] += product_error(want, rounded[i], weight, factors, scheme.weights) / len(weights)
    best = int(np.argmin(totals))  # the first of equals
    errors = tuple((alpha, float(e)) for (alpha, _), e in zip(tried, totals, strict=True))
    alpha = tried[best][0]
    factors = tried[best][1] if alpha is None else smoothing_factors(magnitudes(known.absmax), w_absmax, alpha)
    return Choice(alpha, factors, float(totals[best]), errors)
