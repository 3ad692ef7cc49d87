"""From a torch model to a graph, and from a graph to the ``.pt2`` file that torch loads: the ahead-of-time road."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompiler.backends.base import COMPARE_LIMIT, Captured, Progress, Written
from qcompiler.backends.torch import aot, canary
from qcompiler.backends.torch.archive import holds_code, open_program
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.emit import CUSTOM, to_graph_module
from qcompiler.backends.torch.examples import example_of
from qcompiler.backends.torch.export import export_program
from qcompiler.backends.torch.fitting import fit_to_chip, refuse_other_width
from qcompiler.backends.torch.given import Given, model_given
from qcompiler.backends.torch.inputs import InputCheck
from qcompiler.backends.torch.nodes_triton import SLOTS
from qcompiler.backends.torch.notes import FILE, Notes
from qcompiler.backends.torch.package import StandIns, save
from qcompiler.backends.torch.quiet import one_sentence, quietly
from qcompiler.backends.torch.specs import parse_spec
from qcompiler.backends.torch.subclasses import is_wrapped
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.passes.dce import Dce
from qcompiler.pipeline import Context

# -- in ------------------------------------------------------------------------------------------------------


def captured_from(source: Any, args: Any, dynamic_shapes: Any, progress: Progress) -> Captured:
    """The graph of ``source``, which says as little about weights as it can: a file's stay in the file, a module's are
    shared with it.

    ``source``: path of a .pt2 file or of a model directory, ``package.module:function``, a torch.nn.Module (with
    ``args``), an ExportedProgram, a Graph of the aten dialect. The float model to compare with is the file itself, or
    the exported program, which goes into a temporary file when it is asked for, where its weights are under
    :data:`COMPARE_LIMIT`. Raises InputError.
    """
    if isinstance(source, Graph):
        if source.dialect != "aten":
            raise InputError(f"a graph of dialect '{source.dialect}' does not go to a torch target; give the module")
        return Captured(source, "graph")
    _refuse_onnx(source)
    found = model_given(source, args, dynamic_shapes)
    if found.file is not None:
        return Captured(_live(load(found.file)), found.kind, found.path, found.sha256, found.file)
    progress.stage("torch.export")
    program = found.model if isinstance(found.model, ExportedProgram) else _exported(found)
    graph = _live(load(program))
    _refuse_training(graph)
    captured = Captured(graph, found.kind, found.path, found.sha256)
    if not any(map(is_wrapped, program.state_dict.values())) and _bytes(program) <= COMPARE_LIMIT:
        captured.write_reference = lambda: _saved(program, captured)
    return captured


def _live(graph: Graph) -> Graph:
    """``graph`` without what no output depends on: torch.export leaves it in (a pooler whose result is dropped)."""
    Dce().run(graph, Context())
    return graph


def _refuse_onnx(source: Any) -> None:
    name = type(source).__name__
    if name == "ModelProto" or (isinstance(source, str | Path) and Path(source).suffix == ".onnx"):
        told = "an onnx.ModelProto" if name == "ModelProto" else str(source)
        raise InputError(
            f"{told} is an ONNX model, and torch targets take torch models; compile it with --target ort-cpu, or give "
            "the .pt2 file, model directory or package.module:function that it was exported from"
        )


def _exported(found: Given) -> ExportedProgram:
    assert isinstance(found.model, torch.nn.Module)
    return export_program(found.model, found.args, found.dynamic_shapes)


def _refuse_training(graph: Graph) -> None:
    """InputError for a program that was captured in training mode, where it is not what inference runs."""
    flags = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}
    for op in graph.walk():
        place = flags.get(op.name)
        arguments = op.attrs.get("args", ())
        if place is not None and isinstance(arguments, tuple) and arguments[place : place + 1] == (True,):
            raise InputError(
                f"{op.name} '{op.label}' was captured in training mode; call eval() on the module, then give it again"
            )


def _bytes(program: ExportedProgram) -> int:
    tensors = [t for t in (*program.state_dict.values(), *program.constants.values()) if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _saved(program: ExportedProgram, captured: Captured) -> Path | None:
    """The program in a temporary file that lives as long as ``captured``; None where torch cannot write it."""
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-"))
    captured.cleanup.append(lambda: shutil.rmtree(folder, ignore_errors=True))
    path = folder / "float.pt2"
    try:
        with quietly():
            torch.export.save(program, path)
    except Exception:  # what cannot be written is told when the artifact is written
        return None
    return path


# -- out -----------------------------------------------------------------------------------------------------


def write(graph: Graph, path: Path, options: Mapping[str, Any], progress: Progress) -> Written:
    """Write ``graph``, in which no ``q.*`` op is left, as the ``.pt2`` file ``path``.

    Memory depends on the largest constant.

    ``torch.export.load(path).module()`` computes what the graph does; open sizes stay open. Inside travel the
    metadata of the graph, names of sizes, and the name of each op in its node's ``custom`` metadata. ``options``:
    ``aot`` adds what AOTInductor compiles of it, so that ``torch._inductor.aoti_load_package(path)`` loads the file
    too. Raises InputError for a graph that torch cannot export, and BadWeights when a constant that is computed now
    holds NaN or infinity.
    """
    _refuse_foreign(graph)
    if options.get("aot"):
        _refuse_gpu(graph)
        aot.require_compiler()
    stand_ins = StandIns()
    program = reexported(graph, stand_ins)

    def told(done: int, total: int) -> None:
        progress.advance(done, total, "bytes")

    with one_sentence(f"cannot write {path.name}"):
        save(program, path, stand_ins, {FILE: Notes.of(graph).text}, told)
    if options.get("aot"):
        progress.stage("AOTInductor")
        aot.add(path)
    return Written((path.name,), path.stat().st_size)


def reexported(graph: Graph, stand_ins: StandIns | None = None) -> ExportedProgram:
    """``graph`` as an exported program, with the check of its int4 weights; big constants are stand-ins where these are
    given. Raises InputError."""
    example = example_of(graph)
    tensors = None if stand_ins is None else stand_ins.tensor
    module = to_graph_module(graph, check_inputs=False, tensors=tensors)
    canary.plant(module, graph, CUSTOM)
    return export_program(module, example.args, example.dynamic_shapes, example.kwargs)


def _refuse_gpu(graph: Graph) -> None:
    """InputError for AOTInductor's code of a program for GPUs: here it would hold references that run on CPUs."""
    for op in graph.walk():
        if op.name.rpartition(".")[0] in SLOTS:
            raise InputError(
                f"emit.aot=true compiles for this CPU, and '{op.label}' calls {op.name}, whose kernels are for GPUs; "
                "leave it out, and use torch.compile where the GPU is"
            )


def _refuse_foreign(graph: Graph) -> None:
    """InputError for results that a ``.pt2`` file cannot hold: torch writes them and cannot read them."""
    for item in graph.meta.get("returns", ()):
        if isinstance(item, str):
            raise InputError(f"the program returns the text {item!r}, which .pt2 files cannot hold; return tensors")


# -- running -------------------------------------------------------------------------------------------------


def open_module(path: Path) -> Callable[..., Any]:
    """The program in the ``.pt2`` file at ``path``, to be called as the model was; raises InputError.

    With AOTInductor's code inside it is that code; else ``torch.export.load(path).module()``, whose arguments are
    checked before each call, and whose int4 weights are packed anew where another chip wants that.
    """
    if holds_code(path):
        refuse_other_width(load(path), path.name)
        return aot.opened(path)
    program = open_program(path)
    graph = load(program, Notes.inside(path))
    fit_to_chip(program, graph, path.name)
    with one_sentence(f"cannot make a module of {path.name}"):
        module = program.module()
    if "in_spec" in graph.meta:
        module.register_forward_pre_hook(InputCheck.of(graph, parse_spec(graph.meta["in_spec"])), with_kwargs=True)
    return module


@torch.no_grad()
def call_module(module: Callable[..., Any], inputs: Sequence[Any]) -> list[Any]:
    """What ``module`` returns for positional ``inputs`` (tensors, arrays, or structures of them), flattened: tensors
    and whatever else it returns."""
    args = pytree.tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, tuple(inputs))
    return pytree.tree_leaves(module(*args))
