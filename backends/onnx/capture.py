"""Everything a user may name as SOURCE, as an ONNX graph: a file, an exported program, a directory, a module."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx

from qcompiler.backends.base import Captured, Progress
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Loc


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
    if not isinstance(source, str | Path):
        return _exported(source, args, dynamic_shapes, "module", "", progress)
    text = str(source)
    path = Path(text)
    if path.suffix == ".onnx" or (path.is_file() and path.suffix not in (".pt2", ".qir")):
        if not path.is_file():
            raise InputError(f"there is no file {text}")
        return Captured(load_onnx(path), "onnx", text, sha256_of(path), path)
    if path.suffix == ".pt2":
        if not path.is_file():
            raise InputError(f"there is no file {text}")
        return _exported(_program(path), None, None, "pt2", text, progress, sha256_of(path))
    if path.is_dir():
        from qcompiler.backends.torch.sources import from_pretrained_dir

        weights = path / "model.safetensors"
        digest = sha256_of(weights) if weights.is_file() else ""
        sample = from_pretrained_dir(path)
        return _exported(sample.module, sample.args, sample.dynamic_shapes, "directory", text, progress, digest)
    if ":" in text:
        from qcompiler.backends.torch.sources import resolve

        sample = resolve(text)
        return _exported(sample.module, sample.args, sample.dynamic_shapes, "function", text, progress)
    raise InputError(
        f"{text!r} is no source: there is no such file or directory, and it is not of the form package.module:function"
    )


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


def _program(path: Path) -> Any:
    import torch

    try:
        return torch.export.load(path)
    except Exception as e:
        raise InputError(f"{path} is not a readable .pt2 archive of torch.export: {str(e).splitlines()[0]}") from e


def _exported(
    model: Any, args: Any, dynamic_shapes: Any, kind: str, path: str, progress: Progress, sha256: str = ""
) -> Captured:
    from qcompiler.backends.torch.to_onnx import export_onnx

    progress.stage("torch.export to ONNX")
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-"))
    try:
        file = export_onnx(model, _tuple(args), dynamic_shapes, folder / "model.onnx", external=True)
        captured = Captured(tied_again(load_onnx(file)), kind, path, sha256, file)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    captured.cleanup.append(lambda: shutil.rmtree(folder, ignore_errors=True))
    return captured


def _tuple(args: Any) -> tuple[Any, ...]:
    if args is None:
        return ()
    return tuple(args) if isinstance(args, tuple | list) else (args,)
