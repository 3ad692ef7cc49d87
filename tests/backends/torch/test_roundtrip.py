"""Exported program -> graph -> GraphModule: the same bits, the same structure, the same state; nothing dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.export import export_program
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Graph, Hole, Op, OpaqueType, TensorType
from qcompiler.payload import FilePayload
from qcompiler.reader import parse
from qcompiler.text import show
from tests.backends.torch.exports import NETS, ZOO, assert_same, fresh, program, sample, second


@pytest.mark.parametrize("name", [*ZOO, *NETS])
def test_emitted_module_computes_the_same_bits(name: str) -> None:
    graph = load(program(name))
    text = show(graph)
    assert show(parse(text)) == text
    assert "FakeTensor" not in text
    ours, theirs = to_graph_module(graph), program(name).module()
    state = {k: v.clone() for k, v in sample(name).module.state_dict().items()}
    theirs.load_state_dict(state)
    for args in (sample(name).args, second(name), sample(name).args):
        mine, reference = fresh(args), fresh(args)
        assert_same(ours(*mine), theirs(*reference))
        assert_same(mine, reference)  # what the program writes to its arguments
    assert_same(dict(sorted(ours.state_dict().items())), dict(sorted(theirs.state_dict().items())))
    theirs.load_state_dict(state)  # it shares its buffers with the program


def test_capture_is_stable() -> None:
    """Two captures of one program print the same, and no symbol of FX shows."""
    first = show(load(program("bert")))
    assert first == show(load(program("bert")))
    assert "[batch, sequence, 64]" in first
    assert not [w for w in first.split() if w.strip('[],"').startswith("s") and w.strip('[],"')[1:].isdigit()]


def test_capture_leaves_the_module_alone() -> None:
    """The emitted module owns what it writes to; the source's buffers stay."""
    module, args, _ = sample("cache")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    to_graph_module(load(program("cache")))(*fresh(args))
    assert_same(dict(module.state_dict()), before)


# -- what stands where -----------------------------------------------------------------------------------------


def _op(graph: Graph, name: str) -> Op:
    return next(op for op in graph.walk() if op.name == name)


def test_a_linear_is_one_op_on_its_named_weight() -> None:
    graph = load(program("llama"))
    op = _op(graph, "aten.linear.default")
    x, weight = op.operands
    assert x is not None
    assert weight is not None
    assert weight.name == "model.layers.0.self_attn.q_proj.weight"
    assert weight.is_const
    assert op.attrs == {"args": (Hole(0), Hole(1))}
    assert op.result.type == TensorType(x.tensor.dtype, ("batch", "sequence", 64))
    assert op.loc.scope == "model.layers.0.self_attn.q_proj"
    assert op.loc.name == "linear"
    assert op.loc.source.startswith("modeling_llama.py:")
    assert graph.meta["ranges"] == (("batch", 0, 64), ("sequence", 0, 32))


def test_tied_weights_are_one_constant() -> None:
    graph = load(program("tied"))
    assert list(graph.consts) == ["embed.weight"]
    assert graph.consts["embed.weight"].meta == {"role": "parameter", "aliases": ("head.weight",)}
    assert len(graph.consts["embed.weight"].users) == 2
    assert set(to_graph_module(graph).state_dict()) == {"embed.weight", "head.weight"}


def test_what_is_written_is_no_constant() -> None:
    graph = load(program("batchnorm_train"))
    written = [v.name for v in graph.inputs if v.payload is not None]
    assert written == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(graph.consts) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert _op(graph, "aten.batch_norm.default").meta == {"effect": "write"}
    cache = load(program("cache"))
    assert [v.name for v in cache.inputs] == ["x", "position", "k", "count"]
    assert cache.lookup("count").meta["persistent"] is False  # type: ignore[union-attr]


class _Writer(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("state", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.get_buffer("state"), x)


def _autocast(b: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b.add_(1)
        return b + x @ x


def _then(write: Tensor, result: Tensor) -> Tensor:
    return result + 0


@pytest.mark.parametrize(
    "write",
    [
        lambda b, x: _then(b.split(2)[0].add_(1), b),
        lambda b, x: _then(b.chunk(2)[1].mul_(2).add_(x[:2]), b),
        lambda b, x: _then(b.unbind(0)[2].copy_(x[0]), b),
        lambda b, x: _then(b.t()[1:].add_(1), b),
        lambda b, x: _then(b.float().contiguous().reshape(-1).add_(1), b),
        lambda b, x: _then(torch.add(x, 1, out=b), b),
        lambda b, x: _then(torch.nn.functional.dropout(b, training=False).add_(x), b),
        lambda b, x: torch.nn.functional.instance_norm(x[None], b[0], b[1], use_input_stats=True),
        _autocast,
    ],
)
def test_writes_through_views_are_seen(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(4, 4)
    captured = torch.export.export(_Writer(write), (x,))
    graph = load(captured)
    assert [v.name for v in graph.inputs if v.payload is not None] == ["state"]
    ours, theirs = to_graph_module(graph), captured.module()
    for _ in range(2):
        assert_same(ours(x), theirs(x))
    assert torch.equal(ours.get_buffer("state"), theirs.get_buffer("state"))


def test_writing_to_an_activation_writes_to_no_weight() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2), nn.ReLU(inplace=True))
    graph = load(torch.export.export(net, (torch.randn(1, 1, 4, 4),)))
    assert list(graph.consts) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert len(graph.inputs) == 1


def test_eval_batchnorm_is_constant() -> None:
    graph = load(program("cnn"))
    assert "1.running_mean" in graph.consts
    assert not [op for op in graph if "effect" in op.meta]


def test_branches_are_regions() -> None:
    graph = load(program("cond"))
    op = _op(graph, "higher_order.cond")
    assert set(op.regions) == {"true_graph_0", "false_graph_0"}
    assert op.attrs["args"][1:3] == (Atom("region", "true_graph_0"), Atom("region", "false_graph_0"))
    assert op.attrs["unpack"] is True
    inner = [o for o in op.regions["false_graph_0"].walk() if o.name == "higher_order.cond"]
    assert len(inner) == 1
    names = {v.name for v in op.operands if v is not None}
    assert {"linear.weight", "linear.bias"} <= names


def test_a_tuple_of_one_stays_a_tuple() -> None:
    op = _op(load(program("contexts")), "higher_order.wrap_with_autocast")
    assert len(op.results) == 1
    assert op.attrs["unpack"] is True
    assert op.attrs["args"][1] == Atom("torch.dtype", "bfloat16")


def test_assertions_are_marked() -> None:
    graph = load(program("data_dependent"))
    checks = [op for op in graph if op.meta.get("effect") == "check"]
    assert checks
    assert all(op.name.startswith(("aten._assert", "aten.sym_constrain")) for op in checks)


def test_sizes_are_values() -> None:
    op = _op(load(program("sizes")), "py.operator.floordiv")
    assert op.result.type == OpaqueType("SymInt (n//2)")


def test_an_argument_keeps_its_name_beside_a_parameter_of_that_name() -> None:
    graph = load(program("named"))
    assert [v.name for v in graph.inputs] == ["x"]
    assert graph.consts["x_1"].meta["target"] == "x"
    assert "x" in to_graph_module(graph).state_dict()


def test_keyword_arguments() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor, scale: Tensor) -> Tensor:
            return x * scale + rest[0]

    x = torch.randn(3)
    captured = torch.export.export(Net(), (x, x + 1), {"scale": x * 2})
    ours = to_graph_module(load(captured))
    assert_same(ours(x, x, scale=x), captured.module()(x, x, scale=x))


@pytest.mark.parametrize("name", ["cache", "batchnorm_train", "written_input"])
def test_functional_programs_write_back(name: str) -> None:
    """After decomposition what is written is a trailing output; it is carried and written back."""
    module, args, shapes = sample(name)
    captured = torch.export.export(module, args, dynamic_shapes=shapes).run_decompositions({})
    graph = load(captured)
    assert graph.meta["mutations"]
    assert show(parse(show(graph))) == show(graph)
    ours = to_graph_module(graph)
    start = {k: v.clone() for k, v in captured.state_dict.items()}
    theirs = captured.module()
    for _ in range(2):
        mine, reference = fresh(args), fresh(args)
        assert_same(ours(*mine), theirs(*reference))
        assert_same(mine, reference)
    assert_same(dict(sorted(ours.state_dict().items())), dict(sorted(theirs.state_dict().items())))
    theirs.load_state_dict(start, strict=False)


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "cache", "batchnorm_train", "tied", "half", "cond", "sizes", "named"])
def test_a_file_gives_the_same_graph(name: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(program(name), path)
    graph = load(path)
    large = [v for v in graph.consts.values() if v.meta["role"] == "parameter"]
    assert all(isinstance(v.payload, FilePayload) for v in large)
    memory = load(program(name))
    assert list(graph.consts) == list(memory.consts)
    assert [op.name for op in graph.walk()] == [op.name for op in memory.walk()]
    assert [op.loc for op in graph.walk()] == [op.loc for op in memory.walk()]
    args = second(name)
    assert_same(to_graph_module(graph)(*fresh(args)), to_graph_module(memory)(*fresh(args)))


# -- arguments are checked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((torch.zeros(2, 5),), "element type torch.float32, the program takes int64"),
        ((torch.zeros(2, dtype=torch.long),), "has 1 axes, the program takes 2"),
        ((torch.zeros(2, 40, dtype=torch.long),), "sequence goes from 0 to 32"),
        ((torch.zeros(2, 5, dtype=torch.long), 1), "captured with"),
        ((7,), "is a tensor, got int"),
    ],
)
def test_other_arguments_are_refused(args: tuple[object, ...], told: str) -> None:
    module = to_graph_module(load(program("llama")))
    with pytest.raises(InputError, match=told):
        module(*args)


def test_sizes_of_one_name_agree() -> None:
    module = to_graph_module(load(program("bert")))
    with pytest.raises(InputError, match="sequence is 5"):
        module(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(InputError, match=r"captured for float 3\.5"):
        to_graph_module(load(program("several")))(torch.zeros(2, 9), None, 2.5)


class _Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(7)


class _Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1) * 2


def test_a_size_that_the_model_fixes_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot export _Fixed: .*specialized it to be a constant \(7\)") as e:
        export_program(_Fixed(), (torch.ones(7),), ({0: Dim("n", max=100)},))
    assert "\n" not in str(e.value)


def test_a_condition_that_torch_cannot_prove_becomes_an_assertion() -> None:
    captured = export_program(_Even(), (torch.ones(8),), ({0: Dim("n", max=100)},))
    graph = load(captured)
    assert "expression Eq(Mod(n, 2), 0)" in show(graph)
    ours = to_graph_module(graph)
    assert_same(ours(torch.ones(12)), captured.module()(torch.ones(12)))
    with pytest.raises(RuntimeError, match="is invalid for input of size 9"):
        ours(torch.ones(9))


@pytest.mark.parametrize("name", ["tied", "cond", "cache", "several", "llama"])
def test_an_emitted_module_is_exported_again(name: str) -> None:
    """The road to a new .pt2: same ops, names, sizes and scopes."""
    graph = load(program(name))
    again = load(export_program(to_graph_module(graph), fresh(sample(name).args), sample(name).dynamic_shapes))
    assert [op.name for op in again.walk()] == [op.name for op in graph.walk()]
    assert list(again.consts) == list(graph.consts)
    assert [v.name for v in again.inputs] == [v.name for v in graph.inputs]
    assert again.meta == graph.meta
    scopes = {op.loc.scope for op in graph if op.name == "aten.linear.default"}
    assert {op.loc.scope for op in again if op.name == "aten.linear.default"} == scopes
