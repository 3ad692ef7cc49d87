"""Libraries that register the operators, or the tensor classes, which a ``.pt2`` file names: imported when it is read.

Only the libraries that stand here are ever imported, and only where they are installed.
"""

from __future__ import annotations

import importlib
import zipfile

from qcompiler.backends.torch.quiet import quietly

LIBRARIES = {"quantized_decomposed": "torch.ao.quantization.fx._decomposed", "torchao": "torchao"}
"""Namespace of operators -> the module that registers them; a package of tensor classes is called alike."""


def register_named(archive: zipfile.ZipFile) -> None:
    """Import the libraries that the programs and pickles in ``archive`` name, as far as they are there."""
    programs = [n for n in archive.namelist() if n.endswith(".json") and "/models/" in n]
    pickled = [n for n in archive.namelist() if "/weights/" in n and not n.endswith(".json")]
    for namespace, module in LIBRARIES.items():
        named = any(f"torch.ops.{namespace}.".encode() in archive.read(n) for n in programs)
        if named or (module == namespace and any(_names(archive, n, namespace) for n in pickled)):
            register(module)


def register(module: str) -> bool:
    """Import ``module``; False where it is not installed or does not work with this torch."""
    try:
        with quietly():
            importlib.import_module(module)
    except Exception:  # an extension that does not fit this torch fails in many ways
        return False
    return True


def _names(archive: zipfile.ZipFile, name: str, package: str) -> bool:
    """Whether a record is a pickle of a class of ``package``: a saved tensor is a small archive of its own."""
    info = archive.getinfo(name)
    if info.file_size < 4:
        return False
    with archive.open(info) as record:
        head = record.read(1 << 16)
    return head[:2] == b"PK" and package.encode() in head
