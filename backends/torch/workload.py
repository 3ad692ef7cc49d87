"""What a captured program is timed with: sizes for its symbols, and inputs of these sizes.

A ``.pt2`` file keeps no names of sizes (they are d0, d1 ...), so what a symbol stands for is read from where it stands:
in token ids, in a cache, in a picture. A name that says it is believed first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np

from qcompiler.backends.onnx.feeds import shape_of
from qcompiler.backends.onnx.workload import PIXELS, Size, Workload
from qcompiler.backends.torch.calling import Call
from qcompiler.dtypes import INT64, Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, OpaqueType, TensorType, Value
from qcompiler.verify.op_kinds import LOOKUPS, MOVES

SIZES = (Size(2, 16, 4), Size(1, 16, 16), Size(1, 4, 4), Size(4, 1, 8), Size(1, 1, 1))
"""What :func:`guesses` tries."""
_SYMBOL = re.compile(r"[A-Za-z_]\w*(?!\w*\()")
_SEQUENCE = ("seq", "len", "token")
_CACHE = ("past", "cache", "key", "value")


class TorchWorkload(Workload):
    """Inputs made up for a graph of the aten dialect; ``dims`` fixes symbols of its input shapes by name."""

    def __init__(self, graph: Graph, dims: Mapping[str, int]) -> None:
        super().__init__(graph, dims)
        self.ranges = {str(name): (low, high) for name, low, high in graph.meta.get("ranges", ())}
        self.numbers = [v for v in self.inputs if _sym_text(v)]
        self.inputs = [v for v in self.inputs if isinstance(v.type, TensorType)]
        self.roles = dict(_roles(self.inputs, self.tokens))

    def refusal(self) -> str:
        try:
            Call.of(self.graph)
        except InputError as e:
            return str(e)
        element = next(
            (v for v in self.inputs if v.tensor.dtype is not None and v.tensor.dtype.kind == "complex"), None
        )
        return f"no values are made up for the input '{element.name}' of type {element.type}" if element else ""

    def feed(self, size: Size, seed: int = 0) -> dict[str, Array]:
        self._check_ranges(size)
        found = super().feed(size, seed)
        for value in self.inputs:
            if _is_mask(value) and found[value.name].dtype.kind == "f":
                found[value.name][...] = 0  # a float mask is added to the scores
        for value in self.numbers:
            given = Value(value.name, TensorType(INT64, (_sym_text(value),)), self.graph)
            found[value.name] = np.asarray(shape_of(given, self._sizer(given, size))[0])
        return found

    def _check_ranges(self, size: Size) -> None:
        seen = self._sizer(self.inputs[0], size) if self.inputs else None
        for symbol, (low, high) in self.ranges.items():
            if seen is None or symbol not in self.roles:
                continue
            got = seen(symbol, 0)
            if (low is not None and got < low) or (high is not None and got > high):
                role = self.roles[symbol]
                raise InputError(f"the program takes {low} to {high} for {symbol} ({role}), not {got}")

    @cached_property
    def tokens(self) -> Value | None:
        """The input of token ids: whole numbers, sequences in rows, that look into a table or are called ids."""
        for value in self.inputs:
            element, shape = value.tensor.dtype, value.tensor.shape
            if element is not None and element.kind == "int" and element.bits >= 32 and shape and len(shape) == 2:
                name = value.name.lower()
                if "mask" in name or "position" in name:
                    continue
                if "ids" in name or _looks_up(value):
                    return value
        return None

    def _sizer(self, value: Value, size: Size) -> Callable[[str, int], int]:
        def of(symbol: str, axis: int) -> int:
            if symbol in self.dims:
                return self.dims[symbol]
            role = self.roles.get(symbol, "batch" if axis == 0 else "rows")
            sizes = {"batch": size.batch, "past": size.past, "all tokens": size.past + size.m, "pixels": PIXELS}
            return sizes.get(role, size.m)

        return of


def _roles(inputs: Iterable[Value], tokens: Value | None) -> Iterator[tuple[str, str]]:
    """What each symbol stands for: ``batch``, ``rows``, ``past``, ``all tokens`` or ``pixels``."""
    ordered = ([tokens] if tokens is not None else []) + [v for v in inputs if v is not tokens]
    known: set[str] = set()
    for plain in (True, False):  # a symbol that stands alone says more than one in a sum
        for value in ordered:
            for axis, dim in enumerate(value.tensor.shape or ()):
                for symbol in _symbols(dim) if isinstance(dim, str) else ():
                    if symbol not in known and (dim == symbol) is plain:
                        known.add(symbol)
                        yield symbol, _role(symbol, value, axis)


def _symbols(dim: str) -> list[str]:
    return list(dict.fromkeys(_SYMBOL.findall(dim)))


def _role(symbol: str, value: Value, axis: int) -> str:
    word, name, rank = symbol.lower(), value.name.lower(), len(value.tensor.shape or ())
    if "total" in word:
        return "all tokens"
    if "past" in word or "cache" in word:
        return "past"
    if any(w in word for w in _SEQUENCE):
        return "rows"
    if "batch" in word or axis == 0:
        return "batch"
    element = value.tensor.dtype
    if _is_mask(value):
        return "all tokens"
    if rank == 4 and element is not None and element.is_float:
        return "past" if any(w in name for w in _CACHE) else "pixels"
    return "rows"


def _is_mask(value: Value) -> bool:
    return "mask" in value.name.lower()


def _sym_text(value: Value) -> str:
    """``d0 + 1`` of a symbolic number; empty for anything else."""
    if not isinstance(value.type, OpaqueType):
        return ""
    kind, _, text = value.type.text.partition(" ")
    return text if kind == "SymInt" else ""


def _looks_up(value: Value) -> bool:
    """Whether an op looks into a table with ``value``, as it stands or moved."""
    work, seen = [value], {value}
    while work:
        for op in work.pop().users:
            if op.name in LOOKUPS:
                return True
            if op.name in MOVES and op.results and op.results[0] not in seen:
                seen.add(op.results[0])
                work.append(op.results[0])
    return False


def guesses(graph: Graph, seed: int) -> Iterator[dict[str, Array]]:
    """Inputs of a few sizes that a program may take, the likeliest first; none where a type is not made up."""
    work = TorchWorkload(graph, {})
    if work.refusal():
        return
    for size in SIZES:
        try:
            yield work.feed(size, seed)
        except InputError:
            continue  # out of the program's ranges
