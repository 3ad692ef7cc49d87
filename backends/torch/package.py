"""Write ``.pt2`` files a weight at a time: torch saves the program without weights, their bytes are copied behind it.

``torch.export.save`` wants every weight in memory. Here big constants are stand-ins without memory while the program is
exported, and of one element while it is saved; then the archive is copied, and each record is filled from its payload.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from qcompiler.backends.streaming import Releaser, copy_payload, reading_order
from qcompiler.backends.torch.payload import TO_TORCH, TorchPayload, tensor_of
from qcompiler.ir import Value
from qcompiler.payload import Payload

HOLLOW_OVER = 1 << 14
"""Smaller constants go through memory."""
_ALIGNED = 64
"""torch starts records at multiples of this, so that they can be mapped."""


@dataclass
class StandIns:
    """Tensors in the place of big constants: their shapes and types, no values, no memory."""

    of: dict[int, tuple[torch.Tensor, Value]] = field(default_factory=dict)

    def tensor(self, value: Value) -> torch.Tensor:
        """A stand-in for a constant, or its values where it is small or not stored as its bytes in order."""
        payload = value.payload
        assert payload is not None
        if not _plain(payload):
            return tensor_of(payload).detach()  # torch chooses other kernels for what wants gradients
        # Pages that nobody touches take no memory.
        made = torch.empty(payload.shape, dtype=TO_TORCH[payload.dtype])
        self.of[made.data_ptr()] = made, value
        return made

    def take(self, tensors: dict[str, Any]) -> dict[str, Value]:
        """Put tensors of one element in the place of the stand-ins in ``tensors``; name -> constant."""
        found: dict[str, Value] = {}
        small: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            at = tensor.data_ptr() if isinstance(tensor, torch.Tensor) else 0
            if at in self.of:
                one = small.setdefault(at, torch.zeros(1, dtype=tensor.dtype))
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(one, requires_grad=False) if is_parameter else one
                found[name] = self.of[at][1]
        return found

    def values(self) -> Iterator[Value]:
        """The constants that have stand-ins."""
        return (value for _, value in self.of.values())


def _plain(payload: Payload) -> bool:
    """Whether the chunks of ``payload`` are the bytes of its tensor, and are many."""
    if payload.nbytes < HOLLOW_OVER or payload.dtype not in TO_TORCH or payload.dtype.packed:
        return False
    return not isinstance(payload, TorchPayload) or payload.tensor.is_contiguous()


def save(
    program: ExportedProgram,
    path: Path,
    stand_ins: StandIns,
    extra: Mapping[str, str],
    told: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``program`` to ``path`` with the values of its constants in the place of ``stand_ins``.

    ``extra`` are files by name that travel inside. Memory depends on the largest constant. ``program`` is of no use
    afterwards.
    """
    _forget(program)
    filled = stand_ins.take(program.state_dict) | stand_ins.take(program.constants)
    with tempfile.TemporaryFile(dir=path.parent) as slim:
        torch.export.save(program, slim, extra_files=dict(extra))
        slim.seek(0)
        with zipfile.ZipFile(slim) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as out:
            _Filler(source, out, filled, told).run()


def _forget(program: ExportedProgram) -> None:
    """Drop what export noted of its own steps: addresses of graphs, other ones each time, and paths of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("from_node", None)
            node.meta.pop("stack_trace", None)


class _Filler:
    """Copies an archive; the records of constants get their bytes, the tables their shapes."""

    def __init__(
        self,
        source: zipfile.ZipFile,
        out: zipfile.ZipFile,
        filled: Mapping[str, Value],
        told: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.out, self.filled = source, out, filled
        self.releaser = Releaser([v.payload for v in filled.values() if v.payload is not None], told)
        self.records: dict[str, Value] = {}

    def run(self) -> None:
        tables = {n: self._table(n) for n in self.source.namelist() if n.endswith("s_config.json")}
        for info in self.source.infolist():
            if info.filename not in self.records:
                self._copy(info.filename, tables.get(info.filename))
        names = {id(v): n for n, v in self.records.items()}
        for value in reading_order(self.records.values()):
            assert value.payload is not None
            with self._record(names[id(value)], value.payload.nbytes) as file:
                copy_payload(value.payload, file, self.releaser)

    def _table(self, name: str) -> bytes:
        """A table of weights with the true shapes of the filled ones."""
        table = json.loads(self.source.read(name))
        folder = name.rpartition("/")[0]
        for fqn, entry in table["config"].items():
            value = self.filled.get(fqn)
            if value is None or value.payload is None:
                continue
            self.records[f"{folder}/{entry['path_name']}"] = value
            shape = value.payload.shape
            steps, step = [], 1
            for size in reversed(shape):
                steps.append(step)
                step *= max(size, 1)
            entry["tensor_meta"]["sizes"] = [{"as_int": s} for s in shape]
            entry["tensor_meta"]["strides"] = [{"as_int": s} for s in reversed(steps)]
        return json.dumps(table).encode()

    def _copy(self, name: str, data: bytes | None) -> None:
        data = self.source.read(name) if data is None else data
        with self._record(name, len(data)) as file:
            file.write(data)

    def _record(self, name: str, size: int) -> IO[bytes]:
        """A new record, whose bytes begin at a multiple of 64."""
        info = zipfile.ZipInfo(name)
        info.file_size = size
        assert self.out.fp is not None
        begin = self.out.fp.tell() + 30 + len(name.encode()) + 4
        pad = -begin % _ALIGNED
        info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        return self.out.open(info, "w", force_zip64=size >= 1 << 31)
