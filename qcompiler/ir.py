"""The IR: a graph of operations over typed values, in one host dialect plus our own closed dialect ``q.*``.

A graph is a mutable container with use lists; types and attributes are frozen. Operations form a linked list in a
topological order, so inserting before an op and erasing one take constant time. An op's regions (ONNX subgraphs) are
graphs too: an operand that names a value of an enclosing graph is a use of it like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qcompiler.errors import StructureError
from qcompiler.payload import Payload
from qcompiler.types import UNKNOWN, Atom, Attr, Dim, Hole, Loc, OpaqueType, TensorType, Type

__all__ = [
    "UNKNOWN",
    "Atom",
    "Attr",
    "Dim",
    "Graph",
    "Hole",
    "Loc",
    "Op",
    "OpaqueType",
    "TensorType",
    "Type",
    "Use",
    "Value",
]


class Use(NamedTuple):
    """Operand ``slot`` of an op, or output ``slot`` of a graph."""

    user: Op | Graph
    slot: int


class Value:
    """An input, a constant, or a result of an op. ``payload`` on an input is its default (overridable) value."""

    __slots__ = ("graph", "index", "meta", "name", "owner", "payload", "type", "uses")

    def __init__(self, name: str, type: Type, graph: Graph, owner: Op | None = None, index: int = 0) -> None:
        self.name, self.type, self.graph, self.owner, self.index = name, type, graph, owner, index
        self.payload: Payload | None = None
        self.meta: dict[str, Attr] = {}
        self.uses: dict[Use, None] = {}

    def __repr__(self) -> str:
        return f"%{self.name}"

    @property
    def is_input(self) -> bool:
        return self.owner is None and self.graph.consts.get(self.name) is not self

    @property
    def is_const(self) -> bool:
        """A constant that nothing can override at run time."""
        return self.owner is None and self.graph.consts.get(self.name) is self

    @property
    def tensor(self) -> TensorType:
        """The tensor type; an unknown one where the value is no tensor."""
        return self.type if isinstance(self.type, TensorType) else UNKNOWN

    @property
    def users(self) -> list[Op]:
        """The ops that read this value, each once, in order of first use."""
        return list(dict.fromkeys(u.user for u in self.uses if isinstance(u.user, Op)))

    @property
    def is_output(self) -> bool:
        return any(isinstance(u.user, Graph) for u in self.uses)

    def replace_uses(self, new: Value, only: Iterable[Use] | None = None) -> None:
        """Make every use (or those of ``only``) read ``new`` instead."""
        for use in list(self.uses) if only is None else list(only):
            if isinstance(use.user, Op):
                use.user.set_operand(use.slot, new)
            else:
                use.user.set_output(use.slot, new)


class Op:
    """One operation. ``name`` is ``dialect.op``; ``operands`` may hold None where an optional input is absent."""

    __slots__ = (
        "_next",
        "_operands",
        "_prev",
        "attrs",
        "erased",
        "graph",
        "loc",
        "meta",
        "name",
        "regions",
        "results",
    )

    def __init__(self, name: str, graph: Graph, attrs: Mapping[str, Attr], loc: Loc) -> None:
        self.name, self.graph, self.loc = name, graph, loc
        self.attrs: dict[str, Attr] = dict(attrs)
        self.meta: dict[str, Attr] = {}
        self.regions: dict[str, Graph] = {}
        self.results: list[Value] = []
        self.erased = False
        self._operands: list[Value | None] = []
        self._prev: Op | None = None
        self._next: Op | None = None

    def __repr__(self) -> str:
        outs = ", ".join(map(repr, self.results))
        return f"{outs} = {self.name}({', '.join('none' if v is None else repr(v) for v in self._operands)})"

    @property
    def operands(self) -> tuple[Value | None, ...]:
        return tuple(self._operands)

    @property
    def result(self) -> Value:
        """The only result; raises StructureError when there are none or several."""
        if len(self.results) != 1:
            raise StructureError(f"{self.name} '{self.label}' has {len(self.results)} results where one was expected")
        return self.results[0]

    @property
    def label(self) -> str:
        """What to call this op in a message: its host name, or its first result's."""
        return self.loc.name or (self.results[0].name if self.results else self.name)

    def operand(self, index: int) -> Value | None:
        """Operand ``index``, or None when absent or not given."""
        return self._operands[index] if index < len(self._operands) else None

    def set_operand(self, index: int, value: Value | None) -> None:
        old = self._operands[index]
        if old is not None:
            old.uses.pop(Use(self, index), None)
        self._operands[index] = value
        if value is not None:
            value.uses[Use(self, index)] = None

    def set_operands(self, values: Sequence[Value | None]) -> None:
        for i in range(len(self._operands)):
            self.set_operand(i, None)
        self._operands = [None] * len(values)
        for i, v in enumerate(values):
            self.set_operand(i, v)

    def erase(self) -> None:
        """Take this op out of its graph; raises StructureError when a result is still used."""
        for r in self.results:
            if r.uses:
                raise StructureError(f"cannot erase {self.name} '{self.label}': {r!r} still has {len(r.uses)} uses")
        for region in self.regions.values():
            region.clear()
        self.set_operands(())
        self.graph._unlink(self)
        self.erased = True
        for r in self.results:
            self.graph._names.pop(r.name, None)


class Graph:
    """Inputs, constants, ops in topological order, outputs. ``parent`` is the op whose region this is, or None."""

    def __init__(self, name: str = "main", dialect: str = "onnx", parent: Op | None = None) -> None:
        self.name, self.dialect, self.parent = name, dialect, parent
        self.inputs: list[Value] = []
        self.consts: dict[str, Value] = {}
        self.meta: dict[str, Attr] = {}
        self._outputs: list[Value] = []
        self._names: dict[str, Value] = {}
        self._first: Op | None = None
        self._last: Op | None = None
        self._count = 0
        self._serial: dict[str, int] = {}
        self._ever: set[str] = set() if parent is None else parent.graph.root._ever

    # -- reading ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Op]:
        """The ops in order; any op may be erased, and ops inserted before the current one, while iterating."""
        op = self._first
        while op is not None:
            yield op
            op = op._next
            while op is not None and op.erased:  # an erased op keeps its forward link
                op = op._next

    def __reversed__(self) -> Iterator[Op]:
        op = self._last
        while op is not None:
            before = op._prev
            yield op
            op = before

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(self._outputs)

    @property
    def root(self) -> Graph:
        """The outermost graph."""
        g = self
        while g.parent is not None:
            g = g.parent.graph
        return g

    def walk(self) -> Iterator[Op]:
        """Every op, those of regions included, an op before what its regions hold."""
        for op in self:
            yield op
            for region in op.regions.values():
                yield from region.walk()

    def graphs(self) -> Iterator[Graph]:
        """This graph and every region in it."""
        yield self
        for op in self:
            for region in op.regions.values():
                yield from region.graphs()

    def local(self, name: str) -> Value | None:
        """The value called ``name`` that this graph itself defines."""
        return self._names.get(name)

    def lookup(self, name: str) -> Value | None:
        """The value that ``name`` means here: this graph's, else the nearest enclosing graph's."""
        g: Graph | None = self
        while g is not None:
            if (found := g._names.get(name)) is not None:
                return found
            g = g.parent.graph if g.parent is not None else None
        return None

    # -- building --------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """A name that nothing in the whole graph ever had: ``hint``, or ``hint_1``, ``hint_2`` ..."""
        if hint not in self._ever:
            return hint
        n = self._serial.get(hint, 0)
        while (name := f"{hint}_{(n := n + 1)}") in self._ever:
            pass
        self._serial[hint] = n
        return name

    def _register(self, value: Value) -> Value:
        if value.name in self._names:
            raise StructureError(f"graph '{self.name}' already has a value called %{value.name}")
        self._names[value.name] = value
        self._ever.add(value.name)
        return value

    def add_input(self, name: str, type: Type, default: Payload | None = None) -> Value:
        value = self._register(Value(name, type, self))
        value.payload = default
        self.inputs.append(value)
        return value

    def add_const(self, name: str, payload: Payload) -> Value:
        """A new constant; ``name`` must be free (ask :meth:`fresh`)."""
        value = self._register(Value(name, TensorType(payload.dtype, payload.shape), self))
        value.payload = payload
        self.consts[name] = value
        return value

    def remove_const(self, value: Value) -> None:
        if value.uses:
            raise StructureError(f"cannot remove constant {value!r}: it still has {len(value.uses)} uses")
        del self.consts[value.name]
        del self._names[value.name]

    def remove_input(self, value: Value) -> None:
        if value.uses:
            raise StructureError(f"cannot remove input {value!r}: it still has {len(value.uses)} uses")
        self.inputs.remove(value)
        del self._names[value.name]

    def rename(self, value: Value, name: str) -> None:
        """Give ``value``, defined here, another free name."""
        if name == value.name:
            return
        was_const = value.is_const
        if name in self._names:
            raise StructureError(f"graph '{self.name}' already has a value called %{name}")
        del self._names[value.name]
        if was_const:
            del self.consts[value.name]
            self.consts[name] = value
        value.name = name
        self._names[name] = value
        self._ever.add(name)

    def create(
        self,
        name: str,
        operands: Sequence[Value | None] = (),
        attrs: Mapping[str, Attr] | None = None,
        results: Sequence[tuple[str, Type]] = (),
        *,
        loc: Loc | None = None,
        before: Op | None = None,
    ) -> Op:
        """Append an op, or insert it ``before`` another; result names must be free."""
        op = Op(name, self, attrs or {}, loc or Loc())
        op.set_operands(list(operands))
        for i, (result, type) in enumerate(results):
            op.results.append(self._register(Value(result, type, self, op, i)))
        self._link(op, before)
        return op

    def add_region(self, op: Op, key: str, name: str = "") -> Graph:
        """A new empty region ``key`` of ``op``."""
        region = Graph(name or key, self.dialect, op)
        op.regions[key] = region
        return region

    def add_output(self, value: Value) -> None:
        self._outputs.append(value)
        value.uses[Use(self, len(self._outputs) - 1)] = None

    def set_output(self, index: int, value: Value) -> None:
        self._outputs[index].uses.pop(Use(self, index), None)
        self._outputs[index] = value
        value.uses[Use(self, index)] = None

    def clear(self) -> None:
        """Erase everything, last op first."""
        for i, v in enumerate(self._outputs):
            v.uses.pop(Use(self, i), None)
        self._outputs = []
        for op in reversed(self):
            op.erase()

    def _link(self, op: Op, before: Op | None) -> None:
        if before is not None and before.graph is not self:
            raise StructureError(f"cannot insert {op.name} before an op of another graph")
        after = self._last if before is None else before._prev
        op._prev, op._next = after, before
        if after is None:
            self._first = op
        else:
            after._next = op
        if before is None:
            self._last = op
        else:
            before._prev = op
        self._count += 1

    def _unlink(self, op: Op) -> None:
        if op._prev is None:
            self._first = op._next
        else:
            op._prev._next = op._next
        if op._next is None:
            self._last = op._prev
        else:
            op._next._prev = op._prev
        self._count -= 1

    def after(self, value: Value) -> Op | None:
        """The op before which the first reader of ``value`` may stand in this graph; None for the end of it."""
        maker = value.owner
        return self._first if maker is None or maker.graph is not self else maker._next

    def move_before(self, op: Op, before: Op) -> None:
        """Move ``op`` in the order; the caller keeps it topological."""
        self._unlink(op)
        self._link(op, before)
