"""Weights of any rank as recorded computations: the bits of the reference, nothing read early, floors of scales."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.dtypes import F32, F64, Array
from qcompiler.errors import BadWeights, InputError
from qcompiler.payload import ArrayPayload, BytesPayload, FilePayload, Payload, computed, constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.recipe import parse_line
from qcompiler.scale_floor import BIAS_STEPS, least_scales, with_scale_floor
from qcompiler.scheme import parse_scheme
from qcompiler.weights import WeightQuantization, reshaped, transposed

CASES = ["int8 channel sym", "int8 channel asym", "int8 tensor sym", "int8 g16 asym", "int4 g16 sym"]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Array, Any, Any]:
    shape = draw(st.lists(st.integers(1, 6), min_size=3, max_size=5))
    scheme = parse_scheme(draw(st.sampled_from(CASES)))
    axis = None if scheme.granularity == "tensor" else draw(st.sampled_from([0, -1, len(shape) - 1]))
    if scheme.granularity == "group":
        shape[axis or 0] = draw(st.integers(1, 40))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(shape).astype(np.float32)
    x[np.abs(x) < draw(st.sampled_from([0.0, 5.0]))] = 0.0
    return x, scheme.with_axis(axis), draw(st.sampled_from(["absmax", "mse"]))


@given(tensors())
@settings(max_examples=120, deadline=None)
def test_any_rank_has_the_bits_of_the_reference(case: tuple[Array, Any, Any]) -> None:
    x, scheme, clip = case
    scale, zero = numerics.choose_qparams(x, scheme, clip)
    computation = WeightQuantization(ArrayPayload(x, F32), scheme, clip)
    found = [p.array() for p in computation.outputs()]
    expected = [numerics.quantize(x, scale, zero, scheme), scale] + ([] if zero is None else [zero])
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    error = x.astype(np.float64) - numerics.dequantize(found[0], scale, zero, scheme, F64)
    assert computation.stats["sum_sq_error"] == pytest.approx(np.square(error).sum(), rel=1e-4, abs=1e-12)


def test_nothing_is_read_before_the_codes_are(tmp_path: Path) -> None:
    reads = 0

    def once() -> Array:
        nonlocal reads
        reads += 1
        return np.ones((4, 3, 2, 2), np.float32)

    payload = computed("made", once, [], F32, (4, 3, 2, 2))
    codes, scale = WeightQuantization(payload, parse_scheme("int8 channel sym axis=0")).outputs()
    assert (codes.shape, scale.shape, reads) == ((4, 3, 2, 2), (4,), 0)
    assert codes.array().shape == (4, 3, 2, 2) and scale.array().shape == (4,)
    assert reads == 1


def test_a_middle_axis_is_refused() -> None:
    with pytest.raises(InputError, match="first or last axis"):
        WeightQuantization(constant(np.ones((2, 3, 4), np.float32)), parse_scheme("int8 channel sym axis=1"))
    with pytest.raises(InputError, match="only matrices are transposed"):
        WeightQuantization(constant(np.ones((2, 3, 4), np.float32)), parse_scheme("int8 channel sym axis=0"), flip=True)


def test_a_result_of_higher_rank_has_no_transpose() -> None:
    weight = constant(np.ones((2, 3, 4), np.float32))
    assert transposed(WeightQuantization(weight, parse_scheme("int8 channel sym axis=0")).outputs()[0]) is None


def test_another_shape_shares_the_bytes(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    path = tmp_path / "weights"
    path.write_bytes(values.tobytes())
    payloads: list[Payload] = [
        FilePayload(path, 0, F32, (2, 3, 4)),
        BytesPayload(values.tobytes(), F32, (2, 3, 4)),
        ArrayPayload(values, F32),
        computed("values", lambda: values, [], F32, (2, 3, 4)),
    ]
    for payload in payloads:
        assert np.array_equal(reshaped(payload, (2, 12)).array(), values.reshape(2, 12))
    assert np.shares_memory(reshaped(payloads[2], (2, 12)).array(), values)
    assert isinstance(reshaped(payloads[0], (2, 12)), FilePayload)


# -- floors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int8 channel sym axis=0", "int8 channel asym axis=0", "uint8 channel asym axis=0"])
def test_scales_are_at_least_the_floor(text: str) -> None:
    scheme = parse_scheme(text)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 4, 3)).astype(np.float32) * np.float32([1, 1e-12, 0, 0, 1e-30, 2])[:, None, None]
    floor = np.array([1e-9, 1e-6, 1e-3, 0, 1e-6, 10.0])
    plain, _ = numerics.choose_qparams(x, scheme)
    computation = WeightQuantization(ArrayPayload(x, F32), scheme).with_floor(constant(floor, F64))
    codes, scale, *zero = [p.array() for p in computation.outputs()]
    assert scale[0] == plain[0]  # a floor below the scale changes nothing
    assert scale[3] == 1.0  # neither weights nor a floor
    np.testing.assert_allclose(scale[[1, 2, 4, 5]], floor[[1, 2, 4, 5]], rtol=0.02 if zero else 1e-6)
    assert (scale >= floor * (1 - 2**-24)).all()
    back = numerics.dequantize(codes, scale, zero[0] if zero else None, scheme, F64)
    step = scale.astype(np.float64)[:, None, None]
    assert (np.abs(back - x) <= step * 0.5 * (1 + 1e-6)).all()
    assert computation.stats["zero_groups"] == 2


def test_the_floor_is_in_the_transposed_matrix_too() -> None:
    x = np.random.default_rng(5).standard_normal((4, 7)).astype(np.float32) * 1e-9
    floor = constant(np.array([1e-3, 0, 2e-3, 0]), F64)
    made = WeightQuantization(ArrayPayload(x, F32), parse_scheme("int8 channel sym axis=0")).with_floor(floor)
    codes, scale = [p.array() for p in made.outputs()]
    other, same = [p.array() for p in made.transposed().outputs()]
    assert np.array_equal(codes.T, other) and np.array_equal(scale, same)
    assert made.transposed().stats is made.stats


def test_the_law_of_the_least_scale() -> None:
    bias = np.float32([0.0, -3.0, 1e-3, 40.0])
    floor = least_scales(bias, np.float32(0.02))
    steps = np.abs(bias[1:]).astype(np.float64) / (np.float64(np.float32(0.02)) * floor[1:])
    np.testing.assert_allclose(steps, BIAS_STEPS, rtol=1e-12)
    assert floor[0] == 0.0
    with pytest.raises(BadWeights):
        least_scales(np.float32([1.0, np.nan]), np.float32(0.02))
    with pytest.raises(InputError, match="positive"):
        least_scales(bias, np.float32(0.0))
    with pytest.raises(InputError, match="no int32 form"):
        least_scales(np.float32([3e38]), np.float32(1e-38))


NET = """graph @main dialect=onnx {
  input %x: f32[1, 3, 8, 8]
  const %w: f32[4, 3, 3, 3] = rand:1
  const %zero: f32[4, 4, 1, 1] = dense(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
  const %b: f32[4] = dense(1e9, 0, 1, 4e8)
  const %xs: f32[] = dense(0.02)
  %y: f32[1, 4, 6, 6] = onnx.Conv(%x, %w, %b)
  %z: f32[1, 4, 6, 6] = onnx.Conv(%y, %zero, %b)
  return %z
}"""


@pytest.mark.parametrize("after", ["", ", fold-constants"])
def test_a_pair_gets_its_floor_before_or_after_its_codes_are_made(after: str) -> None:
    graph, ctx = parse(NET), Context()
    recipe = f'insert-qdq{{weights = "int8 channel sym", convs = "int8 channel sym"}}{after}'
    run(graph, parse_line(recipe).passes, ctx)
    bias, x_scale = graph.consts["b"], graph.consts["xs"]
    pairs = [op for op in graph if op.name == "q.dequantize"]
    assert len(pairs) == 2
    for dq in pairs:
        assert with_scale_floor(dq, bias, x_scale) and with_scale_floor(dq, bias, x_scale)
    run(graph, parse_line("fold-constants").passes, ctx)
    for dq, site in zip(pairs[::-1], ctx.ledger, strict=True):
        codes, scale = [v.payload.array() for v in dq.operands if v is not None and v.payload is not None]
        steps = np.array([1e9, 0, 1, 4e8]) / (0.02 * scale.astype(np.float64))
        assert (np.abs(steps) <= BIAS_STEPS * (1 + 1e-6)).all()
        assert np.abs(codes).max() <= 128 and "sum_sq" in site.stats
    assert np.array_equal(scale > 1e-6, [True, True, False, True])  # all zeros: the bias alone decides; 1 without one


def test_a_scale_that_came_with_the_model_is_kept() -> None:
    graph = parse(
        """graph @main dialect=onnx {
          const %c: int8[4, 3] = rand:1
          const %s: f32[4] = dense(1, 1, 1, 1)
          const %b: f32[4] = dense(1e9, 0, 1, 2)
          const %xs: f32[] = dense(0.02)
          %w: f32[4, 3] = q.dequantize(%c, %s) {scheme = <int8 channel sym axis=0>}
          return %w
        }"""
    )
    dq = next(iter(graph))
    assert not with_scale_floor(dq, graph.consts["b"], graph.consts["xs"])
    assert np.array_equal(graph.consts["s"].payload.array(), np.ones(4, np.float32))  # type: ignore[union-attr]
