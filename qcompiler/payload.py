"""Where the bytes of a constant come from: an array, a range of a file, or a recorded computation on other payloads.

Nothing here is read until asked for. ``array()`` gives one element per item (an int4 tensor comes as int8),
``chunks()`` the packed little-endian bytes in order, a bounded piece at a time.
"""

from __future__ import annotations

import math
import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import dtypes
from qcompiler.dtypes import Array, DType
from qcompiler.errors import InputError

CHUNK = 8 << 20


class Payload(ABC):
    """A constant tensor whose bytes may not have been read yet."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Packed bytes; 0 for strings, whose size is not known before they are read."""
        return 0 if self.dtype.kind == "string" else self.dtype.nbytes(self.size)

    @abstractmethod
    def array(self) -> Array:
        """The whole tensor, unpacked, shape ``self.shape``. Do not write into it."""

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the first axis, unpacked."""
        return self.array()[start:stop]

    def chunks(self, limit: int = CHUNK) -> Iterator[bytes | memoryview]:
        """The packed bytes in order, pieces of about ``limit`` bytes."""
        data = memoryview(dtypes.to_bytes(self.array(), self.dtype))
        for at in range(0, len(data), limit):
            yield data[at : at + limit]

    def release(self) -> None:  # noqa: B027  # most payloads cache nothing
        """Forget cached bytes; they can be asked for again."""

    def ref(self) -> str | None:
        """Text that names the bytes without containing them, or None when only the values can be printed."""
        return None


@dataclass(eq=False)
class ArrayPayload(Payload):
    """Values in memory. ``values`` is unpacked, ``dtype`` says what they mean (int8 storage may be int4)."""

    values: Array
    dtype: DType
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values)
        self.shape = tuple(int(d) for d in self.values.shape)
        if self.dtype.kind != "string" and self.values.dtype != self.dtype.storage:
            raise InputError(f"{self.dtype} is stored as {self.dtype.storage}, not {self.values.dtype}")

    def array(self) -> Array:
        return self.values


def constant(values: Any, element: DType | None = None) -> ArrayPayload:
    """A payload of ``values``; the dtype is theirs unless given, in which case they are cast."""
    array = np.asarray(values)
    if element is None:
        return ArrayPayload(array, dtypes.dtype_of(array.dtype))
    return ArrayPayload(array.astype(element.storage, copy=False), element)


@dataclass(eq=False)
class BytesPayload(Payload):
    """Packed little-endian bytes in memory, shape and dtype beside them (a tensor as a file format holds it)."""

    data: Any
    dtype: DType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        have = memoryview(self.data).nbytes
        if have != self.nbytes:
            raise InputError(f"a tensor {self.dtype}{list(self.shape)} needs {self.nbytes} bytes, got {have}")

    def array(self) -> Array:
        return dtypes.from_bytes(self.data, self.dtype, self.shape)

    def chunks(self, limit: int = CHUNK) -> Iterator[bytes | memoryview]:
        data = memoryview(self.data).cast("B")
        for at in range(0, len(data), limit):
            yield data[at : at + limit]


@dataclass(eq=False)
class FilePayload(Payload):
    """A byte range of a file, mapped when read and unmapped when the last array on it is gone."""

    path: Path
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        have = self.path.stat().st_size - self.offset
        if self.offset < 0 or have < self.nbytes:
            raise InputError(
                f"{self.path.name}: tensor {self.dtype}{list(self.shape)} at offset {self.offset} needs "
                f"{self.nbytes} bytes, the file has {max(have, 0)} there"
            )

    def _map(self, start: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(b"")
        at = self.offset + start
        base = at - at % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), at - base + length, access=mmap.ACCESS_READ, offset=base)
        return memoryview(mapped)[at - base :]

    def array(self) -> Array:
        return dtypes.from_bytes(self._map(0, self.nbytes), self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> Array:
        if self.dtype.packed or not self.shape:
            return self.array()[start:stop]
        start, stop = max(0, start), min(stop, self.shape[0])
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        part = self._map(start * row, (stop - start) * row)
        return dtypes.from_bytes(part, self.dtype, (stop - start, *self.shape[1:]))

    def chunks(self, limit: int = CHUNK) -> Iterator[bytes | memoryview]:
        for at in range(0, self.nbytes, limit):
            yield self._map(at, min(limit, self.nbytes - at))

    def ref(self) -> str | None:
        return f"file:{self.path.name}:{self.offset}"


@dataclass(eq=False)
class UnreadablePayload(Payload):
    """A constant known by type and reference only: IR text that was printed without its weights."""

    reference: str
    dtype: DType
    shape: tuple[int, ...]

    def array(self) -> Array:
        raise InputError(f"constant {self.reference!r} was printed without its values; they cannot be read from text")

    def ref(self) -> str | None:
        return self.reference


@dataclass(eq=False)
class RandomPayload(Payload):
    """Standard normal values (floats) or uniform codes (integers) from a seed: weights for tests and repro files."""

    seed: int
    dtype: DType
    shape: tuple[int, ...]

    def array(self) -> Array:
        rng = np.random.default_rng(self.seed)
        if self.dtype.is_float:
            return rng.standard_normal(self.shape, dtype=np.float32).astype(self.dtype.storage)
        if self.dtype.is_integer:
            bounded = min(self.dtype.bits, 32)
            lo, hi = (-(1 << (bounded - 1)), (1 << (bounded - 1))) if self.dtype.signed else (0, 1 << bounded)
            return rng.integers(lo, hi, self.shape).astype(self.dtype.storage)
        if self.dtype.kind == "codebook":
            return rng.integers(0, 1 << self.dtype.bits, self.shape).astype(self.dtype.storage)
        raise InputError(f"no random values of type {self.dtype}")

    def ref(self) -> str | None:
        return f"rand:{self.seed}"


class Computation:
    """A recorded function of payloads with several results (codes, scales, zeros of one weight), run when one is read.

    ``fn`` takes the input payloads and returns the result arrays, unpacked. The largest result is handed out and
    forgotten, the others are kept until :meth:`release`: reading codes, then scales, then zeros computes once.
    ``stats`` is what ``fn`` noted about its inputs (sum of squared error and the like); it survives release.
    """

    def __init__(
        self,
        label: str,
        fn: Callable[..., Sequence[Array]],
        inputs: Sequence[Payload],
        results: Sequence[tuple[DType, tuple[int, ...]]],
        stats: dict[str, Any] | None = None,
    ) -> None:
        self.label, self.inputs, self.results = label, tuple(inputs), tuple(results)
        self.stats: dict[str, Any] = {} if stats is None else stats
        self._fn = fn
        self._kept: dict[int, Array] = {}
        self._lock = threading.Lock()

    def outputs(self) -> tuple[ComputedPayload, ...]:
        return tuple(ComputedPayload(self, i, t, s) for i, (t, s) in enumerate(self.results))

    def get(self, index: int) -> Array:
        with self._lock:
            if index in self._kept:
                return self._kept[index]
            arrays = self._fn(*self.inputs)
            largest = max(range(len(arrays)), key=lambda i: arrays[i].nbytes)
            self._kept = {i: a for i, a in enumerate(arrays) if i != largest}
            return arrays[index]

    def release(self) -> None:
        """Forget kept results; those of the computations that this one reads may still be wanted by others."""
        with self._lock:
            self._kept = {}


@dataclass(eq=False)
class ComputedPayload(Payload):
    """One result of a :class:`Computation`."""

    computation: Computation
    index: int
    dtype: DType
    shape: tuple[int, ...]

    def array(self) -> Array:
        out = self.computation.get(self.index)
        if tuple(out.shape) != self.shape or (out.dtype != self.dtype.storage):
            raise InputError(
                f"{self.computation.label}: result {self.index} came out as {out.dtype}{list(out.shape)}, "
                f"recorded as {self.dtype}{list(self.shape)}"
            )
        return out

    def release(self) -> None:
        """Forget kept results, those of the computations behind this one included."""
        self.computation.release()
        for payload in self.computation.inputs:
            payload.release()

    def ref(self) -> str | None:
        sources = ", ".join(p.ref() or f"{p.dtype}{list(p.shape)}" for p in self.computation.inputs)
        return f"{self.computation.label}({sources})#{self.index}"


def computed(
    label: str, fn: Callable[..., Array], inputs: Sequence[Payload], element: DType, shape: tuple[int, ...]
) -> ComputedPayload:
    """A single-result :class:`Computation`."""
    return Computation(label, lambda *p: (fn(*p),), inputs, [(element, shape)]).outputs()[0]
