"""Models that are refused, each in one sentence that names what is wrong and says what to do."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompiler.backends.onnx import wire
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.errors import InputError


def f32(name: str, *shape: int | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def add_model(size: int = 300) -> onnx.ModelProto:
    """%y = %x + %w."""
    w = onnx.numpy_helper.from_array(np.arange(size, dtype=np.float32), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="sum")]
    graph = helper.make_graph(nodes, "g", [f32("x", size)], [f32("y", size)], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def refused(source: Path | onnx.ModelProto) -> str:
    """The sentence with which ``source`` is refused."""
    with pytest.raises(InputError) as caught:
        load_onnx(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


def unharmed(path: Path) -> bool:
    """Whether ``path`` can be captured; if not, it is refused in a sentence."""
    try:
        load_onnx(path)
    except InputError:
        refused(path)
        return False
    return True


# -- files that are no models ----------------------------------------------------------------------------------


def test_an_absent_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.onnx") == f"cannot read the model {tmp_path}/no.onnx: No such file or directory"
    assert "Is a directory" in refused(tmp_path)


@pytest.mark.parametrize("data", [b"", b"hello, this is no model at all\n", b"\x08\x09", b"PK\x03\x04" + bytes(50)])
def test_other_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    assert "is not a readable ONNX model" in refused(tmp_path / "m.onnx")


def test_a_model_cut_short_anywhere(tmp_path: Path) -> None:
    whole = add_model().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        if not unharmed(path):
            continue
        # what was cut off happened to be whole fields after the graph
        assert onnx.ModelProto.FromString(whole[:length]).HasField("graph")


def test_bytes_changed_at_random(tmp_path: Path) -> None:
    """Damage is refused or goes unnoticed; nothing else is ever raised."""
    model = add_model()
    model.graph.node.append(helper.make_node("Clip", ["y", "", ""], ["z"], name="clip"))
    whole = bytearray(model.SerializeToString())
    rng = np.random.default_rng(5)
    path = tmp_path / "m.onnx"
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        unharmed(path)


def test_absurd_nesting(tmp_path: Path) -> None:
    data = bytes(2000)
    for _ in range(400):
        data = wire.field(1, wire.field(5, wire.field(6, data)))
    (tmp_path / "m.onnx").write_bytes(wire.field(7, data))
    assert "is not a readable ONNX model" in refused(tmp_path / "m.onnx")


# -- external data ---------------------------------------------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weight stands in w.bin."""
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "m.onnx"
    onnx.save(add_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert load_onnx(path).consts["w"].payload is not None
    return path


def change(path: Path, **entries: str | None) -> None:
    """Set or remove entries of the weight's external data."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    old = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in old.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def test_an_absent_data_file(external: Path) -> None:
    (external.parent / "w.bin").unlink()
    expected = (
        f"m.onnx: tensor 'w' is stored in {external.parent}/w.bin, which is absent; put the data file beside the model"
    )
    assert refused(external) == expected


def test_a_data_file_that_is_too_short(external: Path) -> None:
    os.truncate(external.parent / "w.bin", 1199)
    assert "needs bytes 0 to 1200 of" in refused(external)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "../w.bin"}, "leads out of the model's folder"),
        ({"location": "sub/../../w.bin"}, "leads out of the model's folder"),
        ({"location": "/etc/hostname"}, "is no relative path"),
        ({"location": ""}, "is no relative path"),
        ({"location": None}, "is no relative path"),
        ({"location": "."}, "absent"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "absent"),
        ({"offset": "4"}, "needs bytes 4 to 1204"),
        ({"offset": "-4"}, "needs bytes -4 to 1196"),
        ({"offset": "x"}, "an offset or length that is no number"),
        ({"length": "1196"}, "needs 1200 bytes, the model gives 1196"),
        ({"length": "-1"}, "needs bytes 0 to -1"),
    ],
)
def test_external_data_that_is_wrong(external: Path, entries: dict[str, str | None], reason: str) -> None:
    (external.parent.parent / "w.bin").write_bytes(bytes(1200))
    change(external, **entries)
    text = refused(external)
    assert text.startswith("m.onnx: tensor 'w' ")
    assert reason in text


def test_a_link_that_leaves_the_folder(external: Path) -> None:
    data = external.parent / "w.bin"
    data.rename(external.parent.parent / "w.bin")
    data.symlink_to("../w.bin")
    assert "leads out of the model's folder" in refused(external)


def test_no_length_means_the_size_of_the_tensor(external: Path) -> None:
    change(external, length=None)
    payload = load_onnx(external).consts["w"].payload
    assert payload is not None
    assert payload.array()[-1] == 299


def test_external_data_of_a_model_in_memory(external: Path) -> None:
    text = refused(onnx.load(external, load_external_data=False))
    assert text == "the model: tensor 'w' is stored in a file of its own; load the model from its path, not from memory"


def test_strings_outside_of_the_model(external: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    external.write_bytes(model.SerializeToString())
    assert "holds strings outside of the model" in refused(external)


# -- graphs ----------------------------------------------------------------------------------------------------

Change = Callable[[onnx.GraphProto], object]


def _cycle(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Relu", ["b"], ["a"]))
    graph.node.append(helper.make_node("Relu", ["a"], ["b"]))


def _reference(graph: onnx.GraphProto) -> None:
    graph.node[0].attribute.add(name="k", type=onnx.AttributeProto.INT, ref_attr_name="of_a_function")


def _twice(graph: onnx.GraphProto) -> None:
    graph.node[0].attribute.extend([helper.make_attribute("k", 1), helper.make_attribute("k", 2)])


def _graph_called(name: str) -> Change:
    def edit(graph: onnx.GraphProto) -> None:
        graph.node[0].attribute.append(helper.make_attribute(name, onnx.GraphProto()))

    return edit


def _tensor(**fields: object) -> Change:
    def edit(graph: onnx.GraphProto) -> None:
        for name, value in fields.items():
            if name == "dims":
                del graph.initializer[0].dims[:]
                graph.initializer[0].dims.extend(value)  # type: ignore[arg-type]
            else:
                setattr(graph.initializer[0], name, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda g: g.node.append(helper.make_node("Relu", ["x"], ["y"])), "'y' is computed twice"),
        (lambda g: g.node.append(helper.make_node("Relu", ["x"], ["w"])), "'w' is given and computed"),
        (lambda g: g.node.append(helper.make_node("Relu", ["y"], ["x"])), "'x' is given and computed"),
        (lambda g: g.node.append(helper.make_node("Split", ["x"], ["p", "p"])), "'p' is computed twice"),
        (lambda g: g.initializer.append(g.initializer[0]), "'w' is an initializer twice"),
        (lambda g: g.input.append(g.input[0]), "'x' is an input twice"),
        (
            lambda g: g.node.append(helper.make_node("Relu", ["q"], ["r"], name="lost")),
            "node 'lost' reads 'q', which nothing",
        ),
        (lambda g: g.output.append(f32("nowhere", 1)), "the output 'nowhere' is computed by nothing"),
        (_cycle, "the graph has a cycle through Relu 'a'"),
        (_reference, "attribute 'k' refers to an attribute of a function that is absent"),
        (_twice, "has the attribute 'k' twice"),
        (
            lambda g: g.node.append(helper.make_node("X", ["x"], ["z"], domain="q")),
            "cannot name operator 'X' of domain 'q'",
        ),
        (lambda g: g.node.append(helper.make_node("", ["x"], ["z"])), "cannot name operator ''"),
        (_graph_called("body.0"), "cannot name a nested graph 'body.0'"),
        (_tensor(data_type=99), "tensor 'w' has the element type 99"),
        (_tensor(data_type=TensorProto.FLOAT6E2M3), "tensor 'w' has the element type FLOAT6E2M3"),
        (_tensor(dims=[-300]), "impossible shape [-300]"),
        (_tensor(dims=[301]), "needs 1204 bytes, got 1200"),
        (_tensor(dims=[1 << 40, 1 << 40]), "bytes, got 1200"),
        (_tensor(raw_data=b""), "needs 1200 bytes, got 0"),
    ],
)
def test_graphs_that_make_no_sense(edit: Change, reason: str) -> None:
    model = add_model()
    edit(model.graph)
    assert reason in refused(model)


def test_functions_of_another_opset_are_refused_or_inlined() -> None:
    function = helper.make_function(
        "mine", "Up", ["a"], ["b"], [helper.make_node("Upsample", ["a"], ["b"])], [helper.make_opsetid("", 8)]
    )
    model = add_model()
    model.graph.node.append(helper.make_node("Up", ["y"], ["z"], domain="mine"))
    model.functions.append(function)
    model.opset_import.add(domain="mine", version=1)
    assert "its functions (mine.Up) cannot be inlined" in refused(model)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    data = add_model().SerializeToString().replace(b"\x03sum", b"\x03s\xffm")
    (tmp_path / "m.onnx").write_bytes(data)
    assert "no UTF-8 text" in refused(tmp_path / "m.onnx")
