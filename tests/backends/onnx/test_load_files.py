"""Weights that stay in their files, and where nodes came from."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompiler.backends.onnx.emit import emit_onnx, to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.ir import Loc
from qcompiler.payload import BytesPayload, FilePayload
from qcompiler.text import show
from tests.backends.onnx.build import f32, model_of, survives, weight
from tests.backends.onnx.roundtrip import compare_models, proto_of


def test_weights_of_a_file_stay_in_it(tmp_path: Path) -> None:
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [300], np.arange(300, dtype=np.float32))
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [f32("x", 300)],
        [f32("y", 300)],
        [weight("w", 300), typed, weight("small", 4)],
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph = load_onnx(tmp_path / "m.onnx")
    for name in ("w", "typed"):
        payload = graph.consts[name].payload
        assert isinstance(payload, FilePayload)
        assert payload.array().tolist() == list(range(300))
    assert isinstance(graph.consts["small"].payload, BytesPayload)
    assert "file:m.onnx:" in show(graph)


def test_external_data(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], [f32("x", 300)], [f32("y", 300)], [weight("w", 300)])
    (tmp_path / "sub").mkdir()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="sub/w.bin", size_threshold=0)
    graph = load_onnx(tmp_path / "m.onnx")
    payload = graph.consts["w"].payload
    assert isinstance(payload, FilePayload)
    assert payload.path.name == "w.bin"
    emit_onnx(graph, tmp_path / "out.onnx")
    assert compare_models(proto_of(tmp_path / "m.onnx"), proto_of(tmp_path / "out.onnx")) == ""


def test_a_linked_model_finds_the_data_beside_its_target(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], [f32("x", 300)], [f32("y", 300)], [weight("w", 300)])
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    onnx.save(model, tmp_path / "blobs" / "1", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "blobs" / "m.data").rename(tmp_path / "blobs" / "2")
    (tmp_path / "snapshot" / "m.onnx").symlink_to("../blobs/1")
    (tmp_path / "snapshot" / "m.data").symlink_to("../blobs/2")
    assert load_onnx(tmp_path / "snapshot" / "m.onnx").consts["w"].payload is not None


# -- where nodes came from -------------------------------------------------------------------------------------

TRACE = (
    'File "/src/net.py", line 11, in forward\n    return self.q(x)\n'
    'File "/venv/site-packages/torch/nn/modules/linear.py", line 134, in forward\n    return F.linear(x)'
)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("node_linear", {"pkg.torch.onnx.name_scopes": "['', 'layers.0', 'layers.0.q', 'linear']"}, ("layers.0.q", "")),
        (
            "n",
            {"namespace": ": net.M/layers.0: net.A/layers.0.q: torch.Linear/linear: aten.linear"},
            ("layers.0.q", ""),
        ),
        ("n", {"pkg.torch.onnx.stack_trace": TRACE}, ("", "net.py:11")),
        ("n", {"pkg.torch.onnx.name_scopes": "not a list"}, ("", "")),
        ("n", {"pkg.torch.onnx.name_scopes": "['add']"}, ("", "")),
        ("/layers.0/q/Relu_3", {}, ("layers.0.q", "")),
        ("/layers.0/q/Add", {}, ("", "")),
        ("n", {"qcompiler.scope": "a.b", "qcompiler.source": "f.py:1"}, ("a.b", "f.py:1")),
    ],
)
def test_provenance(name: str, metadata: dict[str, str], expected: tuple[str, str]) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name=name)
    for key, value in metadata.items():
        node.metadata_props.add(key=key, value=value)
    (op,) = survives(model_of([node], [f32("x", 1)], [f32("y", 1)]))
    assert (op.loc.scope, op.loc.source) == expected


def test_the_place_of_a_new_op_is_written_for_the_next_reader() -> None:
    graph = load_onnx(model_of([helper.make_node("Relu", ["x"], ["y"])], [f32("x", 1)], [f32("y", 1)]))
    old = graph.outputs[0]
    new = graph.create("onnx.Neg", [old], results=[("z", old.type)], loc=Loc("n", "layers.3", "net.py:5"))
    graph.set_output(0, new.result)
    again = load_onnx(to_model(graph))
    assert [op.loc for op in again] == [Loc(), Loc("n", "layers.3", "net.py:5")]
