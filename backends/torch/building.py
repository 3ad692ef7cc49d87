"""What the entry points of torch kernels share: aten calls beside a q op, and constants in a kernel's layout.

Nothing is read here: a constant that is made of others is a recorded computation on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.backends.lowering import Lowering
from qcompiler.backends.torch.names import to_atom
from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.dtypes import Array, DType
from qcompiler.ir import Attr, Hole, Loc, TensorType, Type, Value
from qcompiler.payload import Payload, computed

CALLS = "torch.calls"
"""Key in the ``meta`` of a value: the calls on it that several ops share, as ``((name, args...), value name)``."""
LAYOUTS = "torch.layouts"
"""Key in the ``meta`` of canonical codes and scales: the constants that were derived from them, as ``(key, name)``, so
that tied layers read one."""


@dataclass(frozen=True)
class Builder(Lowering):
    """Writes aten calls right before ``op``; each is called ``<site>.<suffix>``."""

    def derived(
        self, suffix: str, sources: Sequence[Payload], fn: Callable[..., Array], element: DType, shape: Sequence[int]
    ) -> Value:
        """``fn`` of constants (their arrays), not computed yet."""

        def write(*payloads: Payload) -> Array:
            return fn(*(p.array() for p in payloads))

        return self.const(suffix, computed(suffix, write, list(sources), element, tuple(shape)))

    def laid_out(self, source: Value, key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        """The constant that was made of ``source`` with ``key`` before, for whichever op, else that of ``make``."""
        known = source.meta.get(LAYOUTS, ())
        found = source.graph.lookup(dict(known).get(key, ""))
        if found is not None and found.is_const:
            return found
        made = make()
        source.meta[LAYOUTS] = (*known, (key, made.name))
        return made

    # -- calls -----------------------------------------------------------------------------------------------

    def call(self, target: str, *args: Any, type: Type | Sequence[Type], suffix: str = "", **kwargs: Any) -> Any:
        """A call of the operator ``target`` (``aten.view.default``); returns its result, or a tuple where ``type`` is
        a sequence.

        ``args`` and ``kwargs`` hold values (also inside lists), numbers, strings, None, torch dtypes and symbolic sizes
        that are values of the graph.
        """
        operands: list[Value | None] = []

        def packed(arg: Any) -> Attr:
            if isinstance(arg, Value):
                operands.append(arg)
                return Hole(len(operands) - 1)
            if isinstance(arg, list | tuple):
                return tuple(packed(a) for a in arg)
            atom = to_atom(arg)
            return arg if atom is None else atom

        attrs: dict[str, Attr] = {"args": tuple(packed(a) for a in args)}
        if kwargs:
            attrs["kwargs"] = tuple((k, packed(v)) for k, v in kwargs.items())
        several = isinstance(type, Sequence)
        types = list(type) if isinstance(type, Sequence) else [type]
        hint = f"{self.op.results[0].name}_{suffix or 'q'}"
        results = [(self.op.graph.fresh(f"{hint}_{i}" if several else hint), t) for i, t in enumerate(types)]
        if several:
            attrs["unpack"] = True
        label = f"{self.label}.{suffix}" if suffix else self.label
        loc = Loc(label, self.op.loc.scope, self.op.loc.source)
        made = self.op.graph.create(target, operands, attrs, results, loc=loc, before=self.op)
        return tuple(made.results) if several else made.result

    def cast(self, value: Value, element: DType, suffix: str = "cast") -> Value:
        """``value`` in another element type; itself where it has that."""
        if value.tensor.dtype == element:
            return value
        to = TO_TORCH[element]
        kind = TensorType(element, value.tensor.shape)
        made: Value = self.call("aten.to.dtype", value, to, type=kind, suffix=suffix)
        return made

    def shared(self, value: Value, key: tuple[Any, ...], make: Callable[[], Sequence[Value]]) -> tuple[Value, ...]:
        """What ``make`` computes from ``value`` alone; made once for all ops that ask with ``key``.

        Ops are lowered in the order of the graph, so what the first made stands before all that share it.
        """
        known = value.meta.get(CALLS, ())
        for k, names in known:
            found = [value.graph.local(n) for n in names]
            if k == key and all(f is not None for f in found):
                return tuple(f for f in found if f is not None)
        made = tuple(make())
        value.meta[CALLS] = (*known, (key, tuple(v.name for v in made)))
        return made

    # -- types -----------------------------------------------------------------------------------------------

    def like(self, element: DType | None) -> TensorType:
        """The type of the q op's result with another element type."""
        return TensorType(element, self.op.results[0].tensor.shape)
