"""Source -> graph -> .pt2 file -> module: what was captured is what the file computes, under the same names."""

from __future__ import annotations

import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from qcompiler import driver
from qcompiler import recipe as recipes
from qcompiler.backends.base import Silent
from qcompiler.backends.torch import fitting, layouts, package, program
from qcompiler.backends.torch.archive import holds_code, open_program
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.examples import example_of
from qcompiler.backends.torch.kernel_error import error_of
from qcompiler.backends.torch.program import call_module, captured_from, open_module, write
from qcompiler.dtypes import F32
from qcompiler.errors import InputError
from qcompiler.ir import Graph, TensorType
from qcompiler.payload import FilePayload, computed
from tests.backends.torch import exports
from tests.backends.torch.exports import assert_same, fresh, sample, second
from tests.support import ROOT

NETS = (
    "mlp",
    "bert",
    "cache",
    "cond",
    "sizes",
    "written_input",
    "tied",
    "named",
    "attention",
    "data_dependent",
    "half",
)


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    return net, (torch.randn(2, 5, 64),), ({0: Dim("batch"), 1: Dim("sequence", max=64)},)


@pytest.fixture
def captured() -> Any:
    made = captured_from(*mlp(), Silent())
    yield made
    made.close()


def inputs_of(graph: Graph) -> list[tuple[str, str]]:
    return [(v.name, str(v.type)) for v in graph.inputs if v.payload is None]


# -- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_a_written_program_is_the_captured_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits for arguments of two sizes, the same inputs and calling convention, every op by its name."""
    monkeypatch.setattr(package, "HOLLOW_OVER", 1)
    path = tmp_path / "m.pt2"
    exported = exports.program(name)
    graph = load(exported)
    write(graph, path, {}, Silent())
    again = load(path)
    ours, theirs = torch.export.load(path).module(), exported.module()
    theirs.load_state_dict({k: v.clone() for k, v in sample(name).module.state_dict().items()})
    theirs.requires_grad_(False)  # torch chooses other kernels for weights that want gradients
    for args in (sample(name).args, second(name)):
        mine, reference = fresh(args), fresh(args)
        assert_same(ours(*mine), theirs(*reference))
        assert_same(mine, reference)
    assert inputs_of(again) == inputs_of(graph)
    for key in ("in_spec", "out_spec", "arg_names", "returns", "ranges", "mutations"):
        assert again.meta.get(key) == graph.meta.get(key), key
    sized = {op.loc.name for op in again if op.name.startswith(("aten.sym_size", "aten._assert", "py."))}
    assert {op.loc.name for op in again} - sized <= {op.loc.name for op in graph}
    assert [op.loc.scope for op in again if "linear" in op.name] == [
        op.loc.scope for op in graph if "linear" in op.name
    ]


def test_metadata_and_site_names_travel(captured: Any, tmp_path: Path) -> None:
    graph, path = captured.graph, tmp_path / "m.pt2"
    graph.meta["metadata"] = (("qcompiler.recipe", "x"), ("qcompiler.allowed", '{"a": "b"}'))
    for op in graph:
        op.loc = op.loc.__class__(f"site.{op.loc.name}", op.loc.scope, op.loc.source)
    write(graph, path, {}, Silent())
    again = load(path)
    assert dict(again.meta["metadata"]) == dict(graph.meta["metadata"])
    assert [op.loc.name for op in again] == ["site.linear", "site.relu", "site.linear_1"]
    assert [op.loc.source for op in again] == [op.loc.source for op in graph]
    # A second trip keeps them.
    write(again, tmp_path / "n.pt2", {}, Silent())
    assert [op.loc.name for op in load(tmp_path / "n.pt2")] == [op.loc.name for op in graph]


def test_a_file_is_the_same_each_time(captured: Any, tmp_path: Path) -> None:
    """What is in the program and nothing of the process that wrote it."""
    written = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "m.pt2"
        write(captured.graph, path, {}, Silent())
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert b"from_node" not in written[0] and str(ROOT).encode() not in written[0]


def test_notes_of_others_are_left_alone(captured: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    found = torch.export.export(*mlp()[:2])
    torch.export.save(found, path, extra_files={"qcompiler.json": "[1, 2]"})
    assert "metadata" not in load(path).meta


def test_weights_are_mapped_from_where_torch_would_align_them(captured: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    write(captured.graph, path, {}, Silent())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = [v.payload for v in load(path).consts.values()]
    assert all(isinstance(p, FilePayload) and p.offset % 64 == 0 for p in found)
    for payload, original in zip(found, captured.graph.consts.values(), strict=True):
        assert payload is not None and np.array_equal(payload.array(), original.payload.array())


def test_constants_are_computed_one_at_a_time(tmp_path: Path) -> None:
    """Each is written and forgotten before the next is computed."""
    alive: set[int] = set()
    most = 0

    def make(seed: int) -> Any:
        def fn() -> Any:
            nonlocal most
            array = np.random.default_rng(seed).standard_normal((64, 64), np.float32)
            alive.add(seed)
            weakref.finalize(array, alive.discard, seed)
            most = max(most, len(alive))
            return array

        return computed(f"weight {seed}", fn, [], F32, (64, 64))

    graph = captured_from(nn.Linear(64, 64).eval(), (torch.randn(3, 64),), None, Silent()).graph
    x = graph.inputs[0]
    for i in range(6):
        weight = graph.add_const(f"w{i}", make(i))
        (last,) = graph.outputs
        made = graph.create("aten.mm.default", [last, weight], {"args": _holes(2)}, [(f"y{i}", last.type)])
        graph.set_output(0, made.result)
    write(graph, tmp_path / "m.pt2", {}, Silent())
    assert most == 1
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.ones(3, 64)).shape == (3, 64)
    assert isinstance(x.type, TensorType)


def _holes(count: int) -> tuple[Any, ...]:
    from qcompiler.ir import Hole

    return tuple(Hole(i) for i in range(count))


def test_what_pt2_files_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"returns the text 's', which \.pt2 files cannot hold"):
        write(load(exports.program("several")), tmp_path / "m.pt2", {}, Silent())
    graph = Graph("main", "aten")
    graph.add_input("x", TensorType(F32, (2, None)))
    with pytest.raises(InputError, match=r"input 'x' is of type .* of which no torch tensor can be made"):
        example_of(graph)


def test_example_sizes_keep_to_their_ranges() -> None:
    graph = Graph("main", "aten")
    graph.add_input("x", TensorType(F32, ("a", "2*b", "a + b", 7)))
    graph.meta |= {"in_spec": "(('*',), {})", "arg_names": ("x",), "ranges": (("a", 2, 4), ("b", 8, None))}
    args, kwargs, shapes = example_of(graph)
    assert (tuple(args[0].shape), kwargs) == ((3, 16, 11, 7), {})
    assert shapes["x"][0].__name__ == "a" and list(shapes["x"]) == [0, 1, 2]


# -- reading ---------------------------------------------------------------------------------------------------


def test_sources(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module shares its weights and is saved to compare with; a file is its own reference and stays on disk."""
    net, args, shapes = mlp()
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(net, args, dynamic_shapes=shapes), path)
    file = captured_from(path, None, None, Silent())
    assert (file.kind, file.path, file.reference, len(file.sha256)) == ("pt2", str(path), path, 64)
    assert captured.kind == "module" and captured.reference is None
    reference = captured.float_file()
    assert reference == captured.float_file() and reference.is_file()
    captured.close()
    assert not reference.exists()
    monkeypatch.setattr(program, "COMPARE_LIMIT", 1)
    large = captured_from(net, args, shapes, Silent())
    assert large.float_file() is None
    weight = large.graph.consts["0.weight"].payload
    assert weight.tensor.data_ptr() == net[0].weight.data_ptr()
    function = captured_from("tests.zoo:mlp", None, None, Silent())
    assert (function.kind, function.path) == ("function", "tests.zoo:mlp")
    graph = captured_from(file.graph, None, None, Silent())
    assert graph.graph is file.graph


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("model.onnx", "model.onnx is an ONNX model, and torch targets take torch models; compile it with --target"),
        ("gone.pt2", "there is no file gone.pt2"),
        ("gone", "'gone' is no source"),
        (3, "a int is no source"),
        (Graph("main", "onnx"), "a graph of dialect 'onnx' does not go to a torch target"),
        ("tests.backends.torch.nets:batchnorm_train", "call eval"),
    ],
)
def test_sources_that_are_none(source: Any, said: str) -> None:
    if source == "tests.backends.torch.nets:batchnorm_train":
        from tests.backends.torch.nets import batchnorm_train

        module, args, shapes = batchnorm_train()
        with pytest.raises(InputError, match="was captured in training mode; call eval"):
            captured_from(module, args, shapes, Silent())
        return
    with pytest.raises(InputError, match=said):
        captured_from(source, None, None, Silent())


# -- running ---------------------------------------------------------------------------------------------------


def test_opened_modules_check_what_they_are_given(captured: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    write(captured.graph, path, {}, Silent())
    module = open_module(path)
    net, _, _ = mlp()
    for shape in ((1, 1, 64), (4, 9, 64)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (y,) = call_module(module, [x])
        assert isinstance(y, torch.Tensor) and not y.requires_grad
        torch.testing.assert_close(y, net(torch.from_numpy(x)).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="size 65 on axis 1; sequence goes from"):
        call_module(module, [torch.zeros(2, 65, 64)])
    with pytest.raises(InputError, match=r"element type torch\.float64"):
        call_module(module, [np.zeros((2, 5, 64))])


def test_int4_weights_of_another_chip_are_packed_anew(tmp_path: Path) -> None:
    net, args, shapes = mlp()
    found = []
    for chip in ("avx2", "avx512"):
        job = driver.start(f"torch-cpu:{chip}", recipes.load("w4a16"), None, None)
        graph = driver.capture(job, net, args, shapes).graph
        driver.run_recipe(job, graph)
        path = tmp_path / f"{chip}.pt2"
        write(graph, path, {}, Silent())
        if fitting.width_here() not in layouts.ROWS:
            with pytest.raises(InputError, match="QC206: the int4 weights"):
                open_module(path)
            return
        found += call_module(open_module(path), args)
    assert torch.equal(*found)
    assert nn.functional.cosine_similarity(found[0].flatten(), net(*args).detach().flatten(), dim=0) > 0.97


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16"])
def test_the_error_of_kernels_is_within_its_bound(recipe: str) -> None:
    """Element by element against float64 on the same codes; and the bound is no more than 100 times the error."""
    net, args, shapes = mlp()
    job = driver.start("torch-cpu", recipes.load(recipe), None, None)
    graph = driver.capture(job, net[:1], args, shapes).graph
    if fitting.width_here() not in layouts.ROWS:
        pytest.skip(f"torch has no int4 kernel for its {fitting.width_here()} code")
    before = [p for p in job.recipe.passes if p.name not in ("choose-layout", "dce")]
    driver.run_recipe(job, graph, before)
    feed = {graph.inputs[0].name: args[0].numpy()}
    with job.backend.runner(graph, []) as run:
        (exact,) = run(feed).values()
    driver.run_recipe(job, graph, [p for p in job.recipe.passes if p not in before])
    (kernel,) = [op for op in graph if "pack" in op.name]
    live = [v.name for v in kernel.operands if v is not None and not v.is_const]
    with job.backend.runner(graph, live) as run:
        seen = run(feed)
    operands = [seen.get(v.name, v.payload and v.payload.array()) for v in kernel.operands]
    bound = np.asarray(error_of(kernel, operands)).reshape(-1, 96)
    off = np.abs(seen[graph.outputs[0].name].astype(np.float64) - exact).reshape(-1, 96)
    assert (off <= bound).all()
    assert off.max() > bound.max() / 100


# -- AOTInductor -----------------------------------------------------------------------------------------------


def test_aot_needs_a_compiler(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"emit\.aot=true compiles C\+\+, and no compiler works here"):
        write(captured.graph, tmp_path / "m.pt2", {"aot": True}, Silent())
    assert not list(tmp_path.iterdir())


def test_aot_code_lies_beside_the_program(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler packs is copied into the file, which is an exported program as before."""
    path = tmp_path / "m.pt2"

    def compiled(exported: Any, *, package_path: str) -> str:
        exported.module()(torch.zeros(3, 4, 64))
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("code/data/aotinductor/model/x.wrapper.so", b"code")
            archive.writestr("code/archive_format", b"pt2")
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    write(captured.graph, path, {"aot": True}, Silent())
    assert holds_code(path)
    with zipfile.ZipFile(path) as archive:
        assert len(set(archive.namelist())) == len(archive.namelist())
        assert archive.read("archive/data/aotinductor/model/x.wrapper.so") == b"code"
    # torch.export.load would load the code too; reading the program does not.
    assert open_program(path).module()(torch.zeros(3, 4, 64)).shape == (3, 4, 32)
    assert [op.name for op in load(path)] == [op.name for op in captured.graph]


@pytest.mark.slow
def test_aot_code_runs(captured: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    write(captured.graph, path, {"aot": True}, Silent())
    net, _, _ = mlp()
    for x in (torch.randn(2, 5, 64), torch.randn(3, 8, 64)):
        for module in (open_module(path), torch.export.load(path).module()):
            torch.testing.assert_close(call_module(module, [x])[0], net(x).detach(), rtol=1e-5, atol=1e-5)
