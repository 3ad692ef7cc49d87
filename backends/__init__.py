"""Backends: one package a runtime, found by target name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.base import Backend

BACKENDS = {
    "ort-cpu": "qcompiler.backends.onnx.backend:OrtBackend",
    "ort-cuda": "qcompiler.backends.onnx.backend:OrtBackend",
    "torch-cpu": "qcompiler.backends.torch.backend:TorchBackend",
    "torch-cuda": "qcompiler.backends.torch.backend:TorchBackend",
}


def backend_for(path: Path) -> Backend:
    """The backend whose artifacts end as ``path`` does, which must be a file; raises InputError."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    for name in BACKENDS:
        backend = backend_of(name)
        if backend.suffix == path.suffix:
            return backend
    raise InputError(
        f"{path} cannot be run: no target here makes {path.suffix or 'such'} files; give an .onnx or .pt2 file"
    )


def backend_of(target: str) -> Backend:
    """The backend of target ``name[:arch]``; raises InputError that lists the targets there are."""
    name = target.partition(":")[0]
    if name not in BACKENDS:
        raise InputError(f"unknown target {target!r}; known: {', '.join(BACKENDS)}")
    module, _, cls = BACKENDS[name].partition(":")
    found: Backend = getattr(importlib.import_module(module), cls)()
    return found
