"""Data in files, each form as a source of samples that can be walked again and again."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy

from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Value
from qcompiler.text import show_type

Sample: TypeAlias = Mapping[str, Any]
"""Input name -> array, number or nested list; the name is empty where the form has none (``.npy``)."""
Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Text -> token ids."""


class Source(ABC):
    """Samples that can be walked again. ``label`` names it in messages."""

    label: str
    columns = False
    """Its samples are slices of one array per input, without the axis along which they were cut."""

    @abstractmethod
    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        """The samples in order; raises InputError where they cannot be read or do not fit ``inputs``."""

    @abstractmethod
    def digest(self) -> str:
        """Hex digest of all that :meth:`samples` gives."""


def listed(inputs: Sequence[Value]) -> str:
    """The inputs that data must give, for a message."""
    return ", ".join(f"{v.name} {show_type(v.type)}" for v in inputs if v.payload is None) or "none"


def file_digest(path: Path) -> str:
    """SHA-256 of a file; raises InputError."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}") from None


class FileSource(Source):
    """A source in one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, str(path)

    def digest(self) -> str:
        return file_digest(self.path)


# -- .npz and .npy -----------------------------------------------------------------------------------------------


class NpzSource(FileSource):
    """An array for each input, named as it; the first axis counts samples. Read a slice at a time, never whole."""

    columns = True

    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        try:
            with ExitStack() as stack:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                names = [n.removesuffix(".npy") for n in archive.namelist()]
                check_names(names, inputs, self.label)
                files = {n: stack.enter_context(archive.open(f"{n}.npy")) for n in names}
                heads = {n: _header(f, f"{self.label}: array {n}") for n, f in files.items()}
                count = same_length({n: shape for n, (shape, _) in heads.items()}, self.label)
                for _ in range(count):
                    yield {n: _next_slice(f, *heads[n], f"{self.label}: array {n}") for n, f in files.items()}
        except zipfile.BadZipFile as e:
            raise InputError(f"{self.label} is no .npz file, or a damaged one: {e}") from None
        except OSError as e:
            raise InputError(f"{self.label} cannot be read: {e.strerror or e}") from None


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and element type of an array in the .npy format, whose values follow; raises InputError."""
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, SyntaxError) as e:
        raise InputError(f"{where} is no array: {e}") from None
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which are not loaded; save numbers")
    if fortran and len(shape) > 1:
        raise InputError(f"{where} is in Fortran order and has no slices in its file; save np.ascontiguousarray of it")
    return tuple(shape), dtype


def _next_slice(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> Array:
    size = math.prod(shape[1:])
    data = bytearray()
    while len(data) < size * dtype.itemsize:
        piece = file.read(size * dtype.itemsize - len(data))
        if not piece:
            raise InputError(f"{where} ends before its {shape[0]} samples do")
        data += piece
    return np.frombuffer(data, dtype, size).reshape(shape[1:])


def same_length(shapes: Mapping[str, Sequence[int]], label: str) -> int:
    """How many samples arrays of these shapes hold; raises InputError where they do not agree."""
    if flat := [n for n, s in shapes.items() if not s]:
        raise InputError(f"{label}: array {flat[0]} is a single number; its first axis must count samples")
    lengths = {n: s[0] for n, s in shapes.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{n} has {c}" for n, c in lengths.items())
        raise InputError(f"{label}: the arrays hold different numbers of samples: {told}")
    return next(iter(lengths.values()), 0)


def check_names(names: Iterable[str], inputs: Sequence[Value], label: str) -> None:
    """Raise InputError, listing the inputs, unless ``names`` are those of ``inputs``; ones with a default may lack."""
    names = list(names)
    known = {v.name for v in inputs}
    extra = [n for n in names if n not in known]
    absent = [v.name for v in inputs if v.payload is None and v.name not in names]
    if extra or absent:
        parts = ([f"has no {', '.join(absent)}"] if absent else []) + (
            [f"has {', '.join(extra)}, which the model does not take"] if extra else []
        )
        raise InputError(f"{label} {' and '.join(parts)}; the inputs are {listed(inputs)}")


class NpySource(FileSource):
    """The array of the only input, memory-mapped; its first axis counts samples."""

    columns = True

    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, SyntaxError, EOFError) as e:
            raise InputError(f"{self.label} cannot be read as an array: {e}") from None
        same_length({"": array.shape}, self.label)
        for row in array:
            yield {"": np.array(row)}


# -- text --------------------------------------------------------------------------------------------------------


class JsonlSource(FileSource):
    """One JSON object a line: input name -> nested lists of numbers."""

    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        try:
            with open(self.path, encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield _json_object(line, f"{self.label}, line {number}")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{self.label} cannot be read: {e}") from None


def _json_object(line: str, where: str) -> Sample:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: no JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: an object of inputs is wanted, not a {type(found).__name__}")
    return found


TOKENS = 256
"""Tokens in a sample of text where the model leaves the length open."""
WINDOWS = 512
"""Samples taken from a text."""
_MADE = {"attention_mask": np.ones, "token_type_ids": np.zeros}


class TextSource(FileSource):
    """Text cut into windows of tokens, for a model that takes ``input_ids`` and what follows from them."""

    def __init__(self, path: Path, encode: Encode, windows: int | None = WINDOWS) -> None:
        super().__init__(path)
        self.encode, self.windows = encode, windows

    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        ids = self._ids(inputs)
        last = (ids.tensor.shape or (None,))[-1]
        length = last if isinstance(last, int) else TOKENS
        made = 0
        for window in _windows(self._tokens(), length):
            if made == self.windows:
                return
            made += 1
            yield {v.name: self._made(v, ids, window) for v in inputs if v.payload is None}
        if not made:
            raise InputError(f"{self.label} has fewer than the {length} tokens of one sample")

    def _ids(self, inputs: Sequence[Value]) -> Value:
        given = [v for v in inputs if v.payload is None]
        whole = [v for v in given if v.tensor.dtype is not None and v.tensor.dtype.is_integer]
        found = [v for v in whole if v.name == "input_ids"] or whole
        if len(found) != 1:
            raise InputError(f"{self.label}: text feeds a model that takes input_ids; its inputs are {listed(given)}")
        return found[0]

    def _made(self, value: Value, ids: Value, window: Array) -> Array:
        if value is ids:
            return window
        if value.name == "position_ids":
            return np.arange(len(window))
        if value.name in _MADE:
            return _MADE[value.name](len(window), np.int64)
        raise InputError(f"{self.label}: input {value.name} does not follow from text; give an .npz or a function")

    def _tokens(self) -> Iterator[int]:
        """Ids of the text, a paragraph at a time, so that no text is too long."""
        try:
            with open(self.path, encoding="utf-8") as f:
                block = ""
                for line in f:
                    block += line
                    if len(block) > 1 << 16:
                        yield from self.encode(block)
                        block = ""
                yield from self.encode(block)
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{self.label} cannot be read: {e}") from None


def _windows(tokens: Iterable[int], length: int) -> Iterator[Array]:
    window: list[int] = []
    for token in tokens:
        window.append(token)
        if len(window) == length:
            yield np.array(window, np.int64)
            window = []
