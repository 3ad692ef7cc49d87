"""Windows, scores, sampling and the bigram baseline, on cases small enough to count by hand."""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from qcompiler.models import scoring
from qcompiler.models.ngram import BigramModel

Floats = npt.NDArray[np.floating]


def _successor(ids: scoring.IdArray) -> Floats:
    """Logits over five tokens that favour the next number by 3 nats."""
    return 3.0 * np.eye(5)[(ids + 1) % 5]


def test_windows_cover_each_target_once() -> None:
    rows = scoring.windows(np.arange(12), 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert scoring.windows(np.arange(101), 10, limit=3)[:, 0].tolist() == [0, 40, 90]
    with pytest.raises(ValueError, match="no window"):
        scoring.windows(np.arange(4), 4)


def test_uniform_logits_score_log_vocabulary() -> None:
    rows = scoring.windows(np.arange(37) % 5, 4)
    score = scoring.score_windows(lambda ids: np.zeros((*ids.shape, 5)), rows, np.full(5, 2), batch=4)
    assert score.tokens == 36
    assert score.nats_per_token == pytest.approx(math.log(5))
    assert score.bits_per_byte == pytest.approx(math.log2(5) / 2)
    assert score.perplexity == pytest.approx(5)


def test_score_by_hand_and_padding() -> None:
    """Each target is the favoured token: -log(e^3 / (e^3 + 4)); the mark, token 0, is not counted."""
    shapes = set()

    def logits(ids: scoring.IdArray) -> Floats:
        shapes.add(ids.shape)
        return _successor(ids)

    rows = scoring.windows(np.arange(26) % 5, 5)
    score = scoring.score_windows(logits, rows, np.array([0, 1, 1, 1, 1]), batch=2)
    assert shapes == {(2, 5)}
    assert score.tokens == 20
    assert score.nats_per_token == pytest.approx(math.log(math.exp(3) + 4) - 3)


def test_greedy_sampling_and_stop() -> None:
    assert scoring.sample(_successor, [1], 6) == [2, 3, 4, 0, 1, 2]
    assert scoring.sample(_successor, [1], 6, stop=0) == [2, 3, 4]
    assert scoring.sample(_successor, [1], 5, temperature=1.0, top_k=1) == [2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="no tokens"):
        scoring.sample(_successor, [], 1)


def test_sampling_follows_seed_and_probabilities() -> None:
    draws = [scoring.sample(_successor, [1], 400, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    chain = [1, *draws[0]]
    followed = sum((a + 1) % 5 == b for a, b in pairwise(chain)) / 400
    assert followed == pytest.approx(math.exp(3) / (math.exp(3) + 4), abs=0.07)


def test_sampling_sees_a_window() -> None:
    lengths = []

    def logits(ids: scoring.IdArray) -> Floats:
        lengths.append(ids.shape[1])
        return _successor(ids)

    scoring.sample(logits, [0, 1, 2], 4, window=5)
    assert lengths == [3, 4, 5, 5]


def test_bigram_rows_are_distributions() -> None:
    rng = np.random.default_rng(0)
    streams = [rng.zipf(1.5, 400) % 30 for _ in range(4)]
    model = BigramModel(streams, 40)
    np.testing.assert_allclose(np.exp(model.log_probs).sum(1), 1.0, rtol=1e-12)
    assert np.isfinite(model.log_probs).all()


def test_bigram_learns_the_likely_pair() -> None:
    """0 is followed by 1 nine times of ten; a token never seen still has some probability."""
    stream = np.array(([0, 1] * 9 + [0, 2]) * 20)
    probabilities = np.exp(BigramModel([stream], 4).log_probs)
    assert probabilities[0, 1] == pytest.approx(0.9, abs=0.02)
    assert 0 < probabilities[0, 3] < 0.02
    assert BigramModel([stream], 4).loss(stream[:-1], stream[1:]) < 0.4
