"""What a model is timed with: inputs for a batch and a number of rows, and which of the two it can vary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from qcompiler.backends.onnx.feeds import shape_of, unmakeable, values_of
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Value
from qcompiler.verify.op_kinds import LOOKUPS

PIXELS = 224
"""Height and width of a picture whose size the model leaves open."""
INPUT_BYTES = 1 << 30
"""Bytes of made-up inputs above which a model is not timed."""


@dataclass(frozen=True)
class Size:
    """One way to feed a model: sequences in a batch, rows of each, tokens that its caches hold already."""

    batch: int
    m: int
    past: int


class Workload:
    """Inputs made up for a graph. ``dims`` fixes symbols of its input shapes by name."""

    def __init__(self, graph: Graph, dims: Mapping[str, int]) -> None:
        self.graph, self.dims = graph, dims
        self.inputs = [v for v in graph.inputs if v.payload is None]
        known = {d for v in self.inputs for d in v.tensor.shape or () if isinstance(d, str)}
        if missing := sorted(set(dims) - {s for d in known for s in _symbols(d)}):
            have = ", ".join(sorted(known)) or "none"
            raise InputError(f"--dim {missing[0]} names no open dimension of the inputs; there are: {have}")

    def refusal(self) -> str:
        """Why no inputs can be made up; empty when they can."""
        bad = next((v for v in self.inputs if unmakeable(v)), None)
        return f"no values are made up for the input '{bad.name}' of type {bad.type}" if bad is not None else ""

    def shapes(self, size: Size) -> tuple[tuple[int, ...], ...]:
        """The input shapes for ``size``."""
        return tuple(shape_of(v, self._sizer(v, size)) for v in self.inputs)

    def feed(self, size: Size, seed: int = 0) -> dict[str, Array]:
        """Inputs for ``size``; raises InputError when they would take more than :data:`INPUT_BYTES`."""
        shapes = self.shapes(size)
        took = sum(math.prod(s) * _width(v) for v, s in zip(self.inputs, shapes, strict=True))
        if took > INPUT_BYTES:
            raise InputError(f"its inputs would take {took} bytes, more than {INPUT_BYTES}; choose a smaller size")
        feed = values_of(self.inputs, shapes, seed)
        for name, value in feed.items():
            word = name.lower()
            if value.dtype.kind == "i" and "seqlens" in word:
                value[...] = size.past + size.m - 1  # GroupQueryAttention: the last position of each sequence
            elif value.dtype.kind == "i" and "total" in word and "len" in word:
                value[...] = size.past + size.m
            elif value.dtype.kind == "i" and "position" in word:
                value += size.past
        return feed

    @cached_property
    def varies_batch(self) -> bool:
        return self.shapes(Size(1, 3, 1)) != self.shapes(Size(2, 3, 1))

    @cached_property
    def varies_rows(self) -> bool:
        return self.shapes(Size(1, 3, 1)) != self.shapes(Size(1, 4, 1))

    @cached_property
    def keeps_past(self) -> bool:
        """Whether an input holds what earlier tokens left: a key/value cache whose length is open."""
        return self.shapes(Size(1, 3, 1)) != self.shapes(Size(1, 3, 2))

    @property
    def tokens(self) -> Value | None:
        """The input of token ids: whole numbers, sequences in rows, that look into a table or are called ids."""
        for v in self.inputs:
            element, shape = v.tensor.dtype, v.tensor.shape
            if element is not None and element.kind == "int" and element.bits >= 32 and shape is not None:
                if len(shape) == 2 and ("ids" in v.name.lower() or any(u.name in LOOKUPS for u in v.users)):
                    return v
        return None

    @property
    def fixed_batch(self) -> int:
        """The batch of a model that fixes it: the first axis of its first input that is no scalar."""
        return next((d for v in self.inputs for d in (v.tensor.shape or ())[:1] if isinstance(d, int)), 1)

    def _sizer(self, value: Value, size: Size) -> Callable[[str, int], int]:
        rank = len(value.tensor.shape or ())

        def of(symbol: str, axis: int) -> int:
            word = symbol.lower()
            if symbol in self.dims:
                return self.dims[symbol]
            if "total" in word:
                return size.past + size.m
            if "past" in word or "cache" in word:
                return size.past
            if _sequence(word):  # before a batch: there is a max_seq_len_in_batch
                return size.m
            if "batch" in word or word in ("b", "n"):
                return size.batch
            if word in ("height", "width", "h", "w") or (rank == 4 and axis >= 2):
                return PIXELS
            return size.batch if axis == 0 else size.m

        return of


def _sequence(word: str) -> bool:
    return "seq" in word or "len" in word or "token" in word or word in ("m", "s", "t", "l")


def _symbols(dim: str) -> list[str]:
    return dim.replace("+", " ").replace("-", " ").replace("*", " ").replace("//", " ").split()


def _width(value: Value) -> int:
    element = value.tensor.dtype
    return 8 if element is None else max(1, element.bits // 8)


def weight_bytes_read(graph: Graph) -> int:
    """Bytes of the constants that one run reads: each once, as it is stored; tables of lookups are not counted, since
    a lookup reads a few rows of them."""
    total = 0
    for g in graph.graphs():
        for value in g.consts.values():
            if value.payload is not None and any(not _looked_up(u.user, u.slot) for u in value.uses):
                total += value.payload.nbytes
    return total


def _looked_up(user: object, slot: int) -> bool:
    name = getattr(user, "name", "")
    lookup = name in LOOKUPS or name.endswith("GatherBlockQuantized")
    return lookup and slot != 1
