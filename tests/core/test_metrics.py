"""The metrics against the same formulas written out in NumPy, on data cut into batches at random."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompiler import metrics
from qcompiler.metrics import Agreement, Closeness, Divergence, Likelihood, are_probabilities, log_softmax

F = NDArray[np.float64]
# Sums of at most a few thousand float64 products in another order.
ROUNDING = 1e-9

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 12), st.integers(2, 40))


def pair(seed: int, rows: int, width: int, noise: float = 0.3) -> tuple[F, F]:
    rng = np.random.default_rng(seed)
    want = rng.standard_normal((rows, width)) * rng.uniform(0.1, 20)
    return want, want + noise * rng.standard_normal((rows, width))


def cut(seed: int, *arrays: F) -> Iterator[tuple[F, ...]]:
    """The rows of ``arrays`` in batches of random sizes."""
    rng, at = np.random.default_rng(seed), 0
    while at < len(arrays[0]):
        step = int(rng.integers(1, len(arrays[0]) + 1))
        yield tuple(a[at : at + step] for a in arrays)
        at += step


@given(seeds, sizes)
def test_closeness(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size)
    sums = Closeness()
    for a, b in cut(seed, want, got):
        sums.add(a, b, len(a))
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(want, got, strict=True)]
    assert sums.samples == len(want)
    assert sums.cosine == pytest.approx(np.mean(cosines), rel=ROUNDING)
    assert sums.least_cosine == pytest.approx(min(cosines), rel=ROUNDING)
    assert sums.sqnr_db == pytest.approx(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()), rel=ROUNDING)
    assert sums.max_abs == np.abs(want - got).max()


@given(seeds, sizes)
def test_chunks_change_nothing_but_rounding(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size)
    found = []
    for chunk in (metrics.CHUNK, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "CHUNK", chunk)
            close, divergence, likelihood = Closeness(), Divergence(), Likelihood()
            close.add(want, got)
            divergence.add(want, got)
            likelihood.add(got, np.arange(size[0]) % size[1])
        found.append([close.cosine, close.sqnr_db, close.max_abs, divergence.mean, divergence.most, likelihood.nats])
    assert found[0] == pytest.approx(found[1], rel=1e-7)  # the divergence is a small difference of larger terms


def test_closeness_of_one_tensor_is_one_sample() -> None:
    want, got = pair(1, 6, 5)
    sums = Closeness()
    sums.add(want.astype(np.float16), got.astype(np.float16))
    assert sums.samples == 1
    assert sums.cosine == sums.least_cosine


@pytest.mark.parametrize(
    ("want", "got", "cosine", "sqnr"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0, math.inf),
        ([0.0, 0.0], [0.0, 1.0], 0.0, -math.inf),
        ([1.0, 0.0], [0.0, 0.0], 0.0, 0.0),
        ([1.0, 2.0], [1.0, 2.0], 1.0, math.inf),
        ([1.0, 2.0], [-1.0, -2.0], -1.0, 10 * math.log10(5 / 20)),
        ([1.0, math.nan], [1.0, 2.0], None, None),
        ([1.0, 2.0], [math.inf, 2.0], None, None),
    ],
)
def test_closeness_at_the_edges(want: list[float], got: list[float], cosine: float | None, sqnr: float | None) -> None:
    sums = Closeness()
    sums.add(np.array(want), np.array(got))
    assert sums.cosine == (None if cosine is None else pytest.approx(cosine, abs=1e-15))
    assert sums.sqnr_db == (None if sqnr is None else pytest.approx(sqnr))


def test_one_bad_sample_does_not_hide() -> None:
    sums = Closeness()
    sums.add(np.array([[1.0, 2.0], [math.nan, 1.0], [3.0, 4.0]]), np.ones((3, 2)), 3)
    assert (sums.cosine, sums.least_cosine, sums.sqnr_db, sums.max_abs) == (None, None, None, None)


def test_nothing_added_is_no_figure() -> None:
    assert (Closeness().cosine, Closeness().sqnr_db, Closeness().max_abs) == (None, None, None)
    assert (Divergence().mean, Agreement().share, Agreement().accuracy, Likelihood().perplexity) == (None,) * 4


def test_shapes_that_differ_are_not_compared() -> None:
    for sums in (Closeness(), Divergence()):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
            sums.add(np.ones((2, 3)), np.ones((3, 2)))


def softmax(x: F) -> F:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(seeds, sizes)
def test_divergence_of_logits(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size, noise=1.0)
    sums = Divergence()
    for a, b in cut(seed, want, got):
        sums.add(a, b)
    p, q = softmax(want), softmax(got)
    rows = (p * (np.log(p) - np.log(q))).sum(-1)
    assert sums.rows == len(want)
    assert sums.mean == pytest.approx(rows.mean(), rel=1e-6, abs=1e-12)
    assert sums.most == pytest.approx(rows.max(), rel=1e-6, abs=1e-12)


@given(seeds, sizes)
def test_divergence_is_not_negative_and_zero_for_the_same(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size, noise=3.0)
    same, other = Divergence(), Divergence()
    same.add(want, want)
    other.add(want, got)
    assert same.mean == 0
    assert other.mean is not None and other.mean > -1e-12


@given(seeds, sizes)
def test_divergence_of_probabilities_is_that_of_their_logits(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size, noise=0.5)
    logits, shares = Divergence(), Divergence(probabilities=True)
    logits.add(want, got)
    shares.add(softmax(want), softmax(got))
    # Shares below the least normal float32 are raised to it; here logits lie too close together for that.
    assert shares.mean == pytest.approx(logits.mean, rel=1e-6, abs=1e-12)


def test_divergence_where_a_class_has_no_chance() -> None:
    masked = np.array([[0.0, 1.0, -np.inf]])
    sums = Divergence()
    sums.add(masked, np.array([[0.0, 1.0, -np.inf]]))
    assert sums.mean == 0
    sums.add(masked, np.array([[0.0, 1.0, 5.0]]))
    e = math.e
    expected = math.log((1 + e + e**5) / (1 + e))
    assert sums.total == pytest.approx(expected)
    one_sided = Divergence(probabilities=True)
    one_sided.add(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]))
    tiny = float(np.finfo(np.float32).tiny)
    assert one_sided.mean == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / tiny))


def test_divergence_counts_kept_rows_only() -> None:
    want, got = pair(3, 6, 7)
    keep = np.array([True, False, True, True, False, False])
    some, whole = Divergence(), Divergence()
    some.add(want.reshape(2, 3, 7), got.reshape(2, 3, 7), keep.reshape(2, 3))
    whole.add(want[keep], got[keep])
    assert (some.rows, some.total) == (3, whole.total)


@given(seeds, sizes)
def test_agreement(seed: int, size: tuple[int, int]) -> None:
    want, got = pair(seed, *size, noise=5.0)
    rng = np.random.default_rng(seed)
    labels, keep = rng.integers(-1, size[1], size[0]), rng.random(size[0]) < 0.7
    sums = Agreement()
    sums.add(want, got, labels, keep)
    rows = [i for i in range(size[0]) if keep[i]]
    known = [i for i in rows if labels[i] >= 0]
    assert (sums.rows, sums.labelled) == (len(rows), len(known))
    assert sums.same == sum(int(want[i].argmax() == got[i].argmax()) for i in rows)
    assert sums.right == [sum(int(x[i].argmax() == labels[i]) for i in known) for x in (want, got)]
    if rows:
        assert sums.share == sums.same / len(rows)
    if known:
        assert sums.accuracy == (sums.right[0] / len(known), sums.right[1] / len(known))


@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(2, 30))
def test_likelihood(seed: int, batch: int, length: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((batch, length, width))
    targets = rng.integers(-1, width, (batch, length))
    sums = Likelihood()
    sums.add(logits, targets)
    losses = [-math.log(softmax(logits)[i][targets[i]]) for i in np.ndindex(batch, length) if targets[i] >= 0]
    assert sums.tokens == len(losses)
    if losses:
        assert sums.nats_per_token == pytest.approx(np.mean(losses), rel=ROUNDING, abs=1e-12)
        assert sums.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-7)


def test_perplexity_of_no_idea_is_the_number_of_classes() -> None:
    sums = Likelihood()
    sums.add(np.zeros((3, 50), np.float32), np.array([1, 2, 49]))
    assert sums.perplexity == pytest.approx(50)


def test_log_softmax_is_stable() -> None:
    found = log_softmax(np.array([[1e4, 0.0], [-1e4, -1e4]]))
    assert found.tolist() == [[0.0, -1e4], [pytest.approx(-math.log(2))] * 2]


@pytest.mark.parametrize(
    ("rows", "are"),
    [
        ([[0.2, 0.8], [1.0, 0.0]], True),
        ([[0.2, 0.9]], False),
        ([[-0.2, 1.2]], False),
        ([[2.0, 3.0]], False),
        (np.zeros((0, 3)), False),
    ],
)
def test_probabilities_are_known(rows: list[list[float]], are: bool) -> None:
    assert are_probabilities(np.asarray(rows)) is are


def test_float16_probabilities_are_known() -> None:
    rows = softmax(np.random.default_rng(0).standard_normal((20, 1000))).astype(np.float16)
    assert are_probabilities(rows)
