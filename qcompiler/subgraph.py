"""A part of a graph as a graph of its own: some of its ops, copied, with what they read as inputs or constants.

And what a graph is called as once a backend runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from qcompiler.dtypes import Array
from qcompiler.ir import Atom, Attr, Graph, Hole, Op, Value
from qcompiler.payload import Payload

Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]
"""A graph that runs: inputs by name -> outputs and tapped values by name."""
Runner: TypeAlias = Callable[[Graph, Sequence[str]], AbstractContextManager[Run]]
"""Makes a graph run, with taps at the values of the given names: ``Backend.runner``."""


def reads(op: Op) -> Iterator[Value]:
    """The values that ``op`` and its regions read from the graph it stands in or from enclosing ones."""
    yield from (v for v in op.operands if v is not None)
    for region in op.regions.values():
        inside = set(region.graphs())
        for v in _read_inside(region):
            if v.graph not in inside:
                yield v


def _read_inside(region: Graph) -> Iterator[Value]:
    for op in region.walk():
        yield from (v for v in op.operands if v is not None)
    for graph in region.graphs():
        yield from graph.outputs


def bound(value: Value) -> Value:
    """What an input of a subgraph of the aten dialect stands for outside of it; ``value`` itself for anything else.

    torch passes values to its subgraphs in the arguments behind them.
    """
    while (op := value.graph.parent) is not None and value.is_input and value.graph.dialect == "aten":
        given = list(_behind_regions(op.attrs.get("args", ())))
        at = value.graph.inputs.index(value)
        if len(given) != len(value.graph.inputs) or (outer := op.operand(given[at])) is None:
            break
        value = outer
    return value


def _behind_regions(args: Attr) -> Iterator[int]:
    """The holes of a call behind its last subgraph, in order."""
    flat = list(_flat(args))
    last = max((i for i, a in enumerate(flat) if isinstance(a, Atom) and a.kind == "region"), default=len(flat))
    yield from (a.index for a in flat[last + 1 :] if isinstance(a, Hole))


def _flat(skeleton: Attr) -> Iterator[Attr]:
    if isinstance(skeleton, tuple):
        for s in skeleton:
            yield from _flat(s)
    else:
        yield skeleton


def needed(graph: Graph, wanted: Iterable[Value]) -> list[Op]:
    """The ops of ``graph`` (not of its regions) that ``wanted`` depends on, in order."""
    found: set[Op] = set()
    work = [v.owner for v in wanted if v.owner is not None]
    while work:
        op = work.pop()
        if op not in found:
            found.add(op)
            work += [v.owner for v in reads(op) if v.owner is not None and v.graph is graph]
    return [op for op in graph if op in found]


def part(
    graph: Graph, ops: Sequence[Op], outputs: Sequence[Value], folded: Mapping[Value, Payload] | None = None
) -> tuple[Graph, list[Value]]:
    """A new graph of copies of ``ops``, which computes ``outputs``; and the values of ``graph`` that are its inputs.

    ``ops`` stand in ``graph`` in this order, and ``outputs`` are results of theirs. Constants are shared, not copied;
    a value in ``folded`` (also one of a region of theirs) becomes a constant with that payload, and the op that gives
    it is left out. Everything else that is read becomes an input, under its name, with its default where it has one.
    """
    copier = _Copier(Graph(graph.name, graph.dialect), folded or {})
    copier.made.meta = dict(graph.meta)
    own = {r for op in ops for r in op.results}
    inputs: dict[Value, None] = {}
    for op in ops:
        for value in reads(op):
            if value in own or value in copier.known:
                continue
            if not copier.constant(value, copier.made):
                inputs[value] = None
                given = copier.made.add_input(value.name, value.type, value.payload)
                given.meta = dict(value.meta)
                copier.known[value] = given
    for op in ops:
        if not all(r in copier.folded for r in op.results):
            copier.op(op, copier.made)
    for value in outputs:
        copier.made.add_output(copier.known[value])
    return copier.made, list(inputs)


def duplicate(graph: Graph) -> Graph:
    """A copy of ``graph``: constants are shared, names and order are the same."""
    copier = _Copier(Graph(graph.name, graph.dialect), {})
    made = copier.made
    made.meta = dict(graph.meta)
    for value in graph.inputs:
        copier.known[value] = copy = made.add_input(value.name, value.type, value.payload)
        copy.meta = dict(value.meta)
    for value in graph.consts.values():
        copier.constant(value, made)
    for op in graph:
        copier.op(op, made)
    for value in graph.outputs:
        made.add_output(copier.known[value])
    return made


class _Copier:
    """Copies ops into graphs, remembering what each value became."""

    def __init__(self, made: Graph, folded: Mapping[Value, Payload]) -> None:
        self.made, self.folded = made, folded
        self.known: dict[Value, Value] = {}

    def constant(self, value: Value, home: Graph) -> bool:
        """Make ``value`` a constant of ``home`` where it is one."""
        payload = self.folded.get(value) or (value.payload if value.is_const else None)
        if payload is None:
            return False
        copy = home.add_const(value.name, payload)
        copy.meta = dict(value.meta) if value.is_const else {}
        self.known[value] = copy
        return True

    def op(self, op: Op, home: Graph) -> None:
        operands = [None if v is None else self.known[v] for v in op.operands]
        copy = home.create(op.name, operands, op.attrs, [(r.name, r.type) for r in op.results], loc=op.loc)
        copy.meta = dict(op.meta)
        for old, new in zip(op.results, copy.results, strict=True):
            new.meta = dict(old.meta)
            self.known[old] = new
        for key, region in op.regions.items():
            self.region(region, copy, key)

    def region(self, region: Graph, owner: Op, key: str) -> None:
        made = owner.graph.add_region(owner, key, region.name)
        made.meta = dict(region.meta)
        for value in region.inputs:
            copy = made.add_input(value.name, value.type, value.payload)
            copy.meta = dict(value.meta)
            self.known[value] = copy
        for value in region.consts.values():
            self.constant(value, made)
        for op in region:
            if op.results and all(r in self.folded for r in op.results):
                for r in op.results:
                    self.constant(r, made)
            else:
                self.op(op, made)
        for value in region.outputs:
            made.add_output(self.known[value])
