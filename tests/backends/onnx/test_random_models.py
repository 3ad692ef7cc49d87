"""Random models, nested graphs and notes included, come out as they went in; random messages are stripped exactly."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qcompiler.backends.onnx import wire
from qcompiler.backends.onnx.emit import emit_onnx, to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.reader import parse
from qcompiler.text import show
from tests.backends.onnx.roundtrip import compare_models, proto_of

TEXT = st.text(max_size=6)
NAMES = st.text(min_size=1, max_size=4) | st.sampled_from(["a b", "x/y", '"', "\\", "1", "onnx::x_1", "%x", "\n"])
INT64 = st.integers(-(2**63), 2**63 - 1)
F32 = st.floats(width=32, allow_nan=False)


def _typed(type: int, **fields: object) -> onnx.AttributeProto:
    return onnx.AttributeProto(type=type, **fields)  # type: ignore[arg-type]


_A = onnx.AttributeProto
ATTRIBUTES = st.one_of(
    INT64.map(lambda v: _typed(_A.INT, i=v)),
    F32.map(lambda v: _typed(_A.FLOAT, f=v)),
    (st.binary(max_size=5) | TEXT.map(str.encode)).map(lambda v: _typed(_A.STRING, s=v)),
    st.lists(INT64, max_size=3).map(lambda v: _typed(_A.INTS, ints=v)),
    st.lists(F32, max_size=3).map(lambda v: _typed(_A.FLOATS, floats=v)),
    st.lists(st.binary(max_size=3), max_size=3).map(lambda v: _typed(_A.STRINGS, strings=v)),
    st.lists(F32, max_size=3).map(lambda v: _typed(_A.TENSOR, t=onnx.numpy_helper.from_array(np.array(v, np.float32)))),
)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> onnx.TensorProto:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape))
    code = draw(st.sampled_from([1, 2, 3, 6, 7, 9, 10, 11, 16, 17, 21, 22, 23]))
    width = {11: 64, 7: 64, 1: 32, 6: 32, 10: 16, 16: 16}.get(code, 4 if code in (21, 22, 23) else 8)
    size = (count * width + 7) // 8
    raw = draw(st.binary(min_size=size, max_size=size)) if code != TensorProto.BOOL else bytes(size)
    return onnx.TensorProto(name=name, data_type=code, dims=shape, raw_data=raw, doc_string=draw(TEXT))


@st.composite
def graphs(draw: st.DrawFn, outer: tuple[str, ...], depth: int) -> onnx.GraphProto:
    """A graph that reads its own values and those of ``outer``; inner names are free to hide outer ones."""
    names = draw(st.lists(NAMES, min_size=3, max_size=9, unique=True))
    graph = onnx.GraphProto(name=draw(TEXT), doc_string=draw(TEXT))
    own: list[str] = []
    for _ in range(draw(st.integers(0, 2))):
        own.append(name := names.pop())
        shape = draw(st.none() | st.lists(st.integers(0, 9) | st.none() | NAMES, max_size=2))
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for _ in range(draw(st.integers(0, 2))):
        if names:
            own.append(name := names.pop())
            graph.initializer.append(draw(tensors(name)))
    while names:
        outputs = [names.pop() for _ in range(min(len(names), draw(st.integers(1, 2))))]
        own_now = tuple(own)
        # what the file means by a name that is defined here later is an error, not an outer value
        readable = own_now + tuple(n for n in outer if n not in own and n not in outputs and n not in names)
        inputs = draw(st.lists(st.sampled_from(["", *readable]), max_size=3))
        domain = draw(st.sampled_from(["", "com.microsoft", "x y"]))
        node = graph.node.add(op_type="Op", domain=domain, input=inputs, output=outputs, name=draw(TEXT))
        for key in draw(st.lists(NAMES, max_size=2, unique=True)):
            node.attribute.append(draw(ATTRIBUTES))
            node.attribute[-1].name = key
        if depth and draw(st.booleans()):
            inner = draw(graphs(tuple(dict.fromkeys(readable)), depth - 1))
            node.attribute.append(helper.make_attribute("a graph", inner))
        node.metadata_props.add(key=draw(TEXT), value=draw(TEXT))
        own += outputs
    for name in draw(st.lists(st.sampled_from(own), min_size=1, max_size=2, unique=True)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return graph


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    graph = draw(graphs((), 2))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("x y", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=13, doc_string=draw(TEXT))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(models(), st.booleans())
def test_random_models_survive(model: onnx.ModelProto, external: bool) -> None:
    graph = load_onnx(model)
    assert compare_models(model, to_model(graph)) == ""
    text = show(graph)
    assert show(parse(text)) == text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        emit_onnx(graph, path, external=external)
        assert compare_models(model, proto_of(path)) == ""
        assert show(load_onnx(path)) == show(load_onnx(to_model(graph)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(models(), st.integers(1, 40))
def test_stripping_leaves_out_bytes_and_nothing_else(model: onnx.ModelProto, limit: int) -> None:
    old, wire.STRIP_LIMIT = wire.STRIP_LIMIT, limit
    try:
        data = model.SerializeToString()
        stripped = onnx.ModelProto.FromString(wire.strip(memoryview(data), "token", "m"))
    finally:
        wire.STRIP_LIMIT = old
    put_back(stripped, data)
    assert stripped == model


def put_back(message: object, data: bytes) -> None:
    """Undo the stripping of every tensor in ``message``."""
    if isinstance(message, onnx.TensorProto):
        if message.external_data:
            (entry,) = message.external_data
            offset, length = map(int, entry.value.split(":"))
            message.raw_data = data[offset : offset + length]
            message.ClearField("external_data")
            message.ClearField("data_location")
        return
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                put_back(item, data)


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers(value: int) -> None:
    assert onnx.AttributeProto.FromString(wire.integer(3, value)).i == value
