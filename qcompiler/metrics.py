"""How near one model's outputs are to another's: sums that grow with neither the samples nor the outputs.

Everything is float64. ``want`` is the reference's output and ``got`` the compiled model's, of one shape; a result that
does not exist (nothing was added, or a value was not a number) is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]

CHUNK = 1 << 20
"""Values that are looked at together."""
ONE = 1e-3
"""How far the sum of a row may be from 1 for it to be taken as probabilities (float16 outputs included)."""


@dataclass
class Closeness:
    """Cosine by sample, and signal to noise over all samples, of one tensor.

    The cosine of a sample is ``<want, got> / (|want| |got|)`` of the flattened tensors; 1 where both are zero, 0 where
    one is. SQNR is ``10 log10(sum want^2 / sum (want - got)^2)`` over all samples, infinite where there is no error.
    """

    samples: int = 0
    cosines: float = 0.0
    least: float = math.inf
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, want: Array, got: Array, samples: int = 1) -> None:
        """Add ``samples`` samples: the first axis where that is more than one, else the whole tensor."""
        if want.shape != got.shape:
            raise ValueError(f"shapes {want.shape} and {got.shape} are not compared")
        for a, b in zip(want.reshape(samples, -1), got.reshape(samples, -1), strict=True):
            self._add(a, b)

    def _add(self, want: Array, got: Array) -> None:
        aa = bb = ab = noise = 0.0
        for i in range(0, want.size, CHUNK):
            a, b = want[i : i + CHUNK].astype(np.float64), got[i : i + CHUNK].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                d = a - b
                aa, bb, ab = aa + float(a @ a), bb + float(b @ b), ab + float(a @ b)
                noise += float(d @ d)
                self.largest = float(np.maximum(self.largest, np.abs(d).max()))  # NaN stays NaN
        norm = math.sqrt(aa) * math.sqrt(bb)
        cosine = ab / norm if norm > 0 or math.isnan(norm) else float(aa == bb)
        self.samples += 1
        self.cosines += cosine
        self.least = math.nan if math.isnan(cosine) else min(self.least, cosine)
        self.signal, self.noise = self.signal + aa, self.noise + noise

    @property
    def cosine(self) -> float | None:
        """The mean over samples."""
        return _number(self.cosines / self.samples) if self.samples else None

    @property
    def least_cosine(self) -> float | None:
        return _number(self.least) if self.samples else None

    @property
    def sqnr_db(self) -> float | None:
        """Infinite where there is no error, and minus infinite where there is no signal."""
        if not self.samples or not math.isfinite(self.signal) or not math.isfinite(self.noise):
            return None
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    @property
    def max_abs(self) -> float | None:
        """The largest absolute difference."""
        return _number(self.largest) if self.samples else None


@dataclass
class Divergence:
    """Kullback-Leibler divergence ``sum_i p_i log(p_i / q_i)`` in nats of the reference's distribution p from the
    compiled model's q, both the softmax of a row of logits, or the row itself where ``probabilities`` is set (then
    scaled to a sum of 1, and no q less than the least normal float32). A class that has no chance in the reference
    adds nothing."""

    probabilities: bool = False
    rows: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, want: Array, got: Array, keep: npt.NDArray[np.bool_] | None = None) -> None:
        """Rows along the last axis; ``keep``, of the shape without that axis, says which of them count."""
        for a, b in _rows(want, got, keep):
            logp, logq = (_log_shares(x) if self.probabilities else log_softmax(x) for x in (a, b))
            p = np.exp(logp)
            with np.errstate(invalid="ignore"):
                found = np.where(p > 0, p * (logp - logq), 0.0).sum(-1)
            self.rows += len(found)
            self.total += float(found.sum())
            self.largest = float(np.max(found, initial=self.largest))

    @property
    def mean(self) -> float | None:
        """Nats a row; 0 or more up to rounding."""
        return _number(self.total / self.rows) if self.rows else None

    @property
    def most(self) -> float | None:
        return _number(self.largest) if self.rows else None


@dataclass
class Agreement:
    """How often the likeliest class is the same, and how often it is the label where there are labels. The first of
    several equal values counts as the likeliest."""

    rows: int = 0
    same: int = 0
    labelled: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])

    def add(
        self,
        want: Array,
        got: Array,
        labels: npt.NDArray[np.int64] | None = None,
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Rows along the last axis; ``labels`` and ``keep`` have the shape without it. A negative label is none."""
        a, b = want.argmax(-1).ravel(), got.argmax(-1).ravel()
        kept = np.ones(a.shape, np.bool_) if keep is None else keep.ravel()
        self.rows += int(kept.sum())
        self.same += int((a == b)[kept].sum())
        if labels is not None:
            known = kept & (labels.ravel() >= 0)
            self.labelled += int(known.sum())
            for i, chosen in enumerate((a, b)):
                self.right[i] += int((chosen == labels.ravel())[known].sum())

    @property
    def share(self) -> float | None:
        return self.same / self.rows if self.rows else None

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Of the reference and of the compiled model; None where there was no label."""
        return (self.right[0] / self.labelled, self.right[1] / self.labelled) if self.labelled else None


@dataclass
class Likelihood:
    """Perplexity: ``exp`` of the mean negative log likelihood of the targets under the softmax of logits."""

    tokens: int = 0
    nats: float = 0.0

    def add(self, logits: Array, targets: npt.NDArray[np.int64]) -> None:
        """``logits [..., V]`` and ``targets [...]``; a negative target does not count."""
        flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.ravel()
        step = max(1, CHUNK // max(1, flat.shape[-1]))
        for i in range(0, len(flat), step):
            known = wanted[i : i + step] >= 0
            scores = log_softmax(flat[i : i + step][known].astype(np.float64))
            self.nats -= float(np.take_along_axis(scores, wanted[i : i + step][known][:, None], -1).sum())
            self.tokens += int(known.sum())

    @property
    def nats_per_token(self) -> float | None:
        return _number(self.nats / self.tokens) if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        nats = self.nats_per_token
        return None if nats is None else math.exp(nats) if nats < 700 else None


def log_softmax(logits: Floats) -> Floats:
    """``x - max - log(sum(exp(x - max)))`` along the last axis, of finite values and minus infinities."""
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(-1, keepdims=True)
        out: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out


def are_probabilities(rows: Array) -> bool:
    """Whether every row along the last axis is a distribution already: nothing below 0 or above 1, a sum of 1."""
    if not rows.size:
        return False
    sums = rows.astype(np.float64).sum(-1)
    return bool(rows.min() >= 0 and rows.max() <= 1 + ONE and np.all(np.abs(sums - 1) <= ONE))


def _log_shares(rows: Floats) -> Floats:
    shares = rows / rows.sum(-1, keepdims=True)
    out: Floats = np.log(np.maximum(shares, float(np.finfo(np.float32).tiny)))
    return out


def _rows(want: Array, got: Array, keep: npt.NDArray[np.bool_] | None) -> Iterator[tuple[Floats, Floats]]:
    """Pairs of blocks ``[rows, V]`` of the rows that count."""
    if want.shape != got.shape:
        raise ValueError(f"shapes {want.shape} and {got.shape} are not compared")
    width = want.shape[-1]
    a, b = want.reshape(-1, width), got.reshape(-1, width)
    kept = np.ones(len(a), np.bool_) if keep is None else keep.ravel()
    step = max(1, CHUNK // max(1, width))
    for i in range(0, len(a), step):
        some = kept[i : i + step]
        if some.any():
            yield a[i : i + step][some].astype(np.float64), b[i : i + step][some].astype(np.float64)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
