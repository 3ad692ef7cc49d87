"""Means of what taps see, and biases that give layers with rounded weights the mean outputs of those without."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.bias_correction import CorrectedBias, TapMeans
from qcompiler.dtypes import F32, F64
from qcompiler.errors import CalibrationError, InputError
from qcompiler.integer_numerics import convolve
from qcompiler.pair_bounds import correction_gap
from qcompiler.payload import ArrayPayload, computed, constant
from qcompiler.scheme import parse_scheme
from qcompiler.weights import WeightQuantization


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], int]:
    d, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=d, max_size=d)
    kernel = tuple(draw(several))
    attrs: dict[str, Any] = {"strides": draw(several), "dilations": draw(several), "group": group}
    if draw(st.booleans()):
        attrs["pads"] = draw(st.lists(st.integers(0, 4), min_size=2 * d, max_size=2 * d))
    else:
        attrs["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]))
    size = tuple(draw(st.lists(st.integers(1, 9), min_size=d, max_size=d)))
    return attrs, kernel, size, draw(st.integers(0, 2**31))


@given(convolutions())
@settings(max_examples=150, deadline=None)
def test_the_mean_output_is_the_weight_times_the_means(case: Any) -> None:
    attrs, kernel, size, seed = case
    rng, group = np.random.default_rng(seed), attrs["group"]
    weight = rng.standard_normal((2 * group, 2, *kernel))
    observer, outputs = TapMeans(2 * group, kernel, attrs), []
    for batch in (1, 3):
        x = rng.uniform(0.0, 2.0, (batch, 2 * group, *size)).astype(np.float32)
        try:
            y = convolve(x, weight, None, attrs)
        except (InputError, ValueError):  # the kernel is larger than the padded input
            return
        if not y.size:
            return
        observer.update(x)
        outputs.append(np.moveaxis(y, 1, 0).reshape(2 * group, -1))
    expected = np.concatenate(outputs, axis=1).mean(axis=1)
    means = observer.means.reshape(group, 1, 2, *kernel)
    found = (weight.reshape(group, 2, 2, *kernel) * means).reshape(2 * group, -1).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_seen_can_be_kept_and_taken_up_again() -> None:
    rng, attrs = np.random.default_rng(1), {"pads": (1, 0, 0, 1), "strides": (2, 1)}
    xs = [rng.standard_normal((2, 3, 5, 6)).astype(np.float32) for _ in range(2)]
    whole, first = TapMeans(3, (2, 2), attrs), TapMeans(3, (2, 2), attrs)
    for x in xs:
        whole.update(x)
    first.update(xs[0])
    second = TapMeans(3, (2, 2), attrs)
    second.restore(first.state())
    second.update(xs[1])
    assert np.array_equal(whole.means, second.means) and second.seen == whole.seen
    assert first.key() == second.key() != TapMeans(3, (2, 2), attrs | {"strides": (1, 1)}).key()
    with pytest.raises(ValueError, match="another form"):
        TapMeans(3, (2, 1), attrs).restore(first.state())


def test_linear_inputs_and_what_is_refused() -> None:
    observer = TapMeans(4)
    observer.update(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert np.array_equal(observer.means, [10, 11, 12, 13])
    with pytest.raises(CalibrationError, match="4 channels"):
        observer.update(np.zeros((2, 3), np.float32))
    with pytest.raises(CalibrationError, match="NaN"):
        observer.update(np.full((1, 4), np.inf, np.float32))
    planned = TapMeans(4)
    planned.stand_in((1, 1))
    assert planned.seen and not planned.means.any()


@pytest.mark.parametrize("text", ["int8 channel sym", "int4 channel asym", "int4 tensor sym"])
@pytest.mark.parametrize("bias", [None, "all", "one"])
@pytest.mark.parametrize("form", ["conv", "rows", "columns"])
def test_the_mean_output_of_the_codes_is_that_of_the_weight(text: str, bias: str | None, form: str) -> None:
    rng, scheme = np.random.default_rng(2), parse_scheme(text)
    shape, group, along = {"conv": ((6, 4, 3, 2), 3, 1), "rows": ((6, 40), 1, 1), "columns": ((40, 6), 1, 0)}[form]
    weight = rng.standard_normal(shape).astype(np.float32)
    scheme = scheme.with_axis({"tensor": None}.get(scheme.granularity, 1 if form == "columns" else 0))
    means = rng.uniform(0, 3, (12, 3, 2) if form == "conv" else (40,))
    made = WeightQuantization(ArrayPayload(weight, F32), scheme)
    given = None if bias is None else rng.standard_normal(6 if bias == "all" else 1).astype(np.float32)
    payload = None if given is None else constant(given)
    corrected = CorrectedBias(
        made.weight, made.outputs(), payload, scheme, means, n=6, along=along, group=group
    ).outputs()[0]
    codes, scale, *zero = [p.array() for p in made.outputs()]
    back = numerics.dequantize(codes, scale, zero[0] if zero else None, scheme, F64)

    def mean(w: Any) -> Any:
        if form == "conv":
            return (w.reshape(3, 2, 4, 3, 2) * means.reshape(3, 1, 4, 3, 2)).reshape(6, -1).sum(axis=1)
        return w @ means if form == "rows" else means @ w

    want = mean(weight.astype(np.float64)) + (0 if given is None else given.astype(np.float64))
    found = mean(back) + corrected.array().astype(np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=2.0**-22 * np.abs(want).max())
    assert np.abs(mean(back) - mean(weight.astype(np.float64))).max() > 1e-3  # there was something to correct


def test_a_correction_is_within_what_rounding_does() -> None:
    rng, scheme = np.random.default_rng(8), parse_scheme("int8 channel sym axis=0")
    made = WeightQuantization(constant(rng.standard_normal((5, 4, 2, 2)).astype(np.float32)), scheme)
    means, bias = rng.standard_normal((4, 2, 2)), constant(rng.standard_normal(1).astype(np.float32))

    class Wrong(CorrectedBias):
        def get(self, index: int) -> Any:
            return super().get(index) + 2 * self.bound().astype(np.float32)

    for cls, fits in ((CorrectedBias, True), (Wrong, False)):
        corrected = cls(made.weight, made.outputs(), bias, scheme, means, n=5)
        assert correction_gap(corrected).fits is fits
        assert np.array_equal(corrected.uncorrected().array(), np.repeat(bias.array(), 5))


def test_the_weight_is_quantized_once_for_several_readers() -> None:
    reads = 0

    def once() -> Any:
        nonlocal reads
        reads += 1
        return np.ones((4, 8), np.float32)

    scheme = parse_scheme("int8 channel sym axis=0")
    made = WeightQuantization(computed("made", once, [], F32, (4, 8)), scheme)
    bias = CorrectedBias(made.weight, made.outputs(), None, scheme, np.ones(8), n=4).outputs()[0]
    assert not reads
    bias.array()
    before = reads
    bias.array()
    assert reads == before
