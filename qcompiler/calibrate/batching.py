"""Samples as inputs of a graph: names, element types and shapes checked, batches as the graph's shapes want them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qcompiler.calibrate.forms import Sample, check_names, listed
from qcompiler.calibrate.objects import as_array
from qcompiler.dtypes import Array, dtype_of
from qcompiler.errors import InputError
from qcompiler.ir import Value

BATCH = 16
"""At most so many samples go through the graph at a time, where its first axis is open."""
BATCH_BYTES = 256 << 10
"""More samples are put together only while the inputs of a batch stay below this: activations are as many times
bigger as inputs are, so small inputs alone are worth it."""
TOKEN = 256


def batches(
    samples: Iterable[Sample], inputs: Sequence[Value], label: str, *, columns: bool = False
) -> Iterator[dict[str, Array]]:
    """``samples`` as what the graph with ``inputs`` takes at a time.

    A sample may lack the batch axis; it then gets one of length 1. Where the first axis of every input has the same
    open size, some samples are put together; where it has the same fixed size, exactly that many are, and a sample
    that has more is cut. Raises InputError, with the number of the sample, for what does not fit.
    """
    given = [v for v in inputs if v.payload is None]
    fixed = _fixed(given)
    most = fixed if fixed is not None else (BATCH if _open(given) else 1)
    waiting: list[dict[str, Array]] = []
    for number, sample in enumerate(samples, 1):
        whole = _fitted(sample, inputs, f"{label}, sample {number}", columns)
        for part in _cut(whole, fixed):
            if waiting and not _together(waiting, part, most, bounded=fixed is None):
                yield _joined(waiting, given, label)
                waiting = []
            waiting.append(part)
    if waiting:
        yield _joined(waiting, given, label)


def _first(value: Value) -> int | str | None:
    shape = value.tensor.shape
    return shape[0] if shape else None


def _fixed(given: Sequence[Value]) -> int | None:
    """The size that the first axis of every input is fixed to, if they agree on one."""
    sizes = {_first(v) for v in given}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return size if isinstance(size, int) and size > 0 else None


def _open(given: Sequence[Value]) -> bool:
    """True where the first axis of every input, and no other axis, has one open size: samples can be put together."""
    sizes = {_first(v) for v in given}
    if len(sizes) != 1 or any(not v.tensor.shape for v in given):
        return False
    (size,) = sizes
    if isinstance(size, int) or (size is None and len(given) > 1):
        return False
    return size is None or not any(size in (v.tensor.shape or ())[1:] for v in given)


def _fitted(sample: Sample, inputs: Sequence[Value], where: str, columns: bool) -> dict[str, Array]:
    """The sample's arrays with the element types and ranks that the inputs want."""
    given = [v for v in inputs if v.payload is None]
    if list(sample) == [""]:
        if len(given) != 1:
            raise InputError(f"{where}: an array without a name feeds a model of one input; these are {listed(given)}")
        sample = {given[0].name: sample[""]}
    check_names(map(str, sample), inputs, where)
    out: dict[str, Array] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for value in inputs:
        if value.name in sample:
            text = f"{where}: input {value.name}"
            literal = not hasattr(sample[value.name], "dtype")
            array = _typed(as_array(sample[value.name], text), value, text, literal)
            rank = value.tensor.rank
            if (rank is None and columns) or (rank is not None and array.ndim == rank - 1):
                array = array[None]
            _check_shape(array, value, text, sizes)
            out[value.name] = array
    return out


def _typed(array: Array, value: Value, text: str, literal: bool) -> Array:
    """``array`` in the input's element type; other floats and integers are cast where nothing is lost but digits."""
    element = value.tensor.dtype
    if element is None:
        return array
    own = dtype_of(array.dtype) if array.dtype.kind != "V" else None
    if own is element:
        return array.astype(element.storage, copy=False)
    if own is not None and array.size == 0 and literal:
        return array.astype(element.storage)
    fits = own is not None and (
        (own.is_float and element.is_float)
        or (own.is_integer and element.is_integer and _in_range(array, element.storage))
        or (literal and own.is_integer and element.is_float)
    )
    if not fits:
        has = "bytes of no type" if own is None else str(own)
        raise InputError(f"{text} is {element}, the data holds {has}; convert it as the model expects")
    return array.astype(element.storage)


def _in_range(array: Array, storage: np.dtype[Any]) -> bool:
    return bool(np.array_equal(array.astype(storage).astype(array.dtype), array))


def _check_shape(array: Array, value: Value, text: str, sizes: dict[str, tuple[int, str]]) -> None:
    shape = value.tensor.shape
    if shape is None:
        return
    want = f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
    if array.ndim != len(shape):
        raise InputError(f"{text} has shape {want}, the data has {list(array.shape)}, of another rank")
    for axis, (dim, size) in enumerate(zip(shape, array.shape, strict=True)):
        if isinstance(dim, int) and dim != size and not (axis == 0 and (size == 1 or size % max(dim, 1) == 0)):
            raise InputError(f"{text} has shape {want}, the data has {list(array.shape)}: axis {axis} differs")
        if isinstance(dim, str) and sizes.setdefault(dim, (size, value.name))[0] != size:
            other, name = sizes[dim]
            raise InputError(f"{text} has {dim} = {size} on axis {axis}, and input {name} has {dim} = {other}")


def _cut(sample: dict[str, Array], fixed: int | None) -> Iterator[dict[str, Array]]:
    """The sample in parts of at most ``fixed`` rows, where all its arrays have the same, greater number."""
    rows = {a.shape[0] for a in sample.values() if a.ndim}
    if fixed is None or len(rows) != 1 or (count := rows.pop()) <= fixed:
        yield sample
        return
    for at in range(0, count, fixed):
        yield {n: a[at : at + fixed] for n, a in sample.items()}


def _rows(sample: dict[str, Array]) -> int:
    return next((a.shape[0] for a in sample.values() if a.ndim), 1)


def _weight(a: Array) -> int:
    """Bytes of an input; each integer counts as a vector of TOKEN bytes, which is what a table makes of it."""
    return a.nbytes if a.dtype.kind == "f" else a.size * TOKEN


def _together(waiting: list[dict[str, Array]], new: dict[str, Array], most: int, *, bounded: bool) -> bool:
    """True when ``new`` may join those that wait."""
    if sum(map(_rows, waiting)) + _rows(new) > most:
        return False
    if any(a.shape[1:] != waiting[0][n].shape[1:] or n not in new for n, a in new.items() if n in waiting[0]):
        return False
    size = sum(_weight(a) for sample in (*waiting, new) for a in sample.values())
    return new.keys() == waiting[0].keys() and (not bounded or size <= BATCH_BYTES)


def _joined(waiting: list[dict[str, Array]], given: Sequence[Value], label: str) -> dict[str, Array]:
    first = waiting[0]
    batch = first if len(waiting) == 1 else {n: np.concatenate([s[n] for s in waiting]) for n in first}
    for value in given:
        size = _first(value)
        if isinstance(size, int) and batch[value.name].shape[0] != size:
            raise InputError(
                f"{label}: input {value.name} takes {size} samples at a time, and {batch[value.name].shape[0]} are "
                f"left; give a multiple of {size}"
            )
    return batch
