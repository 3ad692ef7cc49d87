"""Packed weights of the process: what was computed from a parameter is computed once, whichever graph asks.

A result is known by the recorded computation that makes it: the functions with what they close over, down to the
parameters, which stand for themselves by identity and version. Nothing of a parameter's values is read to find it.
Results live as long as the parameters they came from; a parameter that is written to in place has a new version, and
what was made of the old one is forgotten.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qcompiler.backends.torch.payload import TorchPayload, tensor_of
from qcompiler.dtypes import Array, DType
from qcompiler.errors import InputError
from qcompiler.payload import ComputedPayload, Payload
from qcompiler.weights import WeightQuantization

RELEASED = "parameter {name!r} was freed by torch.compile's option release_weights=True"


class WeightPayload(TorchPayload):
    """A parameter or buffer of the model: known by identity and version, so naming it reads nothing."""

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        super().__init__(tensor, name)
        self.serial, self.version = identity(tensor)

    def ref(self) -> str:
        return f"weight:{self.serial}.{self.version}"

    def _plain(self, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        if is_released(self.tensor):
            raise InputError(
                RELEASED.format(name=self.name) + ", and this graph needs its values again; compile without the option"
            )
        return super()._plain(start, stop)


# -- identity ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Known:
    """A tensor that was asked about: its number in this process, and the keys of what was made of it."""

    ref: weakref.ref[torch.Tensor]
    serial: int
    version: int
    place: int
    released: bool = False
    keys: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class _Result:
    """What one recorded computation gave, and what its quantizers noted about the weight."""

    tensor: torch.Tensor
    stats: tuple[dict[str, Any], ...]


_lock = threading.RLock()
_serials = itertools.count()
_known: dict[int, _Known] = {}
_results: dict[str, _Result] = {}


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """The number of ``tensor`` in this process and its version, which grows with each write in place.

    A tensor whose storage was exchanged (``p.data = other``) gets a new number. Inference tensors have no version.
    """
    known = _look_up(tensor)
    return known.serial, known.version


def _look_up(tensor: torch.Tensor) -> _Known:
    with _lock:
        known = _known.get(id(tensor))
        if known is not None and known.ref() is tensor and known.released:
            return known
        version, place = version_of(tensor), tensor.data_ptr()
        if known is not None and (known.ref() is not tensor or known.place != place):
            _forget(id(tensor), known)
            known = None
        if known is None:
            known = _Known(weakref.ref(tensor, _dropper(id(tensor))), next(_serials), version, place)
            _known[id(tensor)] = known
        elif known.version != version:
            _drop_results(known)
            known.version = version
        return known


def version_of(tensor: torch.Tensor) -> int:
    """How often ``tensor`` was written to in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _dropper(key: int) -> Callable[[Any], None]:
    def drop(ref: Any) -> None:
        with _lock:
            known = _known.get(key)
            if known is not None and known.ref is ref:
                _forget(key, known)

    return drop


def _forget(key: int, known: _Known) -> None:
    _drop_results(known)
    _known.pop(key, None)


def _drop_results(known: _Known) -> None:
    for key in known.keys:
        _results.pop(key, None)
    known.keys.clear()


def is_released(tensor: torch.Tensor) -> bool:
    """True for a parameter whose values were freed after they were packed."""
    known = _known.get(id(tensor))
    return known is not None and known.released and known.ref() is tensor


def note_released(tensor: torch.Tensor) -> None:
    """From now on ``tensor`` stands for the values that it had; raises InputError for one that was never packed."""
    with _lock:
        known = _known.get(id(tensor))
        if known is None or known.ref() is not tensor:
            raise InputError("only a parameter that was packed can be freed")
        known.released = True


def forget_all() -> None:
    """Forget every packed weight whose parameter still has its values; graphs that are compiled keep theirs."""
    with _lock:
        for key, known in list(_known.items()):
            if not known.released:
                _forget(key, known)


# -- results -------------------------------------------------------------------------------------------------


def packed(payload: Payload) -> torch.Tensor:
    """The values of ``payload`` as a tensor, where its parameters are: those made before, or made now and kept."""
    sources = list(weights_behind(payload))
    if not sources:
        return tensor_of(payload)
    key = fingerprint(payload)
    with _lock:
        found = _results.get(key)
    if found is None:
        tensor = tensor_of(payload).to(sources[0].tensor.device)
        noted = tuple(dict(q.stats) for q in quantizers_behind(payload))
        with _lock:
            _results[key] = _Result(tensor, noted)
            for source in sources:
                _look_up(source.tensor).keys.add(key)
        return tensor
    for quantizer, stats in zip(quantizers_behind(payload), found.stats, strict=True):
        quantizer.stats.update(stats)
    return found.tensor


def _behind(payload: Payload) -> Iterator[Payload]:
    """``payload`` and all that it is computed from, each once."""
    seen: set[int] = set()
    stack = [payload]
    while stack:
        p = stack.pop()
        if id(p) in seen:
            continue
        seen.add(id(p))
        yield p
        if isinstance(p, ComputedPayload):
            stack.extend(p.computation.inputs)


def weights_behind(payload: Payload) -> Iterator[WeightPayload]:
    """The parameters and buffers that ``payload`` is computed from."""
    return (p for p in _behind(payload) if isinstance(p, WeightPayload))


def quantizers_behind(payload: Payload) -> list[WeightQuantization]:
    """The weight quantizations that ``payload`` is computed from, each once, in one order for one computation."""
    found = [p.computation for p in _behind(payload) if isinstance(p, ComputedPayload)]
    return list({id(c): c for c in found if isinstance(c, WeightQuantization)}.values())


# -- fingerprints --------------------------------------------------------------------------------------------


def fingerprint(payload: Payload) -> str:
    """Text that two payloads share only when the same functions compute them from the same weights."""
    return hashlib.sha256(_text(payload).encode()).hexdigest()


def _text(payload: Payload) -> str:
    kind = f"{payload.dtype}{list(payload.shape)}"
    if isinstance(payload, WeightPayload):
        return payload.ref() + kind
    if not isinstance(payload, ComputedPayload):
        return f"data:{_digest(payload.array())}{kind}"
    made = payload.computation
    if isinstance(made, WeightQuantization):
        how = f"{made.scheme.text}/{made.clip}/{made.flip}/{made.rounding}"
    else:
        how = token(made._fn)
    inputs = ", ".join(_text(p) for p in made.inputs)
    return f"{made.label}<{how}>({inputs})#{payload.index}:{kind}"


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def token(value: Any) -> str:
    """Text for a function and all that it closes over. What cannot be told apart gets a text of its own each time."""
    if value is None or isinstance(value, bool | int | float | str | bytes | complex | DType | enum.Enum):
        return repr(value)
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, types.MethodType):
        return f"{token(value.__func__)}@{token(value.__self__)}"
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | np.ufunc):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if isinstance(value, tuple | list | frozenset | set):
        items = map(token, value)
        return f"{type(value).__name__}({', '.join(items if isinstance(value, tuple | list) else sorted(items))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{token(k)}: {token(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Payload):
        return _text(value)
    if isinstance(value, np.ndarray):
        return f"array:{value.dtype}{value.shape}{_digest(value)}"
    if dataclasses.is_dataclass(value):
        fields = ", ".join(f"{f.name}={token(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__qualname__}({fields})"
    if isinstance(value, torch.dtype | np.dtype):
        return repr(value)
    return f"object:{next(_serials)}"


def _function(fn: types.FunctionType) -> str:
    code = fn.__code__
    cells = [token(c.cell_contents) for c in fn.__closure__ or ()]
    defaults = token(fn.__defaults__) + token(fn.__kwdefaults__)
    return f"{code.co_filename}:{code.co_firstlineno}:{fn.__qualname__}{defaults}[{', '.join(cells)}]"
