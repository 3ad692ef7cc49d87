"""DATA: what a user names, as batches of inputs for a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qcompiler.calibrate import batching
from qcompiler.calibrate.forms import (
    WINDOWS,
    Encode,
    JsonlSource,
    NpySource,
    NpzSource,
    Source,
    TextSource,
)
from qcompiler.calibrate.objects import ObjectSource, function_of
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Value

FORMS = "an .npz, .npy, .jsonl or .txt file, or package.module:function"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Data:
    """Samples that can be walked again and again, and how many batches there were the last time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._digest: str | None = None
        self.count: int | None = None
        """Batches of the last complete walk."""

    @property
    def label(self) -> str:
        return self.source.label

    def batches(self, inputs: Sequence[Value]) -> Iterator[dict[str, Array]]:
        """Inputs by name, ready to run, for a graph with ``inputs``; raises InputError for what does not fit."""
        count = 0
        walk = self.source.samples(inputs)
        for batch in batching.batches(walk, inputs, self.label, columns=self.source.columns):
            count += 1
            yield batch
        self.count = count

    def digest(self) -> str:
        """Hex digest of the data, taken once."""
        if self._digest is None:
            self._digest = self.source.digest()
        return self._digest


def open_data(given: Any, *, encode: Callable[[], Encode] | None = None, windows: int | None = WINDOWS) -> Data:
    """The data that ``given`` names in one of the :data:`FORMS`; in Python also Data itself, a mapping of arrays by
    input (first axis = samples), an iterable of input dicts, or a function that returns either.

    ``encode`` finds the tokenizer for a text, of which at most ``windows`` samples are taken. Raises InputError for
    what is no data; files are read when they are walked.
    """
    if isinstance(given, Data):
        return given
    if not isinstance(given, str | Path):
        name = getattr(given, "__name__", "") if callable(given) else ""
        return Data(ObjectSource(given, f"the data of {name}()" if name else "the data"))
    text, path = str(given), Path(given)
    if _FUNCTION.fullmatch(text) and not path.exists():
        return Data(ObjectSource(function_of(text), text))
    if not path.is_file():
        raise InputError(f"there is no file {text}; data is {FORMS}")
    match path.suffix.lower():
        case ".npz":
            return Data(NpzSource(path))
        case ".npy":
            return Data(NpySource(path))
        case ".jsonl":
            return Data(JsonlSource(path))
        case ".txt":
            if encode is None:
                raise InputError(f"{text} is text, and nothing here turns it into tokens; give an .npz of input_ids")
            return Data(TextSource(path, encode(), windows))
    raise InputError(f"{text} is no data in a known form; it is {FORMS}")
