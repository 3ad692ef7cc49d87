"""Data types, one frozen record each, and the law by which sub-byte codes are packed.

Packing law (ONNX ``INT4``/``UINT4``/``INT2``, ``MatMulNBits``): element 0 sits in the LOW bits of byte 0, elements
follow without gaps, the last byte is padded with zero bits. Signed codes are stored in two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler.errors import InputError

Kind = Literal["float", "int", "uint", "bool", "string", "complex", "codebook"]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type. ``bits`` is its packed width; ``storage`` the NumPy type that holds one element unpacked."""

    name: str
    bits: int
    kind: Kind
    storage: np.dtype[Any]

    def __str__(self) -> str:
        return self.name

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def signed(self) -> bool:
        return self.kind in ("int", "float")

    @property
    def packed(self) -> bool:
        """True when several elements share a byte."""
        return self.bits < 8 and self.kind != "bool"

    @property
    def qmin(self) -> int:
        """Smallest code of an integer type."""
        self._need_integer()
        return -(1 << (self.bits - 1)) if self.kind == "int" else 0

    @property
    def qmax(self) -> int:
        """Largest code of an integer type."""
        self._need_integer()
        return (1 << (self.bits - 1)) - 1 if self.kind == "int" else (1 << self.bits) - 1

    def _need_integer(self) -> None:
        if not self.is_integer:
            raise InputError(f"{self.name} is not an integer type and has no code range")

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` packed elements."""
        return (count * self.bits + 7) // 8


def _table() -> dict[str, DType]:
    rows: list[tuple[str, int, Kind, Any]] = [
        ("f64", 64, "float", np.float64),
        ("f32", 32, "float", np.float32),
        ("f16", 16, "float", np.float16),
        ("bf16", 16, "float", ml_dtypes.bfloat16),
        ("f8e4m3", 8, "float", ml_dtypes.float8_e4m3fn),
        ("f8e4m3fnuz", 8, "float", ml_dtypes.float8_e4m3fnuz),
        ("f8e5m2", 8, "float", ml_dtypes.float8_e5m2),
        ("f8e5m2fnuz", 8, "float", ml_dtypes.float8_e5m2fnuz),
        ("f8e8m0", 8, "float", ml_dtypes.float8_e8m0fnu),
        ("f4e2m1", 4, "float", ml_dtypes.float4_e2m1fn),
        ("nf4", 4, "codebook", np.uint8),
        ("bool", 8, "bool", np.bool_),
        ("string", 8, "string", np.object_),
        ("c64", 64, "complex", np.complex64),
        ("c128", 128, "complex", np.complex128),
    ]
    for bits in (8, 16, 32, 64):
        rows.append((f"int{bits}", bits, "int", f"int{bits}"))
        rows.append((f"uint{bits}", bits, "uint", f"uint{bits}"))
    for bits in (2, 4):
        rows.append((f"int{bits}", bits, "int", np.int8))
        rows.append((f"uint{bits}", bits, "uint", np.uint8))
    return {name: DType(name, bits, kind, np.dtype(storage)) for name, bits, kind, storage in rows}


TABLE: dict[str, DType] = _table()
F64, F32, F16, BF16 = TABLE["f64"], TABLE["f32"], TABLE["f16"], TABLE["bf16"]
INT8, UINT8, INT32, INT64, BOOL = TABLE["int8"], TABLE["uint8"], TABLE["int32"], TABLE["int64"], TABLE["bool"]
INT4, UINT4, INT2, UINT2 = TABLE["int4"], TABLE["uint4"], TABLE["int2"], TABLE["uint2"]
STRING = TABLE["string"]

_BY_STORAGE: dict[np.dtype[Any], DType] = {
    t.storage: t for t in TABLE.values() if not (t.packed and t.is_integer) and t.kind != "codebook"
}


def dtype(name: str) -> DType:
    """The type called ``name``; raises InputError that lists the known names."""
    found = TABLE.get(name)
    if found is None:
        raise InputError(f"unknown dtype {name!r}; known: {', '.join(TABLE)}")
    return found


def dtype_of(storage: np.dtype[Any]) -> DType:
    """The type whose elements NumPy stores as ``storage``; ``int8`` means int8, never unpacked int4."""
    if storage.kind in "OSUT":
        return STRING
    found = _BY_STORAGE.get(np.dtype(storage.newbyteorder("=")))
    if found is None:
        raise InputError(f"NumPy type {storage} has no counterpart in the IR")
    return found


def pack_bits(codes: Array, bits: int) -> NDArray[np.uint8]:
    """Pack ``codes`` (any integer array, flattened in C order) to ``bits`` in {1, 2, 4, 8} each, low bits first."""
    if bits not in (1, 2, 4, 8):
        raise InputError(f"cannot pack {bits}-bit codes: 1, 2, 4 and 8 divide a byte")
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8, copy=False)
    if bits == 8:
        return flat.copy() if flat.base is codes or flat is codes else flat
    per = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    rest = -flat.size % per
    if rest:
        flat = np.concatenate([flat, np.zeros(rest, np.uint8)])
    lanes = flat.reshape(-1, per)
    out = lanes[:, 0] & mask
    for i in range(1, per):
        out |= (lanes[:, i] & mask) << np.uint8(bits * i)
    return out


def unpack_bits(packed: Array, bits: int, count: int, *, signed: bool) -> Array:
    """Inverse of :func:`pack_bits`: ``count`` codes as int8 (``signed``) or uint8, sign-extended."""
    if bits not in (1, 2, 4, 8):
        raise InputError(f"cannot unpack {bits}-bit codes: 1, 2, 4 and 8 divide a byte")
    raw = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    per = 8 // bits
    if raw.size * per < count:
        raise InputError(f"{count} codes of {bits} bits need {(count + per - 1) // per} bytes, got {raw.size}")
    lanes = np.empty((raw.size, per), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for i in range(per):
        lanes[:, i] = (raw >> np.uint8(bits * i)) & mask
    flat = lanes.reshape(-1)[:count]
    if not signed:
        return flat
    shift = 8 - bits
    return (flat << np.uint8(shift)).view(np.int8) >> np.int8(shift)


def to_bytes(array: Array, element: DType) -> bytes:
    """``array`` (unpacked, one element each) as the packed little-endian bytes of ``element``."""
    if element.kind == "string":
        raise InputError("strings have no fixed-width bytes")
    if element.packed:
        return pack_bits(array.view(np.uint8) if array.dtype.itemsize == 1 else array, element.bits).tobytes()
    return np.ascontiguousarray(array, dtype=element.storage.newbyteorder("<")).tobytes()


def from_bytes(data: Any, element: DType, shape: tuple[int, ...]) -> Array:
    """Inverse of :func:`to_bytes`; a view of ``data`` unless packed. Raises InputError on a short buffer."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.frombuffer(data, dtype=np.uint8)
    need = element.nbytes(count)
    if raw.size < need:
        raise InputError(f"a tensor {element}{list(shape)} needs {need} bytes, got {raw.size}")
    if element.packed:
        codes = unpack_bits(raw, element.bits, count, signed=element.kind == "int")
        if element.kind == "float":
            codes = codes.view(element.storage)
        return codes.reshape(shape)
    return raw[:need].view(element.storage).reshape(shape)
