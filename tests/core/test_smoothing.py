"""SmoothQuant's maths against straightforward NumPy, and what the search promises."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.dtypes import F32, Array
from qcompiler.errors import InputError
from qcompiler.numerics import choose_qparams, dequantize, quantize
from qcompiler.payload import RandomPayload, constant
from qcompiler.scheme import parse_scheme
from qcompiler.smoothing import (
    LIMIT,
    W8A8,
    Activation,
    Rescaled,
    candidates,
    column_absmax,
    magnitudes,
    product_error,
    rounded_rows,
    search_alpha,
    smoothing_factors,
)

STATIC, DYNAMIC, TOKEN = (
    parse_scheme(f"uint8 {text}") for text in ("tensor asym", "tensor asym dynamic", "token asym dynamic")
)
WEIGHTS = parse_scheme("int8 channel sym")
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def sample(rows: int = 64, k: int = 48, seed: int = 0, outliers: float = 1.0) -> Activation:
    """Normal rows, four times as many beside them; three channels are ``outliers`` times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5 * rows, k)).astype(np.float32)
    x[:, [3, 17, 40]] *= outliers
    return Activation(x[:rows], x[rows:].min(axis=0), x[rows:].max(axis=0))


def weights(k: int = 48, seed: int = 1) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, k)).astype(np.float32) for n in (32, 20)]


def absmax(matrices: list[Array]) -> Array:
    return np.abs(np.concatenate(matrices)).max(axis=0)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.85, 1.0])
def test_factors_are_those_of_the_paper(alpha: float) -> None:
    x, w = absmax([sample().rows]), absmax(weights())
    want = [max(x[j], 0) ** alpha / max(w[j], 0) ** (1 - alpha) for j in range(len(x))]
    got = smoothing_factors(x, w, alpha)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)  # one rounding to f32


def test_channels_without_a_magnitude_are_left_alone() -> None:
    x = np.array([0.0, 2.0, np.nan, np.inf, 4.0, 1e-30, 1e30])
    w = np.array([1.0, 0.0, 1.0, 1.0, np.inf, 1.0, 1.0])
    got = smoothing_factors(x, w, 0.5)
    np.testing.assert_array_equal(got[:5], 1.0)
    np.testing.assert_array_equal(got[5:], np.array([1 / LIMIT, LIMIT], np.float32))
    assert np.isfinite(got).all() and (got > 0).all()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match=r"alpha is a number from 0 to 1, not 1\.5"):
        smoothing_factors(np.ones(3), np.ones(3), 1.5)
    with pytest.raises(InputError, match=r"not \[3\] and \[4\]"):
        smoothing_factors(np.ones(3), np.ones(4), 0.5)
    with pytest.raises(InputError, match="per tensor or per token"):
        W8A8(WEIGHTS, parse_scheme("int8 channel sym"))
    known = Activation(np.zeros((0, 4), np.float32), np.zeros(4), np.zeros(4))
    with pytest.raises(InputError, match="rows of the activation"):
        search_alpha(known, [lambda: np.ones((2, 4), np.float32)], np.ones(4), W8A8(WEIGHTS, STATIC), GRID)


def test_quiet_channels_count_as_loud_as_the_median_one() -> None:
    np.testing.assert_array_equal(magnitudes(np.array([0.0, 0.1, 3.0, 5.0, 90.0])), [4, 4, 4, 5, 90])
    np.testing.assert_array_equal(magnitudes(np.zeros(3)), 0)
    assert np.isnan(magnitudes(np.array([np.nan, 1.0]))[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_rescale_changes_nothing_in_float64(seed: int, alpha: float) -> None:
    known, matrices = sample(seed=seed, outliers=100.0), weights(seed=seed + 10)
    s = smoothing_factors(known.absmax, absmax(matrices), alpha).astype(np.float64)
    x = known.rows.astype(np.float64)
    for w in matrices:
        wide = w.astype(np.float64)
        want = x @ wide.T
        # K = 48 products, each off by two roundings of float64
        bound = 48 * 2 * np.finfo(np.float64).eps * (np.abs(x) @ np.abs(wide).T)
        assert (np.abs((x / s) @ (wide * s).T - want) <= bound).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_rescaled_payload_reads_alike_whole_by_rows_and_by_chunks(axis: int) -> None:
    source = RandomPayload(3, F32, (300, 70))
    factors = np.random.default_rng(0).uniform(0.1, 10, (300, 70)[axis]).astype(np.float32)
    rescaled = Rescaled(source, factors, axis)
    want = source.array() * (factors[:, None] if axis == 0 else factors)
    np.testing.assert_array_equal(rescaled.array(), want)
    np.testing.assert_array_equal(rescaled.rows(10, 31), want[10:31])
    assert b"".join(bytes(c) for c in rescaled.chunks(1000)) == want.tobytes()
    vector = constant(want[:, 0])
    np.testing.assert_array_equal(Rescaled(vector, np.full(300, 0.5, np.float32), -1).array(), want[:, 0] / 2)
    with pytest.raises(InputError, match=r"\[5\] factors for axis"):
        Rescaled(source, np.ones(5, np.float32), axis)


class Counted(RandomPayload):
    """Random values that can be read by rows, and remember how many at most."""

    most = 0

    def rows(self, start: int, stop: int) -> Array:
        type(self).most = max(type(self).most, stop - start)
        return self.array()[start:stop]


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_of_columns_are_read_piece_by_piece(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.smoothing.CHUNK", 4096)
    weight = Counted(5, F32, (200, 64))
    np.testing.assert_array_equal(column_absmax(weight, axis), np.abs(weight.array()).max(axis=1 - axis))
    assert Counted.most == 4096 // (64 * 4)


def test_rows_are_rounded_in_the_range_that_all_the_data_has() -> None:
    known = sample()
    wide = Activation(known.rows, known.lo * 2, known.hi * 3)  # nothing is clipped
    s = smoothing_factors(wide.absmax, absmax(weights()), 0.5)
    scale = (max((wide.hi / s).max(), 0) - min((wide.lo / s).min(), 0)) / 255
    got = rounded_rows(wide, s, STATIC)
    x = wide.rows / s
    assert np.abs(got - x).max() <= scale / 2 * 1.001  # rounding to f32 on the way
    assert len(np.unique(got)) <= 256


@pytest.mark.parametrize("scheme", [DYNAMIC, TOKEN])
def test_dynamic_ranges_are_those_of_the_rows(scheme) -> None:  # type: ignore[no-untyped-def]
    known = sample(outliers=30.0)
    got = rounded_rows(known, np.ones(48, np.float32), scheme)
    for row, back in zip(known.rows, got, strict=True):
        span = row if scheme.granularity == "token" else known.rows
        assert np.abs(back - row).max() <= (span.max() - span.min()) / 255 / 2 * 1.001


@pytest.mark.parametrize("text", ["int8 channel sym", "int8 tensor sym", "int8 g32 asym", "int4 g16 sym"])
def test_the_error_is_that_of_the_quantized_product(text: str) -> None:
    scheme, known = parse_scheme(text), sample()
    (weight, _), s = weights(), np.linspace(0.5, 2, 48).astype(np.float32)
    rows = rounded_rows(known, s, STATIC)
    oriented = scheme.with_axis({"channel": 0, "group": 1, "tensor": None}[scheme.granularity])
    scaled = weight * s
    scale, zero = choose_qparams(scaled, oriented)
    back = dequantize(quantize(scaled, scale, zero, oriented), scale, zero, oriented, F32)
    want = known.rows @ weight.T
    reference = np.square(rows.astype(np.float64) @ back.astype(np.float64).T - want).sum() / np.square(want).sum()
    got = product_error(want, rows, weight, s, scheme)
    assert got == pytest.approx(reference, rel=1e-4)  # f32 sums against float64 ones, noise 1e-4 of the signal


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC, TOKEN])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outliers", [1.0, 50.0])
def test_the_search_is_at_least_as_good_as_a_half_and_as_nothing(activations, seed: int, outliers: float) -> None:  # type: ignore[no-untyped-def]
    known, matrices = sample(seed=seed, outliers=outliers), weights(seed=seed)
    loads = [lambda w=w: w for w in matrices]
    found = search_alpha(known, loads, absmax(matrices), W8A8(WEIGHTS, activations), (0.2, 0.8))
    tried = dict(found.errors)
    assert list(tried) == [None, 0.2, 0.5, 0.8]
    assert found.error == min(tried.values()) <= found.error_of(0.5)
    factors = dict(candidates((0.2, 0.8), absmax(matrices), known))[found.alpha]
    again = [
        product_error(known.rows @ w.T, rounded_rows(known, factors, activations), w, factors, WEIGHTS)
        for w in matrices
    ]
    assert found.error == pytest.approx(np.mean(again), rel=1e-12)


def test_of_equals_the_one_with_less_smoothing_wins() -> None:
    known = sample()
    zero = np.zeros((4, 48), np.float32)
    found = search_alpha(known, [lambda: zero], absmax([zero]), W8A8(WEIGHTS, STATIC), GRID)
    assert found.alpha is None
    assert found.error == 0
    np.testing.assert_array_equal(found.factors, 1)


@pytest.mark.parametrize("factor", [10, 50, 100])
def test_planted_outliers_are_taken_out_again(factor: int) -> None:
    """An exactly equivalent rescale, planted: smoothing finds the same smoothed group, whatever was planted."""
    known, matrices = sample(), weights()
    plain = search_alpha(known, [lambda w=w: w for w in matrices], absmax(matrices), W8A8(WEIGHTS, STATIC), GRID)
    planted = np.ones(48, np.float32)
    planted[[2, 9]] = factor
    worse = Activation(known.rows * planted, known.lo * planted, known.hi * planted)
    moved = [w / planted for w in matrices]
    found = search_alpha(worse, [lambda w=w: w for w in moved], absmax(moved), W8A8(WEIGHTS, STATIC), GRID)
    assert found.error_of(None) > 4 * plain.error_of(None)
    assert found.error_of(0.5) == pytest.approx(plain.error_of(0.5), rel=1e-2)  # factors are rounded to f32
    assert found.error <= plain.error_of(0.5) * 1.01
    np.testing.assert_allclose(
        smoothing_factors(worse.absmax, absmax(moved), 0.5),
        smoothing_factors(known.absmax, absmax(matrices), 0.5) * planted,
        rtol=1e-6,
    )
