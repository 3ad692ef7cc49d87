"""Balanced rounding: the sums of errors are small, and no error is beyond a step."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import channels, numerics
from qcompiler.dtypes import F32, F64
from qcompiler.errors import InputError
from qcompiler.payload import ArrayPayload, constant
from qcompiler.scheme import parse_scheme
from qcompiler.weights import WeightQuantization


def errors(weight: Any, text: str, rounding: Any = "balanced") -> tuple[Any, WeightQuantization]:
    """The errors of the codes in steps, ``[O, C, taps]``."""
    made = WeightQuantization(ArrayPayload(weight, F32), parse_scheme(text), rounding=rounding)
    codes, scale, *zero = [p.array() for p in made.outputs()]
    back = numerics.dequantize(codes, scale, zero[0] if zero else None, made.scheme, F64)
    steps = np.broadcast_to(scale.astype(np.float64), (len(weight),)).reshape(-1, *[1] * (weight.ndim - 1))
    return ((weight.astype(np.float64) - back) / steps).reshape(*weight.shape[:2], -1), made


@given(
    st.lists(st.integers(1, 7), min_size=3, max_size=5),
    st.sampled_from(["int8 channel sym axis=0", "int8 channel asym axis=0", "int4 tensor sym", "uint8 tensor asym"]),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_sums_are_balanced_and_errors_within_a_step(shape: list[int], text: str, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    error, made = errors(weight, text)
    nearest, _ = errors(weight, text, "nearest")
    assert np.abs(error).max() <= 1 + 1e-5
    # A symmetric range ends half a step beyond its codes, so a weight at the end may have nowhere to go.
    if "asym" in text:
        assert (np.abs(error.sum(axis=2)) <= 1.5 + 1e-5).all()
    assert np.abs(error.sum(axis=(1, 2))).max() <= max(0.5, np.abs(nearest.sum(axis=(1, 2))).max()) + 1e-5
    scale = np.broadcast_to(made.outputs()[1].array().astype(np.float64), (shape[0],)).reshape(-1, 1, 1)
    assert made.stats["sum_sq_error"] == pytest.approx(np.square(error * scale).sum(), rel=1e-6)


def test_a_mean_of_the_input_costs_little() -> None:
    weight = np.random.default_rng(1).standard_normal((16, 32, 3, 3)).astype(np.float32)
    sums = {r: errors(weight, "int8 channel sym axis=0", r)[0].sum(axis=2) for r in ("nearest", "balanced")}
    assert np.abs(sums["balanced"].sum(axis=1)).max() <= 0.5 + 1e-5 < np.abs(sums["nearest"].sum(axis=1)).max()
    assert np.sqrt(np.square(sums["balanced"]).mean()) < 0.5 * np.sqrt(np.square(sums["nearest"]).mean())


def test_the_order_of_reading_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).standard_normal((9, 4, 2, 2)).astype(np.float32)
    made = WeightQuantization(constant(weight), parse_scheme("int8 channel sym axis=0"), rounding="balanced")
    whole = made.outputs()[0].array()
    monkeypatch.setattr(channels, "BLOCK", 40)
    assert len(channels.blocks(weight)) == 5
    assert np.array_equal(made.outputs()[0].array(), whole)


def test_depthwise_kernels_and_single_taps_stay_sensible() -> None:
    for shape in ((8, 1, 3, 3), (8, 6, 1, 1), (1, 1, 1)):
        weight = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        error, _ = errors(weight, "int8 channel asym axis=0")
        assert np.abs(error.sum(axis=(1, 2))).max() <= 0.5 + 1e-5


def test_only_convolutions_have_kernels() -> None:
    with pytest.raises(InputError, match="no kernels"):
        WeightQuantization(constant(np.ones((4, 4), np.float32)), parse_scheme("int8 channel sym"), rounding="balanced")
    matrix = constant(np.ones((4, 4, 3), np.float32))
    with pytest.raises(InputError, match="no kernels"):
        WeightQuantization(matrix, parse_scheme("int8 channel sym axis=2"), rounding="balanced")
