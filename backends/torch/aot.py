"""AOTInductor beside the program: a ``.pt2`` file with compiled code inside, for those who load it without export."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcompiler.backends.torch.archive import CODE, open_program
from qcompiler.backends.torch.quiet import one_sentence, sentence_of
from qcompiler.errors import InputError

_CHUNK = 8 << 20


def require_compiler() -> None:
    """InputError where AOTInductor has no C++ compiler that works."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as e:
        raise InputError(
            f"emit.aot=true compiles C++, and no compiler works here ({sentence_of(e)}); install g++, or leave it out"
        ) from e


def add(path: Path) -> None:
    """Compile the program in the file at ``path`` and put the code, with its own copy of the weights, beside it.

    Custom operators stay calls of Python, as in the program. The whole model is in memory meanwhile. Raises InputError.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, one_sentence("AOTInductor cannot compile the program"):
        package = Path(folder) / "code.pt2"
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(open_program(path), package_path=str(package))
        with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as out:
            root = out.namelist()[0].partition("/")[0]
            for info in source.infolist():
                name = info.filename.partition("/")[2]
                if name.startswith(CODE):
                    _copy(source, info, out, f"{root}/{name}")


def _copy(source: zipfile.ZipFile, info: zipfile.ZipInfo, out: zipfile.ZipFile, name: str) -> None:
    made = zipfile.ZipInfo(name)
    made.file_size = info.file_size
    with source.open(info) as read, out.open(made, "w", force_zip64=info.file_size >= 1 << 31) as written:
        while piece := read.read(_CHUNK):
            written.write(piece)


def opened(path: Path) -> Callable[..., Any]:
    """The code in the archive at ``path``, to be called as the model was; raises InputError."""
    with one_sentence(f"cannot load the code in {path.name}"):
        found: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
        return found
