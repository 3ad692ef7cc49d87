"""torch tensors as payloads and payloads as torch tensors; element types on both sides."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from qcompiler import dtypes
from qcompiler.dtypes import Array, DType
from qcompiler.errors import InputError
from qcompiler.payload import CHUNK, Payload

_NAMES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3",
    "float8_e4m3fnuz": "f8e4m3fnuz",
    "float8_e5m2": "f8e5m2",
    "float8_e5m2fnuz": "f8e5m2fnuz",
    "float8_e8m0fnu": "f8e8m0",
    "bool": "bool",
    "complex64": "c64",
    "complex128": "c128",
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
FROM_TORCH: dict[torch.dtype, DType] = {
    getattr(torch, name): dtypes.TABLE[ours] for name, ours in _NAMES.items() if hasattr(torch, name)
}
TO_TORCH: dict[DType, torch.dtype] = {ours: theirs for theirs, ours in FROM_TORCH.items()}
# NumPy has no such types of its own; their bits travel as integers of the same width.
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}


def element_of(dtype: torch.dtype) -> DType | None:
    """The IR's element type for ``dtype``, None where it has none."""
    return FROM_TORCH.get(dtype)


class TorchPayload(Payload):
    """A torch tensor, shared and not copied until its values are asked for. ``name`` is for messages only."""

    def __init__(self, tensor: torch.Tensor, name: str = "") -> None:
        element = element_of(tensor.dtype)
        if element is None:
            raise InputError(f"tensor {name!r} has element type {tensor.dtype}, which the IR does not know")
        plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        fake = isinstance(tensor, torch._subclasses.FakeTensor)
        if tensor.layout is not torch.strided or (type(tensor) not in plain and not fake):
            kind = type(tensor).__name__ if tensor.layout is torch.strided else str(tensor.layout)
            raise InputError(f"tensor {name!r} is a {kind}; only plain dense tensors can be captured")
        self.tensor, self.name = tensor, name
        self.dtype, self.shape = element, tuple(int(d) for d in tensor.shape)
        self._digest: str | None = None

    def _plain(self, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        if self.tensor.is_meta or isinstance(self.tensor, torch._subclasses.FakeTensor):
            raise InputError(f"tensor {self.name!r} has a shape but no values (it lives on the meta device)")
        part = self.tensor.detach()
        part = part if start is None else part[start:stop]
        return part.resolve_conj().resolve_neg().cpu().contiguous()

    def array(self) -> Array:
        return _to_numpy(self._plain(), self.dtype)

    def rows(self, start: int, stop: int) -> Array:
        return _to_numpy(self._plain(start, stop), self.dtype)

    def chunks(self, limit: int = CHUNK) -> Iterator[bytes | memoryview]:
        if not self.shape or self.size == 0:
            yield from super().chunks(limit)
            return
        # Rows, so that a tensor with other strides is never copied as a whole.
        step = max(1, limit * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            yield memoryview(dtypes.to_bytes(self.rows(start, start + step), self.dtype))

    def ref(self) -> str | None:
        """A digest of the values, computed once; ``None`` when there are no values to digest."""
        if self.tensor.is_meta or isinstance(self.tensor, torch._subclasses.FakeTensor):
            return f"meta:{self.name}"
        if self._digest is None:
            digest = hashlib.sha256()
            for piece in self.chunks():
                digest.update(piece)
            self._digest = f"data:{digest.hexdigest()[:16]}"
        return self._digest


def _to_numpy(tensor: torch.Tensor, element: DType) -> Array:
    if element.storage.isbuiltin == 1:
        return np.asarray(tensor.numpy())
    carrier, _ = _BITS[element.storage.itemsize]
    return tensor.view(carrier).numpy().view(element.storage)


def tensor_of(payload: Payload) -> torch.Tensor:
    """The values of ``payload`` as a CPU tensor, shared where that is possible; do not write into it.

    Sub-byte types come unpacked, one code a byte (int8 or uint8); codebook types as uint8.
    """
    if isinstance(payload, TorchPayload):
        return payload.tensor
    values = payload.array()
    element = payload.dtype
    if element.kind == "string":
        raise InputError("torch has no tensors of strings")
    target = TO_TORCH.get(element)
    flat = np.ascontiguousarray(values).reshape(values.shape)  # the former alone makes 0-d arrays 1-d
    if target is None or element.storage.isbuiltin != 1:
        carrier = np.dtype(f"u{element.storage.itemsize}" if target is None else _BITS[element.storage.itemsize][1])
        if element.is_integer:
            carrier = element.storage
        flat = flat.view(carrier)
    elif flat.dtype.byteorder == ">":
        flat = flat.astype(flat.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped file cannot be written; nothing here writes
        tensor = torch.from_numpy(flat)
    return tensor if target is None or tensor.dtype == target else tensor.view(target)


def same_storage(tensor: torch.Tensor) -> Any:
    """A key that two tensors share when they are one view of one storage."""
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor) or not tensor.numel():
        return id(tensor)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
