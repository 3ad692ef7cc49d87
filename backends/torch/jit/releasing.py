"""Freeing parameters whose packed form is all that is needed, so that touching them is a clear error.

A freed parameter keeps its type, shape and place in the module for dynamo, whose guards look at them, and loses its
values: its storage is empty and its class is :class:`Freed`, which refuses every operation by name. While dynamo reads
a frame the class is Parameter again, since it follows no operation of a class it does not know; guards are built from
what they see after the backend has run, so they expect the class that stays.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qcompiler.backends.torch.jit.cache import RELEASED, note_released
from qcompiler.errors import InputError

_METADATA = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "is_sparse"}
) | {"is_cuda", "is_cpu", "is_meta", "is_quantized", "is_nested", "is_mkldnn", "_version", "itemsize", "nbytes"}
_CALLS = frozenset(
    {"size", "dim", "stride", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "is_inference"}
) | {"is_contiguous", "element_size", "storage_offset", "get_device", "__len__", "__hash__"}


class Freed(nn.Parameter):
    """A parameter without values: its shape and type can be asked for, any computation raises InputError."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "?")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "?")
            allowed = name in _METADATA
        else:
            allowed = name in _CALLS
        if allowed:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise InputError(_told(next((a for a in _flat((args, kwargs)) if isinstance(a, Freed)), None), name))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Freed parameter {list(self.shape)}: {_told(self, '')}"

    def __deepcopy__(self, memo: Any) -> Any:
        raise InputError(_told(self, "deepcopy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(_told(self, "save"))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [item for v in value for item in _flat(v)]
    if isinstance(value, dict):
        return [item for v in value.values() for item in _flat(v)]
    return [value]


def _told(parameter: Any, what: str) -> str:
    name = _names.get(id(parameter), "?")
    doing = f" and cannot be used by {what!r}" if what else ""
    return RELEASED.format(name=name) + f"{doing}; compile without the option to keep it, or load the model again"


# -- freeing -------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_names: dict[int, str] = {}
_freed: dict[int, weakref.ref[torch.Tensor]] = {}


def release(parameter: torch.Tensor, name: str) -> None:
    """Give back the memory of ``parameter``, which is called ``name``; other tensors on its storage keep theirs.

    Raises InputError for what is no plain parameter.
    """
    if type(parameter) is Freed:
        return
    if type(parameter) is not nn.Parameter:
        raise InputError(f"{name!r} is a {type(parameter).__name__}, and only plain parameters are freed")
    _install()
    note_released(parameter)
    key = id(parameter)
    with _lock:
        empty = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device, requires_grad=False
        )
        empty.untyped_storage().resize_(0)
        parameter.data = empty
        _names[key] = name
        _freed[key] = weakref.ref(parameter, lambda _: _gone(key))
        parameter.__class__ = Freed


def _gone(key: int) -> None:
    with _lock:
        _names.pop(key, None)
        _freed.pop(key, None)


def is_freed(tensor: Any) -> bool:
    """True for a parameter that :func:`release` freed, whatever its class is at the moment."""
    found = _freed.get(id(tensor))
    return found is not None and found() is tensor


def veil() -> None:
    """Freed parameters refuse everything."""
    _set_class(Freed)


def _unveil() -> None:
    """Freed parameters look like parameters, for dynamo to read them."""
    _set_class(nn.Parameter)


@contextmanager
def unveiled() -> Iterator[None]:
    """Freed parameters look like parameters inside; their values are gone all the same."""
    _unveil()
    try:
        yield
    finally:
        veil()


def _set_class(cls: type[nn.Parameter]) -> None:
    with _lock:
        for ref in list(_freed.values()):
            parameter = ref()
            if parameter is not None:
                parameter.__class__ = cls


# -- dynamo's callbacks --------------------------------------------------------------------------------------


def _before(*args: Any) -> None:
    _unveil()


def _after(*args: Any) -> None:
    veil()


class _Lasting(list[Any]):
    """A list of callbacks that keeps one when torch.compiler.reset() empties it."""

    def __init__(self, items: Any, kept: Any) -> None:
        super().__init__([*items, kept])
        self.kept = kept

    def clear(self) -> None:
        self[:] = [self.kept]


def _install() -> None:
    """Let dynamo tell when it starts and ends reading a frame; raises InputError where this torch cannot."""
    try:
        from torch._dynamo.callback import callback_handler as handler

        starts, ends = handler.start_callbacks, handler.end_callbacks
    except (ImportError, AttributeError):
        raise InputError(
            f"release_weights=True needs the compile callbacks of torch, and {torch.__version__} has none; leave it out"
        ) from None
    if not isinstance(starts, _Lasting):
        handler.start_callbacks, handler.end_callbacks = _Lasting(starts, _before), _Lasting(ends, _after)
