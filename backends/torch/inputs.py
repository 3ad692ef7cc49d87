"""What a captured program asks of its arguments, checked before each call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.payload import element_of
from qcompiler.errors import InputError
from qcompiler.ir import Graph, OpaqueType, TensorType, Type


@dataclass(frozen=True)
class InputCheck:
    """A forward pre-hook: raises InputError where an argument is not what the program was captured for."""

    names: tuple[str, ...]
    types: tuple[Type, ...]
    ranges: Mapping[str, tuple[int | None, int | None]]
    spec: pytree.TreeSpec

    @staticmethod
    def of(graph: Graph, spec: pytree.TreeSpec) -> InputCheck:
        inputs = [v for v in graph.inputs if v.payload is None]
        ranges = {name: (low, high) for name, low, high in graph.meta.get("ranges", ())}
        return InputCheck(tuple(v.name for v in inputs), tuple(v.type for v in inputs), ranges, spec)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        wanted = list(self.spec.child(1).context or ())
        if set(wanted) == set(kwargs):
            kwargs = {k: kwargs[k] for k in wanted}
        values, found = pytree.tree_flatten((args, kwargs))
        if found != self.spec:
            raise InputError(f"the arguments have the structure {found}, but the program was captured with {self.spec}")
        sizes: dict[str, int] = {}
        for name, type, value in zip(self.names, self.types, values, strict=True):
            if isinstance(type, TensorType):
                self._tensor(name, type, value, sizes)
            elif isinstance(type, OpaqueType):
                _constant(name, type, value)

    def _tensor(self, name: str, type: TensorType, value: Any, sizes: dict[str, int]) -> None:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {name!r} is a tensor, got {value.__class__.__name__}")
        if type.dtype is not None and element_of(value.dtype) != type.dtype:
            raise InputError(f"input {name!r} has element type {value.dtype}, the program takes {type.dtype}")
        if type.shape is None or len(type.shape) != value.ndim:
            raise InputError(f"input {name!r} has {value.ndim} axes, the program takes {len(type.shape or ())}")
        for axis, (asked, got) in enumerate(zip(type.shape, value.shape, strict=True)):
            size = int(got)
            if isinstance(asked, str):
                known = sizes.setdefault(asked, size)
                if known != size:
                    raise InputError(f"input {name!r} has size {size} on axis {axis}, but {asked} is {known}")
                low, high = self.ranges.get(asked, (None, None))
                if (low is not None and size < low) or (high is not None and size > high):
                    raise InputError(
                        f"input {name!r} has size {size} on axis {axis}; {asked} goes from {low} to {high}"
                    )
            elif asked is not None and asked != size:
                raise InputError(f"input {name!r} has size {size} on axis {axis}, the program takes {asked}")


def _constant(name: str, type: OpaqueType, value: Any) -> None:
    """Arguments that are no tensors are part of the program unless they are symbolic."""
    if type.text.startswith("Sym"):
        return
    told = "None" if value is None else f"{value.__class__.__name__} {value!r}"
    if isinstance(value, (bool, int, float, str, None.__class__)) and told != type.text:
        raise InputError(f"input {name!r} is {told}, but the program was captured for {type.text}")
