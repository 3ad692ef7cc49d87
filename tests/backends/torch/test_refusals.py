"""What cannot be carried is refused in one sentence; nothing in a file or a text runs code."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler import dtypes
from qcompiler.backends.torch.archive import open_program
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.names import FUNCTIONS, from_atom, op_name, target_of, to_atom
from qcompiler.backends.torch.payload import FROM_TORCH, TorchPayload, tensor_of
from qcompiler.backends.torch.specs import parse_spec, spec_text
from qcompiler.backends.torch.stack import source_line
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Graph, TensorType
from qcompiler.payload import ArrayPayload, BytesPayload, constant
from qcompiler.reader import parse
from qcompiler.text import show
from tests.backends.torch.exports import assert_same, program, sample

# -- capture ---------------------------------------------------------------------------------------------------


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.sparse.mm(self.get_buffer("eye"), x)
        return y


def test_a_sparse_constant_is_refused() -> None:
    with pytest.raises(InputError, match=r"'eye' is a torch\.sparse_coo; only plain dense tensors"):
        load(torch.export.export(_Sparse(), (torch.randn(3, 3),)))


def test_a_call_of_unknown_python_is_refused() -> None:
    captured = torch.export.export(nn.ReLU(), (torch.randn(3),))
    next(n for n in captured.graph.nodes if n.op == "call_function").target = json.dumps
    with pytest.raises(InputError, match=r"a call of json\.dumps cannot be captured"):
        load(captured)


def test_tied_and_written_is_one_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = torch.zeros(3)
            self.register_buffer("a", shared)
            self.register_buffer("b", shared)

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("a").add_(x)
            return self.get_buffer("b") * 2

    captured = torch.export.export(Net(), (torch.ones(3),))
    graph = load(captured)
    assert [v.name for v in graph.inputs] == ["x", "a"]
    assert graph.inputs[1].meta["aliases"] == ("b",)
    ours = to_graph_module(graph)
    assert torch.equal(ours(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(ours(torch.ones(3)), torch.full((3,), 4.0))


# -- files -----------------------------------------------------------------------------------------------------


def _rewrite(source: Path, out: Path, member: str, change: Any) -> Path:
    """``source`` with the content of each member whose name ends in ``member`` changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info.filename)
            new.writestr(info.filename, change(data) if info.filename.endswith(member) else data)
    return out


class _Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.export.save(program("mlp"), tmp_path / "mlp.pt2")
    return tmp_path / "mlp.pt2"


def test_a_pickle_that_runs_code_is_refused(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = _rewrite(archive, tmp_path / "bad.pt2", "sample_inputs/model.pt", lambda _: pickle.dumps(_Harm()))
    for reader in (open_program, load):
        with pytest.raises(InputError, match=r"holds a pickle .* that could run code"):
            reader(bad)
    assert not (tmp_path / "harm").exists()


def test_a_pickled_weight_is_looked_at(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def marked(data: bytes) -> bytes:
        config = json.loads(data)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    first = _rewrite(archive, tmp_path / "a.pt2", "_weights_config.json", marked)
    bad = _rewrite(first, tmp_path / "b.pt2", "weights/weight_0", lambda _: pickle.dumps(_Harm()))
    with pytest.raises(InputError, match="holds a pickle"):
        load(bad)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "open('x')", "s.y", "print(1)", "[1][0]", "eval('1')"])
def test_a_size_that_is_code_is_refused(text: str, archive: Path, tmp_path: Path) -> None:
    def changed(data: bytes) -> bytes:
        return re.sub(rb'"expr_str": "[^"]*"', b'"expr_str": ' + json.dumps(text).encode(), data)

    bad = _rewrite(archive, tmp_path / "bad.pt2", "models/model.json", changed)
    with pytest.raises(InputError, match="that is no arithmetic; it is not loaded"):
        load(bad)


def test_other_files_are_named(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(InputError, match=r"text\.pt2 is not a \.pt2 archive"):
        load(tmp_path / "text.pt2")
    data = archive.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.pt2 is not a \.pt2 archive"):
        load(tmp_path / "cut.pt2")
    damaged = _rewrite(archive, tmp_path / "damaged.pt2", "models/model.json", lambda data: data[:50])
    with pytest.raises(InputError, match=r"damaged\.pt2 is damaged"):
        load(damaged)


# -- emission --------------------------------------------------------------------------------------------------


def test_only_torch_graphs_are_emitted() -> None:
    with pytest.raises(InputError, match="dialect 'onnx' cannot be emitted"):
        to_graph_module(Graph())


def test_an_unknown_op_is_named() -> None:
    op = "%y : f32[2] = nope.f.default(%x) {args = [$0]}"
    graph = parse(f"graph @main dialect=aten {{\n  input %x : f32[2]\n  {op}\n  return %y\n}}\n")
    with pytest.raises(InputError, match=r"no operator 'nope\.f\.default' in this process"):
        to_graph_module(graph)


def test_text_cannot_call_python() -> None:
    for name in ("py.os.system", "py.builtins.eval", "py.operator.methodcaller", "torch.load", "aten.linear"):
        with pytest.raises(InputError, match="no operator"):
            target_of(name)


def test_text_of_a_graph_without_its_weights_is_not_emitted() -> None:
    with pytest.raises(InputError, match="printed without its values"):
        to_graph_module(parse(show(load(program("mlp")))))


def test_ops_of_ours_are_lowered_by_the_caller() -> None:
    graph = load(program("mlp"))
    for op in list(graph):
        if op.name == "aten.linear.default":
            new = graph.create("q.linear", op.operands, {"gain": 2}, [(graph.fresh("y"), op.result.type)], before=op)
            op.result.replace_uses(new.result)
            op.erase()
    with pytest.raises(InputError, match=r"q\.linear 'y' has no implementation in torch here"):
        to_graph_module(graph)
    module = to_graph_module(graph, lambda op: _doubled if op.name == "q.linear" else None)
    x = sample("mlp").args[0]
    linear, _, head = sample("mlp").module.children()
    assert torch.equal(module(x), head(torch.relu(linear(x) * 2)) * 2)


def _doubled(x: Tensor, weight: Tensor, bias: Tensor, gain: int) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias) * gain


def test_a_constant_below_a_constant_is_placed_beside_it() -> None:
    graph = load(program("mlp"))
    weight = graph.consts["0.weight"]
    scale = graph.add_const("0.weight.scale", constant(np.float32(2)))
    (op,) = weight.users
    new = graph.create("aten.mul.Tensor", [weight, scale], parse_call("[$0, $1]"), [("scaled", weight.type)], before=op)
    op.set_operand(1, new.result)
    state = to_graph_module(graph).state_dict()
    assert {"0.weight", "0.weight_scale"} <= set(state)


def parse_call(args: str) -> dict[str, Any]:
    text = f"graph @m dialect=aten {{\n  input %a : f32[]\n  %b : f32[] = x(%a) {{args = {args}}}\n  return %b\n}}\n"
    return dict(next(iter(parse(text))).attrs)


# -- pieces ----------------------------------------------------------------------------------------------------


def test_every_python_function_has_one_name() -> None:
    for name, function in FUNCTIONS.items():
        assert FUNCTIONS[op_name(function)] is function, name


@pytest.mark.parametrize(
    "value",
    [
        torch.float8_e4m3fn,
        torch.device("cuda:1"),
        torch.channels_last,
        torch.strided,
        1 - 2j,
        torch.ops.aten.add.Tensor,
    ],
)
def test_atoms_come_back(value: Any) -> None:
    atom = to_atom(value)
    assert atom is not None
    assert from_atom(atom) == value


@pytest.mark.parametrize(
    "atom", [Atom("torch.dtype", "load"), Atom("torch.device", "nowhere"), Atom("complex", "x"), Atom("python", "1")]
)
def test_other_atoms_are_refused(atom: Atom) -> None:
    with pytest.raises(InputError):
        from_atom(atom)


def test_structures_come_back() -> None:
    from torch.utils import _pytree as pytree

    tree: Any = ((1, [2, {"a": 3, "b": (4,)}]), {})
    spec = pytree.tree_structure(tree)
    assert spec_text(spec, "x") == "(('*', ['*', {'a': '*', 'b': ('*',)}]), {})"
    for s in (spec, pytree.tree_structure(__import__("collections").OrderedDict(a=1)), pytree.tree_structure(1)):
        assert parse_spec(spec_text(s, "x")) == s
    with pytest.raises(InputError, match="is no structure"):
        parse_spec("f()")


@pytest.mark.parametrize("dtype", list(FROM_TORCH))
def test_tensors_and_payloads_agree(dtype: torch.dtype) -> None:
    tensor = torch.arange(-6, 6).reshape(3, 4).to(torch.float32).to(dtype).t()
    payload = TorchPayload(tensor)
    assert payload.shape == (4, 3)
    assert payload.array().dtype == payload.dtype.storage
    data = b"".join(bytes(p) for p in payload.chunks(7))
    assert data == dtypes.to_bytes(payload.array(), payload.dtype)
    assert np.array_equal(payload.rows(1, 3).view(np.uint8), np.ascontiguousarray(payload.array()[1:3]).view(np.uint8))
    assert_same(tensor_of(ArrayPayload(payload.array(), payload.dtype)), tensor.contiguous())
    assert_same(tensor_of(BytesPayload(data, payload.dtype, payload.shape)), tensor.contiguous())
    assert payload.ref() == TorchPayload(tensor.contiguous()).ref()


def test_sub_byte_payloads_come_unpacked() -> None:
    assert tensor_of(constant([-8, 7], dtypes.INT4)).dtype == torch.int8
    assert tensor_of(constant([0, 15], dtypes.UINT4)).tolist() == [0, 15]
    assert tensor_of(constant([1.5, -6.0], dtypes.dtype("f4e2m1"))).dtype == torch.uint8
    assert tensor_of(constant([3], dtypes.dtype("nf4"))).dtype == torch.uint8
    assert tensor_of(constant(np.float32(3))).shape == ()


def test_tensors_without_values_say_so() -> None:
    payload = TorchPayload(torch.empty(2, 3, device="meta"), "w")
    assert payload.ref() == "meta:w"
    with pytest.raises(InputError, match="'w' has a shape but no values"):
        payload.array()
    with pytest.raises(InputError, match=r"element type torch\.complex32"):
        TorchPayload(torch.zeros(1, dtype=torch.complex32), "c")
    assert TensorType(payload.dtype, payload.shape).static_shape == (2, 3)


def test_the_users_line_is_the_innermost_outside_torch() -> None:
    trace = 'File "/a/torch/model.py", line 3, in f\n x\nFile "/p/site-packages/torch/nn/linear.py", line 9, in g\n y'
    assert source_line(trace) == "model.py:3"
    assert source_line(trace.replace("/a/torch/model.py", "C:\\\\m\\\\net.py")) == "net.py:3"
    assert source_line('File "/p/site-packages/torch/nn/modules/linear.py", line 9, in g') == "linear.py:9"
    assert source_line('File "/p/site-packages/torch/fx/x.py", line 9, in g') == ""
    assert source_line("") == ""
