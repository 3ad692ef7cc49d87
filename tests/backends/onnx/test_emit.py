"""What is written: valid protobuf, streamed bytes, the data file, versions, refusals."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from qcompiler.backends.onnx import emit as emit_module
from qcompiler.backends.onnx.emit import EmitInfo, emit_onnx, to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.streaming import reading_order
from qcompiler.dtypes import F16, F32, INT4, INT8, TABLE, Array, DType
from qcompiler.errors import InputError, StructureError
from qcompiler.ir import UNKNOWN, Graph, TensorType
from qcompiler.payload import (
    ArrayPayload,
    BytesPayload,
    Computation,
    Payload,
    RandomPayload,
    UnreadablePayload,
    computed,
    constant,
)
from qcompiler.reader import parse
from tests.backends.onnx.corpus import session


def linear(*payloads: Payload) -> Graph:
    """A chain of MatMuls, from %x of one row to %y of the last."""
    graph = Graph("chain")
    x = graph.add_input("x", TensorType(F32, (1, payloads[0].shape[0])))
    for i, payload in enumerate(payloads):
        w = graph.add_const(f"w{i}", payload)
        x = graph.create("onnx.MatMul", [x, w], results=[(f"y{i}", TensorType(F32, (1, payload.shape[1])))]).result
    graph.add_output(x)
    return graph


def weights(*shape: int, seed: int = 0) -> RandomPayload:
    return RandomPayload(seed, F32, shape)


def test_one_file_and_its_description(tmp_path: Path) -> None:
    graph = linear(weights(64, 64), weights(64, 4, seed=1))
    info = emit_onnx(graph, tmp_path / "m.onnx", metadata={"recipe": "none"})
    assert info == EmitInfo(tmp_path / "m.onnx", None, (tmp_path / "m.onnx").stat().st_size, 0, 10, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    model = onnx.load(tmp_path / "m.onnx")
    assert model == to_model(graph, metadata={"recipe": "none"})
    assert [(p.key, p.value) for p in model.metadata_props] == [("recipe", "none")]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]


def test_a_data_file_and_its_layout(tmp_path: Path) -> None:
    shapes = [(64, 16), (16, 2048), (2048, 1024), (1024, 4), (4, 4)]
    graph = linear(*(weights(*s, seed=i) for i, s in enumerate(shapes)))
    info = emit_onnx(graph, tmp_path / "m.onnx", external=True)
    assert info.data_path == tmp_path / "m.onnx.data"
    assert info.external_tensors == 4
    assert info.data_nbytes == info.data_path.stat().st_size
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    entries = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    }
    assert entries["w4"] == {}  # 64 bytes stay in the model
    assert all(e["location"] == "m.onnx.data" for e in entries.values() if e)
    assert [int(entries[f"w{i}"]["offset"]) % step for i, step in enumerate((64, 4096, 65536, 64))] == [0] * 4
    whole = onnx.load(tmp_path / "m.onnx")
    for tensor, value in zip(whole.graph.initializer, graph.consts.values(), strict=True):
        assert value.payload is not None
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), value.payload.array())
    again = load_onnx(tmp_path / "m.onnx")
    x = np.ones((1, 64), np.float32)
    emit_onnx(again, tmp_path / "one.onnx", external=False)
    (a,), (b,) = (session(tmp_path / f).run(None, {"x": x}) for f in ("m.onnx", "one.onnx"))
    assert np.array_equal(a, b)


def test_the_size_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = linear(weights(64, 64))
    monkeypatch.setattr(emit_module, "EXTERNAL_OVER", 64 * 64 * 4)
    assert emit_onnx(graph, tmp_path / "a.onnx").data_path is None
    monkeypatch.setattr(emit_module, "EXTERNAL_OVER", 64 * 64 * 4 - 1)
    assert emit_onnx(graph, tmp_path / "b.onnx").data_path == tmp_path / "b.onnx.data"
    monkeypatch.setattr(emit_module, "INLINE_LIMIT", 64)
    with pytest.raises(InputError, match="do not fit into one ONNX file"):
        emit_onnx(graph, tmp_path / "c.onnx", external=False)
    assert not (tmp_path / "c.onnx").exists()


def test_what_is_shared_is_written_once(tmp_path: Path) -> None:
    shared = weights(32, 32)
    data = BytesPayload(bytes(4096), F32, (32, 32))
    same = BytesPayload(data.data, F32, (32, 32))
    info = emit_onnx(linear(shared, shared, data, same), tmp_path / "m.onnx", external=True)
    assert info.data_nbytes == 2 * 4096
    back = load_onnx(tmp_path / "m.onnx")
    assert emit_onnx(back, tmp_path / "n.onnx", external=True).data_nbytes == 2 * 4096


def test_nested_graphs_reach_the_data_file(tmp_path: Path) -> None:
    big = onnx.numpy_helper.from_array(np.arange(512, dtype=np.float32), "k")
    out = helper.make_tensor_value_info("r", TensorProto.FLOAT, [512])

    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["x", "k"], ["r"])], op, [], [out], [big])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul"))
    given = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [512])]
    model = helper.make_model(
        helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", 1, [512])]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    info = emit_onnx(load_onnx(model), tmp_path / "m.onnx", external=True)
    assert info.external_tensors == 2
    x = np.ones(512, np.float32)
    for c in (True, False):
        (got,) = session(tmp_path / "m.onnx").run(None, {"c": np.array(c), "x": x})
        assert np.array_equal(got, np.arange(512) + 1 if c else np.arange(512))


@pytest.mark.parametrize("name", sorted(n for n in TABLE if n != "nf4"))
def test_every_element_type_is_written_and_read(name: str, tmp_path: Path) -> None:
    element = TABLE[name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, 24 * 16, np.uint8)
    values: Array
    if element.kind == "string":
        values = np.array(["", "ß", "long " * 20], object)
    elif element.kind == "bool":
        values = raw[:21] % 2 == 1
    elif element.packed:
        values = (raw[:21] % (1 << element.bits)).astype(np.uint8)
        values = values.view(element.storage) if element.kind == "float" else _signed(values, element)
    else:
        values = raw[: 21 * element.storage.itemsize].view(element.storage)
    graph = Graph("g")
    graph.add_output(graph.add_const("c", ArrayPayload(values, element)))
    emit_onnx(graph, tmp_path / "m.onnx")
    payload = load_onnx(tmp_path / "m.onnx").consts["c"].payload
    assert payload is not None
    assert payload.dtype == element
    got = payload.array()
    assert got.tolist() == values.tolist() if element.kind == "string" else got.tobytes() == values.tobytes()
    # what the onnx package reads is the same
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    theirs = onnx.numpy_helper.to_array(tensor)
    if element.packed and element.is_integer:
        theirs = theirs.astype(element.storage)
    assert theirs.tolist() == values.tolist() if element.kind == "string" else theirs.tobytes() == values.tobytes()


def _signed(codes: Array, element: DType) -> Array:
    return np.where(codes > element.qmax, codes.astype(np.int16) - (1 << element.bits), codes).astype(element.storage)


@pytest.mark.parametrize(
    ("element", "version"), [("int4", 10), ("f8e4m3", 9), ("f4e2m1", 11), ("f8e8m0", 12), ("int2", 13), ("f32", 8)]
)
def test_the_ir_version_is_raised_where_the_types_ask_for_it(element: str, version: int) -> None:
    graph = Graph("g")
    graph.meta["ir_version"] = 8
    graph.add_output(graph.add_const("c", constant(np.ones(4), TABLE[element])))
    assert to_model(graph).ir_version == version


def test_the_ir_version_is_one_that_the_runtime_loads() -> None:
    graph = linear(weights(2, 2))
    graph.meta["ir_version"] = 99
    assert to_model(graph).ir_version == 13
    ort.InferenceSession(to_model(graph).SerializeToString())


def test_a_custom_domain_is_imported() -> None:
    graph = linear(weights(2, 2))
    graph.meta["opset_import"] = (("", 17), ("other", 3))
    gelu = graph.create("com.microsoft.Gelu", [graph.outputs[0]], results=[("z", UNKNOWN)])
    graph.set_output(0, gelu.result)
    imports = [(o.domain, o.version) for o in to_model(graph).opset_import]
    assert imports == [("", 17), ("other", 3), ("com.microsoft", 1)]


# -- computations ----------------------------------------------------------------------------------------------


def quantized(seed: int, log: list[str]) -> tuple[Payload, Payload, Payload]:
    """Codes, scales and zeros of one weight; ``log`` notes each run and each release."""

    def fn(w: Payload) -> tuple[Array, Array, Array]:
        log.append(f"run {seed}")
        values = w.array()
        scale = np.abs(values).max(0, keepdims=True) / 7
        return (values / scale).round().astype(np.int8), scale.astype(np.float32), np.zeros_like(scale, np.int8)

    class Watched(Computation):
        def release(self) -> None:
            log.append(f"release {seed}")
            super().release()

    source = RandomPayload(seed, F32, (64, 32))
    results = [(INT8, (64, 32)), (F32, (1, 32)), (INT8, (1, 32))]
    codes, scales, zeros = Watched(f"q{seed}", fn, [source], results).outputs()
    return codes, scales, zeros


@pytest.mark.parametrize("external", [False, True])
def test_a_computation_runs_once_and_is_released(tmp_path: Path, external: bool) -> None:
    log: list[str] = []
    graph = Graph("g")
    parts = [quantized(seed, log) for seed in (1, 2)]
    for kind in (1, 2, 0):  # scales first, codes last, the two weights interleaved
        for seed, results in enumerate(parts):
            graph.add_output(graph.add_const(f"{'csz'[kind]}{seed}", results[kind]))
    emit_onnx(graph, tmp_path / "m.onnx", external=external)
    assert [line for line in log if line.startswith("run")] == ["run 1", "run 2"]
    if not external:  # else the smallest results wait for the model file, which is written last
        assert log.index("release 1") < log.index("run 2")
    model = onnx.load(tmp_path / "m.onnx")
    got = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for seed, results in enumerate(parts):
        for kind, result in zip("csz", results, strict=True):
            assert np.array_equal(got[f"{kind}{seed}"], result.array())


def test_a_layout_of_the_codes_stays_with_their_scales() -> None:
    log: list[str] = []
    graph = Graph("g")
    for seed in (1, 2):
        codes, scales, _ = quantized(seed, log)
        moved = Computation("layout", lambda p: (p.array().T.copy(),), [codes], [(INT8, (32, 64))]).outputs()[0]
        graph.add_const(f"s{seed}", scales)
        graph.add_const(f"c{seed}", moved)
    graph.add_const("alone", weights(4, 4))
    assert [v.name for v in reading_order(graph.consts.values())] == ["c1", "s1", "c2", "s2", "alone"]


def test_a_constant_that_is_not_what_it_says(tmp_path: Path) -> None:
    class Short(UnreadablePayload):
        def chunks(self, limit: int = 0) -> Iterator[bytes]:
            yield b"abc"

    graph = linear(Short("x", F32, (2, 2)))
    with pytest.raises(StructureError, match="has 3 bytes where its type says 16"):
        emit_onnx(graph, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("%y : f32[2] = q.dequantize(%x)", "q.dequantize 'y' cannot be written as ONNX; lower it first"),
        ("%y : f32[2] = aten.relu(%x) {k = none}", None),
        ('%y : f32[2] = onnx.Relu(%x) {k = [1, "a"]}', "is no list of one type"),
        ("%y : f32[2] = onnx.Relu(%x) {k = <int4 g128 asym>}", "has no ONNX attribute type"),
        ("%y : f32[2] = onnx.Relu(%x) {k = []}", "is no list of one type"),
        ("%y : f32[2] = Relu(%x)", "has no dialect"),
    ],
)
def test_what_cannot_be_written_is_named(text: str, reason: str | None) -> None:
    graph = parse(f"graph @g dialect=onnx {{\n input %x : f32[2]\n {text}\n return %y\n}}")
    if reason is None:
        to_model(graph)
        return
    with pytest.raises(StructureError) as caught:
        to_model(graph)
    assert reason in str(caught.value)


def test_other_dialects_and_types() -> None:
    with pytest.raises(StructureError, match="dialect 'aten'"):
        to_model(Graph("g", "aten"))
    graph = Graph("g")
    graph.add_output(graph.add_const("c", ArrayPayload(np.zeros(4, np.uint8), TABLE["nf4"])))
    with pytest.raises(StructureError, match="'c' has the type nf4"):
        to_model(graph)


def test_a_graph_from_text_runs() -> None:
    graph = parse(
        """graph @g dialect=onnx {
          input %x : f32[n, 8]
          const %w : f32[8, 4] = rand:3
          %h : f32[n, 4] = onnx.MatMul(%x, %w) loc("mm", "a.b")
          %y : f32[n, 4] = onnx.Softmax(%h) {axis = -1}
          return %y
        }"""
    )
    sess = ort.InferenceSession(to_model(graph).SerializeToString())
    (y,) = sess.run(None, {"x": np.ones((3, 8), np.float32)})
    assert y.shape == (3, 4)


def test_low_bits_are_packed_as_onnx_packs_them() -> None:
    graph = Graph("g")
    graph.add_output(graph.add_const("c", ArrayPayload(np.array([-8, 7, 1], np.int8), INT4)))
    (tensor,) = to_model(graph).graph.initializer
    assert tensor.raw_data == bytes([0x78, 0x01])
    assert onnx.numpy_helper.to_array(tensor).tolist() == np.array([-8, 7, 1], ml_dtypes.int4).tolist()


@pytest.mark.parametrize("external", [False, True])
def test_memory_depends_on_the_biggest_tensor(tmp_path: Path, external: bool) -> None:
    graph = linear(*(weights(1024, 1024, seed=i) for i in range(16)))
    emit_onnx(graph, tmp_path / "in.onnx", external=external)
    again = load_onnx(tmp_path / "in.onnx")
    for value in again.consts.values():
        source = value.payload
        assert source is not None
        value.payload = computed("half", lambda p: p.array().astype(np.float16), [source], F16, source.shape)
    tracemalloc.start()
    try:
        info = emit_onnx(again, tmp_path / "out.onnx", external=external)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert info.nbytes + info.data_nbytes > 32 << 20
    assert peak < 16 << 20  # one tensor has 4 MiB, its half 2
