"""Reference semantics against ONNX's reference evaluator and ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompiler import numerics
from qcompiler.dtypes import F16, F32, DType
from qcompiler.scheme import Scheme, parse_scheme

Array = np.ndarray[Any, Any]
ONNX_TYPE = {n: getattr(TensorProto, n.upper()) for n in ("int8", "uint8", "int4", "uint4")}
RNG = np.random.default_rng(20)


def scheme_of(text: str, axis: int | None) -> Scheme:
    return parse_scheme(text).with_axis(axis)


def qdq_model(
    x: Array, scale: Array, zero: Array | None, scheme: Scheme, *, direction: str, out: int
) -> onnx.ModelProto:
    """QuantizeLinear (codes cast to int32, to be read) or DequantizeLinear of a graph input ``x``."""
    axis = {} if scheme.axis is None else {"axis": scheme.axis}
    block = {"block_size": scheme.group_size} if scheme.group_size else {}
    element = ONNX_TYPE[scheme.dtype.name]
    params = [numpy_helper.from_array(scale, "scale")]
    if zero is not None or direction == "QuantizeLinear":
        values = np.zeros(scale.shape, np.int8) if zero is None else zero
        params.append(helper.make_tensor("zero", element, scale.shape, values.reshape(-1).tolist()))
    names = ["x", *(p.name for p in params)]
    if direction == "QuantizeLinear":
        nodes = [
            helper.make_node(direction, names, ["codes"], **axis, **block),
            helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.INT32),
        ]
        inputs = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)]
    else:
        params.append(helper.make_tensor("x", element, x.shape, x.reshape(-1).tolist()))
        nodes = [helper.make_node(direction, names, ["y"], **axis, **block)]
        inputs = []
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", out, x.shape)], params)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run_ort(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


CASES = [
    ("int8 tensor sym", None),
    ("int8 tensor asym", None),
    ("uint8 tensor asym", None),
    ("int8 channel sym", 0),
    ("uint8 channel asym", 1),
    ("int8 g32 asym", 1),
    ("uint8 g32 asym", 0),
    ("int4 g32 sym", 1),
    ("int4 g32 asym", 0),
    ("uint4 g16 asym", 1),
]


def with_ties(shape: tuple[int, int], scale: Array, scheme: Scheme) -> Array:
    """Values on and between codes, on both sides of the range and far beyond it."""
    steps = RNG.integers(-700, 700, shape) / 2  # every second one is a tie
    return (steps * numerics.spread(scale, shape, scheme)).astype(np.float32)


@pytest.mark.parametrize(("text", "axis"), CASES)
@pytest.mark.parametrize("k", [96, 71])
def test_codes_are_those_of_onnx(text: str, axis: int | None, k: int) -> None:
    """Scales are powers of two, so that ties are ties. Groups may be ragged (71), as ONNX allows."""
    scheme = scheme_of(text, axis)
    shape = (64, k) if axis == 1 else (k, 64)
    exact, zero = numerics.choose_qparams(RNG.standard_normal(shape).astype(np.float32), scheme)
    scale = np.exp2(np.floor(np.log2(exact))).astype(np.float32)
    x = with_ties(shape, scale, scheme)
    codes = numerics.quantize(x, scale, zero, scheme)
    assert codes.dtype == scheme.dtype.storage
    model = qdq_model(x, scale, zero, scheme, direction="QuantizeLinear", out=TensorProto.INT32)
    assert np.array_equal(run_ort(model, {"x": x}), codes)
    assert codes.min() == scheme.dtype.qmin
    assert codes.max() == scheme.dtype.qmax
    if k % 32 == 0:  # the reference evaluator does not take ragged blocks
        assert np.array_equal(ReferenceEvaluator(model).run(None, {"x": x})[0], codes)


@pytest.mark.parametrize(("text", "axis"), CASES)
def test_codes_of_weights_are_those_of_onnx_runtime(text: str, axis: int | None) -> None:
    """The same with the scales as they come: the division is in float32 there too."""
    scheme = scheme_of(text, axis)
    x = RNG.standard_normal((64, 96)).astype(np.float32)
    scale, zero = numerics.choose_qparams(x, scheme)
    model = qdq_model(x, scale, zero, scheme, direction="QuantizeLinear", out=TensorProto.INT32)
    assert np.array_equal(run_ort(model, {"x": x}), numerics.quantize(x, scale, zero, scheme))


@pytest.mark.parametrize(("text", "axis"), CASES)
@pytest.mark.parametrize("element", [F32, F16], ids=str)
def test_values_are_those_of_onnx_runtime(text: str, axis: int | None, element: DType) -> None:
    scheme = scheme_of(text, axis)
    x = RNG.standard_normal((64, 96)).astype(element.storage)
    scale, zero = numerics.choose_qparams(x, scheme)
    codes = numerics.quantize(x, scale, zero, scheme)
    out = helper.np_dtype_to_tensor_dtype(scale.dtype)
    model = qdq_model(codes, scale, zero, scheme, direction="DequantizeLinear", out=out)
    values = numerics.dequantize(codes, scale, zero, scheme, element)
    assert values.dtype == element.storage
    assert np.array_equal(run_ort(model, {}), values)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_dynamic_parameters_are_those_of_onnx_runtime(sign: int) -> None:
    """DynamicQuantizeLinear computes its scale in float32: one unit in the last place of slack."""
    x = (RNG.standard_normal((7, 33)) * 3).astype(np.float32)
    x = np.abs(x) * sign if sign else x
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])]
    outs = [helper.make_tensor_value_info(n, t, None) for n, t in (("y", 2), ("s", 1), ("z", 2))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, s, z = session.run(None, {"x": x})
    scale, zero = numerics.choose_qparams(x, parse_scheme("uint8 asym"))
    assert abs(float(scale) - float(s)) <= np.spacing(np.float32(s))
    assert zero == z


@pytest.mark.parametrize("text", ["int4 g32 asym", "int4 g64 sym"])
def test_linear_agrees_with_matmulnbits(text: str) -> None:
    """The fused kernel at accuracy level 0 sums 64 products in float32: 1e-5 of the size of the sums."""
    n, k = 48, 64
    scheme = scheme_of(text, 1)
    w = RNG.standard_normal((n, k)).astype(np.float32)
    scale, zero = numerics.choose_qparams(w, scheme)
    codes = numerics.quantize(w, scale, zero, scheme)
    group = scheme.group[0]
    unsigned = (codes + 8).astype(np.uint8).reshape(n, -1, group)
    packed = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    tensors = {"b": packed, "s": scale}
    if zero is not None:
        z = np.concatenate([zero + 8, np.zeros((n, zero.shape[1] % 2), np.int8)], axis=1).astype(np.uint8)
        tensors["z"] = z[:, 0::2] | z[:, 1::2] << 4
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=group
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (5, k))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (5, n))],
        [numpy_helper.from_array(v, key) for key, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = RNG.standard_normal((5, k)).astype(np.float32)
    y = run_ort(model, {"x": x})
    assert np.abs(y - numerics.q_linear(x, codes, scale, zero, None, scheme)).max() <= 1e-5 * np.abs(y).max()
