"""What Python gives as data: a mapping of arrays, an iterable of input dicts, a function that returns either."""

from __future__ import annotations

import ast
import hashlib
import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib import format as npy

from qcompiler.calibrate.forms import Sample, Source, check_names, same_length
from qcompiler.dtypes import Array
from qcompiler.errors import Error, InputError
from qcompiler.ir import Value


class ObjectSource(Source):
    """What Python gives: a mapping of arrays, an iterable of input dicts, or a function that returns either.

    A function is called again for each walk. An iterator, which can be walked once only, is written to a temporary
    file as it is.
    """

    def __init__(self, given: Any, label: str) -> None:
        self.given, self.label = given, label
        if not callable(given):
            self.given = self._walkable(given)
            self.columns = isinstance(self.given, Mapping)

    def _walkable(self, given: Any) -> Any:
        if isinstance(given, Mapping):
            return given
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise InputError(
                f"{self.label} gave a {type(given).__name__}; data is an iterable of input dicts, or a dict of arrays"
            )
        return Spool(given, self.label) if iter(given) is given else given

    def samples(self, inputs: Sequence[Value]) -> Iterator[Sample]:
        given = self._called()
        if isinstance(given, Mapping):
            check_names(given, inputs, self.label)
        yield from self._each(given)

    def _called(self) -> Any:
        if not callable(self.given):
            return self.given
        with _blamed(self.label):
            given = self.given()
        if isinstance(given, Iterator):  # one walk is all that is asked of this one
            return given
        given = self._walkable(given)
        self.columns = isinstance(given, Mapping)
        return given

    def _each(self, given: Any) -> Iterator[Sample]:
        if isinstance(given, Mapping):
            arrays = {str(n): as_array(a, f"{self.label}: input {n}") for n, a in given.items()}
            for i in range(same_length({n: a.shape for n, a in arrays.items()}, self.label)):
                yield {n: a[i] for n, a in arrays.items()}
            return
        with _blamed(self.label):
            walk = iter(given)
        number = 0
        while True:
            with _blamed(self.label):
                sample = next(walk, walk)
            if sample is walk:
                return
            number += 1
            if not isinstance(sample, Mapping):
                kind = type(sample).__name__
                raise InputError(f"{self.label}, sample {number}: an input dict is wanted, not a {kind}")
            yield sample

    def digest(self) -> str:
        """Digest of every sample, which walks through all of them."""
        sha = hashlib.sha256()
        for sample in self._each(self._called()):
            for name in sorted(sample, key=str):
                array = as_array(sample[name], f"{self.label}: input {name}")
                sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                text = array.dtype.hasobject
                sha.update(repr(array.tolist()).encode() if text else np.ascontiguousarray(array).data)
        return sha.hexdigest()


@contextmanager
def _blamed(label: str) -> Iterator[None]:
    """What the user's own code raises is an InputError that names ``label``."""
    try:
        yield
    except Error:
        raise
    except Exception as e:
        line = (str(e).splitlines() or [""])[0]
        raise InputError(f"{label} failed: {type(e).__name__}: {line}") from e


def as_array(given: Any, where: str) -> Array:
    """An array of what a sample holds: an array, a torch tensor, a number, nested lists; raises InputError."""
    try:
        if hasattr(given, "detach"):
            given = given.detach().cpu().numpy()
        array = np.asarray(given)
    except (TypeError, ValueError) as e:
        raise InputError(f"{where} is no array: {str(e).splitlines()[0]}") from None
    if (
        array.dtype.kind not in "biufcUSO"
        and array.dtype.name not in ("bfloat16",)
        and "float8" not in array.dtype.name
    ):
        raise InputError(f"{where} holds {array.dtype}, which no input takes")
    if array.dtype.kind == "O" and not all(isinstance(v, str | bytes) for v in array.reshape(-1)[:1]):
        raise InputError(f"{where} is no array of numbers, or its rows differ in length")
    return array


class Spool:
    """Samples of an iterator that can be walked once, in a temporary file; each iteration reads them again."""

    def __init__(self, given: Iterable[Any], label: str) -> None:
        self.label = label
        self.file = tempfile.NamedTemporaryFile(prefix="qcompiler-data-")  # noqa: SIM115  # lives as long as this
        self.count = 0
        source = ObjectSource.__new__(ObjectSource)
        source.label, source.given = label, given
        for sample in source._each(given):
            arrays = {str(n): as_array(a, f"{label}: input {n}") for n, a in sample.items()}
            self.file.write(f"{list(arrays)!r}\n".encode())
            for name, array in arrays.items():
                if array.dtype.hasobject:
                    raise InputError(f"{label}: input {name} holds text; give a list or a function, not an iterator")
                npy.write_array(self.file, np.ascontiguousarray(array), allow_pickle=False)
            self.count += 1
        self.file.flush()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Array]]:
        with open(self.file.name, "rb") as f:
            for _ in range(self.count):
                names = ast.literal_eval(f.readline().decode())
                yield {n: npy.read_array(f, allow_pickle=False) for n in names}


def function_of(text: str) -> Callable[[], Any]:
    """The function that ``package.module:function`` names; raises InputError."""
    module_name, _, attribute = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise InputError(f"{text!r}: there is no module {e.name}") from None
        raise InputError(f"{text!r}: its module needs {e.name}, which is not installed") from None
    except Exception as e:
        line = (str(e).splitlines() or [""])[0]
        raise InputError(f"{text!r}: its module cannot be imported: {type(e).__name__}: {line}") from e
    found = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"{text!r}: module {module_name} has no function {attribute}")
    function: Callable[[], Any] = found
    return function
