"""The frozen values of the IR: types, attribute values, locations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from qcompiler.dtypes import DType

Dim: TypeAlias = int | str | None
"""A size: a number, a symbol (or expression of symbols) by name, or None when unknown."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; ``dtype`` None when unknown, ``shape`` None when not even the rank is known."""

    dtype: DType | None
    shape: tuple[Dim, ...] | None = None

    @property
    def static_shape(self) -> tuple[int, ...] | None:
        """The shape when every size is a number."""
        if self.shape is None or not all(isinstance(d, int) for d in self.shape):
            return None
        return tuple(d for d in self.shape if isinstance(d, int))

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)


@dataclass(frozen=True, slots=True)
class OpaqueType:
    """A host type that is no tensor (sequence, map, optional, SymInt, tuple): its text, re-emitted as it came."""

    text: str


Type: TypeAlias = TensorType | OpaqueType
UNKNOWN = TensorType(None, None)


@dataclass(frozen=True, slots=True)
class Atom:
    """A host attribute value with no counterpart here (``torch.dtype"float32"``): kind and text, re-emitted exactly."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Hole:
    """A place in a call skeleton that operand ``index`` fills."""

    index: int


Attr: TypeAlias = Any
"""None, bool, int, float, str, bytes, DType, Scheme, TensorType, Atom, Hole, Payload, or a tuple of these."""


@dataclass(frozen=True, slots=True)
class Loc:
    """Where an op came from: the host's node name, the module path, and the user's source line, each where known."""

    name: str = ""
    scope: str = ""
    source: str = ""
