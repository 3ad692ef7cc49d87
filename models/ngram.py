"""A smoothed token bigram model: the baseline that a trained network has to beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["BigramModel"]


class BigramModel:
    """Interpolated modified Kneser-Ney over token bigrams, mixed at the last level with the uniform model.

    The three discounts, for pairs seen once, twice and more, are the closed-form estimates from the counts
    of counts, so nothing is tuned on the text that is scored.
    """

    def __init__(self, streams: Iterable[npt.NDArray[np.int64]], vocab_size: int) -> None:
        """Count the adjacent pairs of each stream, int64 ``[N]`` with ids below ``vocab_size``."""
        flat = np.zeros(vocab_size * vocab_size, dtype=np.int64)
        for stream in streams:
            flat += np.bincount(stream[:-1] * vocab_size + stream[1:], minlength=flat.size)
        counts = flat.reshape(vocab_size, vocab_size)
        seen = counts > 0
        continuation = _discounted(seen.sum(0, keepdims=True), np.full((1, vocab_size), 1.0 / vocab_size))
        probabilities = _discounted(counts, np.broadcast_to(continuation, counts.shape))
        self.log_probs: npt.NDArray[np.float64] = np.log(probabilities)
        """Natural log of P(next | previous), float64 ``[V, V]``, previous token first."""

    def loss(self, previous: npt.NDArray[np.int64], following: npt.NDArray[np.int64]) -> float:
        """Return the mean negative log-likelihood, in nats, of ``following`` given ``previous``."""
        return float(-self.log_probs[previous, following].mean())


def _discounted(counts: npt.NDArray[np.int64], lower: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Discount each row of ``counts`` ``[R, V]`` and give the freed mass to ``lower`` ``[R, V]``."""
    n1, n2, n3, n4 = (max(1, int((counts == value).sum())) for value in (1, 2, 3, 4))
    ratio = n1 / (n1 + 2 * n2)
    steps = np.clip([1 - 2 * ratio * n2 / n1, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3], 0.05, None)
    discounts = np.concatenate(([0.0], np.minimum(steps, [1.0, 2.0, 3.0])))[np.minimum(counts, 3)]
    totals = counts.sum(1, keepdims=True)
    freed = np.where(totals > 0, discounts.sum(1, keepdims=True), 1.0)
    kept: npt.NDArray[np.float64] = (counts - discounts + freed * lower) / np.maximum(totals, 1)
    return kept
