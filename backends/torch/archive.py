"""``.pt2`` files: read without running a pickle's code, and without reading the weights.

torch's own loader unpickles tensors of some kinds and evaluates the expressions in the file; both are
looked at first. What remains: a ``.pt2`` names operators and Python classes of this process, so its author
is still to be trusted.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompiler.backends.torch.payload import FROM_TORCH, tensor_of
from qcompiler.backends.torch.quiet import quietly, sentence_of
from qcompiler.backends.torch.registering import register_named
from qcompiler.dtypes import DType
from qcompiler.errors import InputError
from qcompiler.payload import FilePayload, Payload

CODE = "data/aotinductor/"
"""The folder of what AOTInductor compiled."""
_PICKLES = (".pt", ".pkl", ".pickle")
_QUOTED = re.compile(r"'[\w.+\-]*'")
_WORD = re.compile(r"[A-Za-z_]\w*(?=\s*\()")
_EXPRESSION = re.compile(r"[\w\s+\-*/%().,<>=!&|~]*\Z")


def open_program(path: Path) -> ExportedProgram:
    """The exported program in the ``.pt2`` file at ``path``, weights in memory.

    Raises InputError when there is no such file, it is not of torch.export, is damaged, or holds what could
    run code.
    """
    _check(path)
    if not holds_code(path):
        return _load(path, path)
    # torch would load the code too, which nobody asked for.
    program, stored = open_lazily(path)
    for name, payload in stored.items():
        tensor = tensor_of(payload).clone()
        is_parameter = isinstance(program.state_dict[name], torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    return program


def holds_code(path: Path) -> bool:
    """Whether the archive at ``path`` holds machine code that AOTInductor made."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(f"/{CODE}" in n for n in archive.namelist())


def open_lazily(path: Path) -> tuple[ExportedProgram, dict[str, Payload]]:
    """The program in ``path`` with weights that have shapes but no values, and where in the file each one's bytes are.

    Weights that are stored in a way that cannot be mapped (compressed, with strides, as pickles) are in
    memory. Tied weights share one payload. Raises what :func:`open_program` raises.
    """
    _check(path)
    with zipfile.ZipFile(path) as archive:
        slim = _Slim(path, archive)
        data = slim.rewritten()
    if slim.payloads or slim.code:
        try:
            return _load(path, io.BytesIO(data)), slim.payloads
        except InputError:
            if slim.code:
                raise
            # Whatever is wrong, the whole file says it better; or it is the empty records.
    return _load(path, path), {}


def _load(path: Path, source: Path | io.BytesIO) -> ExportedProgram:
    try:
        with quietly():
            program = torch.export.load(source)
    except Exception as e:
        # torch puts the cause into its log only and says that it ran into an error.
        told = "it failed to deserialize the program" if "warnings above" in str(e) else sentence_of(e)
        raise InputError(f"torch {torch.__version__} cannot read {path.name}: {told}") from e
    # Guards are kept as code and evaluated when a module is made; sizes are checked otherwise here.
    program._guards_code = []
    return program


# -- what is in the file -------------------------------------------------------------------------------------


def _check(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path.name} is not a .pt2 archive of torch.export")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(n.endswith(".json") for n in names):
                raise InputError(f"{path.name} is not a .pt2 archive of torch.export")
            register_named(archive)
            if any(f"/{CODE}" in n for n in names) and not any("/models/" in n for n in names):
                raise InputError(
                    f"{path.name} holds code of AOTInductor without the program that it was made from; give that"
                )
            pickled = [n for n in names if n.endswith(_PICKLES)]
            for config in (n for n in names if n.endswith(("_weights_config.json", "_constants_config.json"))):
                pickled += _pickled_by(config, archive, path)
            for name in pickled:
                _check_pickle(name, archive, path)
            for name in (n for n in names if n.endswith(".json")):
                _check_expressions(json.loads(archive.read(name)), path)
    # zipfile says NotImplementedError for a compression that it does not know, which no .pt2 has.
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as e:
        raise InputError(f"{path.name} is damaged: {e}") from e


def _pickled_by(config: str, archive: zipfile.ZipFile, path: Path) -> Iterator[str]:
    folder = config.rpartition("/")[0]
    for fqn, entry in json.loads(archive.read(config)).get("config", {}).items():
        name = entry.get("path_name", "")
        if name.startswith(("custom_obj_", "opaque_obj_")):
            raise InputError(f"{path.name} holds {fqn!r} as an object of code, not a tensor; it is not loaded")
        if entry.get("use_pickle"):
            yield f"{folder}/{name}"


def _check_pickle(name: str, archive: zipfile.ZipFile, path: Path) -> None:
    data = archive.read(name)
    if not data:
        return
    try:
        with quietly():
            torch.load(io.BytesIO(data), weights_only=True, map_location="meta")
    except Exception as e:
        inner = name.partition("/")[2] or name
        raise InputError(f"{path.name} holds a pickle ({inner}) that could run code; it is not loaded") from e


def _check_expressions(tree: Any, path: Path) -> None:
    """Refuse symbolic sizes that are more than arithmetic: torch evaluates their text."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "expr_str" and not _is_arithmetic(value):
                raise InputError(
                    f"{path.name} holds a size {str(value)[:40]!r} that is no arithmetic; it is not loaded"
                )
            _check_expressions(value, path)
    elif isinstance(tree, list):
        for value in tree:
            _check_expressions(value, path)


def _is_arithmetic(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    text = _QUOTED.sub("0", text)  # Symbol('s72', positive=True), Float('0.5', precision=53)
    if "__" in text or re.search(r"\.\s*[A-Za-z_]", text) or not _EXPRESSION.match(text):
        return False
    # Names that are called are classes of sympy (Mod, FloorDiv, Max) or two of its functions.
    return all(word[0].isupper() or word in ("floor", "ceiling") for word in _WORD.findall(text))


# -- weights left in the file --------------------------------------------------------------------------------


class _Slim:
    """A copy of an archive in which mapped weights are empty records on the meta device."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.payloads: dict[str, Payload] = {}
        self.empty: set[str] = set()
        self.code = False

    def rewritten(self) -> bytes:
        configs = {n: self._config(n) for n in self.archive.namelist() if n.endswith("_weights_config.json")}
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as slim:
            for info in self.archive.infolist():
                if f"/{CODE}" in info.filename:
                    self.code = True
                    continue
                if info.filename in self.empty:
                    data: bytes = b""
                elif info.filename in configs:
                    data = json.dumps(configs[info.filename]).encode()
                else:
                    data = self.archive.read(info.filename)
                slim.writestr(info.filename, data)
        return out.getvalue()

    def _config(self, name: str) -> Any:
        """The weights' table with each mappable one moved to the meta device."""
        config = json.loads(self.archive.read(name))
        folder = name.rpartition("/")[0]
        entries: Mapping[str, Any] = config.get("config", {})
        users: dict[str, list[str]] = {}
        for fqn, entry in entries.items():
            users.setdefault(entry.get("path_name", ""), []).append(fqn)
        for record, fqns in users.items():
            # A record is emptied only when every tensor on it is mapped.
            found = [self._map(f"{folder}/{record}", entries[f]) for f in fqns]
            if any(p is None for p in found):
                continue
            shared: dict[Any, Payload] = {}
            for fqn, payload in zip(fqns, found, strict=True):
                assert payload is not None
                key = (payload.offset, payload.dtype, payload.shape)
                self.payloads[fqn] = shared.setdefault(key, payload)
                meta = entries[fqn]["tensor_meta"]
                meta["device"] = {"type": "meta", "index": None}
                meta["strides"] = [{"as_int": s} for s in _contiguous(payload.shape)]
                meta["storage_offset"] = {"as_int": 0}
            self.empty.add(f"{folder}/{record}")
        return config

    def _map(self, record: str, entry: Mapping[str, Any]) -> FilePayload | None:
        meta = entry.get("tensor_meta")
        try:
            info = self.archive.getinfo(record)
            if entry.get("use_pickle") or not meta or info.compress_type != zipfile.ZIP_STORED:
                return None
            element = _element(meta["dtype"])
            shape = tuple(int(s["as_int"]) for s in meta["sizes"])
            strides = tuple(int(s["as_int"]) for s in meta["strides"])
            offset = int(meta["storage_offset"]["as_int"])
            if element is None or strides != _contiguous(shape) or meta["device"]["type"] != "cpu":
                return None
            at = self._data_offset(info) + element.nbytes(offset)
            return FilePayload(self.path, at, element, shape)
        except (KeyError, TypeError, ValueError, ImportError, InputError):
            return None  # another layout of the archive: torch reads it

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin: behind its local header, whose extra field pads to 64 bytes."""
        with open(self.path, "rb") as f:
            f.seek(info.header_offset)
            header = f.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("no local header")
        name, extra = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + int(name) + int(extra)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _element(code: Any) -> DType | None:
    """The element type that the archive's number means."""
    from torch._export.serde.serialize import deserialize_scalar_type

    return FROM_TORCH.get(deserialize_scalar_type(code))
