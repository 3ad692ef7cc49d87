"""Everything a user may name as SOURCE, as an ONNX graph: a file, an exported program, a directory, a module."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from qcompiler.backends.base import Captured, Progress
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.errors import InputError
from qcompiler.fileio import sha256_of
from qcompiler.ir import Graph, Loc

if TYPE_CHECKING:
    from qcompiler.backends.torch.given import Given


def captured_from(source: Any, args: Any, dynamic_shapes: Any, progress: Progress) -> Captured:
    """The graph of ``source``; torch models go through torch's own ONNX exporter into a temporary file.

    ``source``: path of an .onnx or .pt2 file or of a model directory, ``package.module:function``, a Graph, an
    onnx.ModelProto, a torch.nn.Module (with ``args``) or ExportedProgram. Raises InputError for anything else.
    """
    if isinstance(source, Graph):
        if source.dialect != "onnx":
            raise InputError(f"a graph of dialect '{source.dialect}' does not go to an ORT target; give the module")
        return Captured(source, "graph")
    if isinstance(source, onnx.ModelProto):
        return Captured(load_onnx(source), "onnx")
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and (path.suffix == ".onnx" or (path.is_file() and path.suffix not in (".pt2", ".qir"))):
        if not path.is_file():
            raise InputError(f"there is no file {source}")
        return Captured(load_onnx(path), "onnx", str(source), sha256_of(path), path)
    from qcompiler.backends.torch.given import model_given

    return _exported(model_given(source, args, dynamic_shapes), progress)


def tied_again(graph: Graph) -> Graph:
    """const t = transpose of const w  ->  transpose(w)   for the matrices that the torch model stores once."""
    from qcompiler.backends.torch.to_onnx import TIED

    notes = dict(graph.meta.get("model_metadata_props", ()))
    for name, weight in json.loads(notes.pop(TIED, "{}")).items():
        copy, original = graph.local(name), graph.local(weight)
        if copy is None or original is None or not (copy.is_const and original.is_const):
            continue
        made = graph.create(
            "onnx.Transpose",
            [original],
            {"perm": (1, 0)},
            [(graph.fresh(f"{name}_tied"), copy.type)],
            loc=Loc(graph.fresh(f"{name}_transpose")),
            before=next(iter(graph)),
        )
        copy.replace_uses(made.result)
        graph.remove_const(copy)
    graph.meta["model_metadata_props"] = tuple(notes.items())
    return graph


def _exported(found: Given, progress: Progress) -> Captured:
    from qcompiler.backends.torch.archive import open_program
    from qcompiler.backends.torch.to_onnx import export_onnx

    model = found.model if found.file is None else open_program(found.file)
    assert model is not None
    progress.stage("torch.export to ONNX")
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-"))
    try:
        file = export_onnx(model, found.args, found.dynamic_shapes, folder / "model.onnx", external=True)
        captured = Captured(tied_again(load_onnx(file)), found.kind, found.path, found.sha256, file)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    captured.cleanup.append(lambda: shutil.rmtree(folder, ignore_errors=True))
    return captured
