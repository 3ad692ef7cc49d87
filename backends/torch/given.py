"""What a user may name or hand over as a torch model, for every target: a module, a program, a file, a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from qcompiler.backends.torch.sources import from_pretrained_dir, resolve
from qcompiler.errors import InputError
from qcompiler.fileio import sha256_of


@dataclass(frozen=True)
class Given:
    """A model with what it is exported with; ``kind``, ``path`` and ``sha256`` are for the report.

    ``file``: the ``.pt2`` file that it stands in, in which case there is no ``model`` in memory.
    """

    kind: str
    model: nn.Module | ExportedProgram | None
    args: tuple[Any, ...] = ()
    dynamic_shapes: Any = None
    path: str = ""
    sha256: str = ""
    file: Path | None = None


def model_given(source: Any, args: Any, dynamic_shapes: Any) -> Given:
    """The model that ``source`` is, or names: the path of a ``.pt2`` file or a model directory, or
    ``package.module:function``. Raises InputError for anything else."""
    if isinstance(source, nn.Module | ExportedProgram):
        return Given("module", source, _tuple(args), dynamic_shapes)
    if not isinstance(source, str | Path):
        raise InputError(
            f"a {type(source).__name__} is no source; give a torch.nn.Module, an ExportedProgram, a path, or "
            "package.module:function"
        )
    text, path = str(source), Path(source)
    if path.suffix == ".pt2":
        if not path.is_file():
            raise InputError(f"there is no file {text}")
        return Given("pt2", None, path=text, sha256=sha256_of(path), file=path)
    if path.is_dir():
        weights = path / "model.safetensors"
        sample = from_pretrained_dir(path)
        digest = sha256_of(weights) if weights.is_file() else ""
        return Given("directory", sample.module, sample.args, sample.dynamic_shapes, text, digest)
    if ":" in text:
        sample = resolve(text)
        return Given("function", sample.module, sample.args, sample.dynamic_shapes, text)
    raise InputError(
        f"{text!r} is no source: there is no such file or directory, and it is not of the form package.module:function"
    )


def _tuple(args: Any) -> tuple[Any, ...]:
    if args is None:
        return ()
    return tuple(args) if isinstance(args, tuple | list) else (args,)
