"""Rules and the greedy driver that applies them, with a log of why a rule did not fire.

A rule is a function of its root op and a :class:`Rewriter`: guard clauses first, each refusal with a reason, and the
replacement of the root's results as return value. Its docstring is its equation, ``before  ->  after``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qcompiler.errors import StructureError
from qcompiler.ir import Attr, Graph, Loc, Op, Type, Value
from qcompiler.payload import Payload
from qcompiler.spec import is_pure
from qcompiler.target import PHASES, Phase, Reason, Target

T = TypeVar("T")


class Declined(Exception):
    """A guard of a rule or view was not met. ``quiet`` when the op is simply not of the rule's kind."""

    def __init__(self, reason: Reason | str, *, quiet: bool = False) -> None:
        self.reason = Reason("", reason) if isinstance(reason, str) else reason
        self.quiet = quiet
        super().__init__(self.reason.message)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Rule ``rule`` looked at ``op`` and declined for ``reason``; ``site`` is empty where the op belongs to none."""

    rule: str
    op: str
    site: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite rule with the op names it is rooted at."""

    roots: tuple[str, ...]
    apply: Callable[[Op, Rewriter], Value | Sequence[Value]]

    @property
    def name(self) -> str:
        return self.apply.__name__


def rule(*roots: str) -> Callable[[Callable[[Op, Rewriter], Value | Sequence[Value]]], Rule]:
    """Make a function a rule rooted at ops called ``roots``."""
    return lambda fn: Rule(roots, fn)


class Rewriter:
    """What a rule builds with: everything it makes goes right before the root op, or is undone when it declines."""

    def __init__(self, root: Op, target: Target | None, phases: Sequence[Phase]) -> None:
        self.root, self.target, self.phases = root, target, tuple(phases)
        self.graph: Graph = root.graph
        self.made: list[Op] = []
        self.made_consts: list[Value] = []
        self.touched: list[Op] = []

    def view(self, view: Callable[[Op], T]) -> T:
        """``view(root)``; declines, quietly, where the root is not of that kind."""
        return view(self.root)

    def expect(self, value: Value | None, name: str) -> Op:
        """The op called ``name`` that makes ``value``; declines otherwise."""
        owner = None if value is None else value.owner
        if owner is None or owner.name != name:
            made_by = "nothing" if owner is None else owner.name
            raise Declined(f"expected {value!r} to come from {name}, not from {made_by}", quiet=True)
        return owner

    def require(self, *reasons: Reason) -> None:
        """Decline with the first of ``reasons``, if there is one."""
        if reasons:
            raise Declined(reasons[0])

    def declined(self, message: str, *, code: str = "", fix: str = "", quiet: bool = False) -> Declined:
        """The exception by which a rule declines; raise it."""
        return Declined(Reason(code, message, fix), quiet=quiet)

    def op(self, name: str, *operands: Value | None, type: Type, hint: str = "", **attrs: Attr) -> Value:
        """A new op before the root with one result of ``type``; returns that result."""
        values = list(operands)
        while values and values[-1] is None:
            values.pop()
        result = self.graph.fresh(hint or f"{self.root.results[0].name}_q")
        made = self.graph.create(name, values, attrs, [(result, type)], loc=self.root.loc, before=self.root)
        self.made.append(made)
        return made.result

    def const(self, hint: str, payload: Payload, graph: Graph | None = None) -> Value:
        """A new constant of ``graph`` (the root's by default)."""
        home = graph or self.graph
        value = home.add_const(home.fresh(hint), payload)
        self.made_consts.append(value)
        return value

    def revisit(self, op: Op) -> None:
        """Ask the driver to look at ``op`` again."""
        self.touched.append(op)

    def undo(self) -> None:
        for op in reversed(self.made):
            op.erase()
        for value in self.made_consts:
            value.graph.remove_const(value)


def erase_dead(op: Op) -> int:
    """Erase ``op`` and, going backwards, what only it used; returns how many ops went. Unused constants go too."""
    gone = 0
    queue = [op]
    while queue:
        dead = queue.pop()
        if dead.erased or not is_pure(dead) or any(r.uses for r in dead.results):
            continue
        operands = [v for v in dead.operands if v is not None]
        dead.erase()
        gone += 1
        for v in operands:
            if v.uses:
                continue
            if v.owner is not None:
                queue.append(v.owner)
            elif v.is_const:
                v.graph.remove_const(v)
    return gone


def apply_rules(
    graph: Graph,
    rules: Iterable[Rule],
    *,
    target: Target | None = None,
    phases: Sequence[Phase] = PHASES,
    log: list[Refusal] | None = None,
) -> int:
    """Apply ``rules`` until none fires; returns how often one did. Linear in the graph for rules that make progress.

    Each op is looked at once, again when an operand or user of it was rewritten. ``log`` receives the refusals of the
    ops that are left. Raises StructureError when the rules do not come to an end.
    """
    by_root: dict[str, list[Rule]] = {}
    for r in rules:
        for root in r.roots:
            by_root.setdefault(root, []).append(r)
    queue: deque[Op] = deque(op for op in graph.walk() if op.name in by_root)
    queued = set(queue)
    fired, limit = 0, 20 * len(queue) + 1000
    refusals: dict[Op, list[Refusal]] = {}

    def push(op: Op) -> None:
        if op.name in by_root and op not in queued and not op.erased:
            queue.append(op)
            queued.add(op)

    while queue:
        op = queue.popleft()
        queued.discard(op)
        if op.erased:
            continue
        refusals.pop(op, None)
        for r in by_root[op.name]:
            rw = Rewriter(op, target, phases)
            try:
                out = r.apply(op, rw)
            except Declined as e:
                rw.undo()
                if not e.quiet:
                    refusals.setdefault(op, []).append(_refusal(r, op, e.reason))
                continue
            fired += 1
            if fired > limit:
                raise StructureError(f"rules do not come to an end: {r.name} fired on {op.name} '{op.label}' again")
            neighbours = [u for res in op.results for u in res.users]
            sources = [v.owner for v in op.operands if v is not None and v.owner is not None]
            pairs = list(zip(op.results, [out] if isinstance(out, Value) else out, strict=True))
            for old, new in pairs:
                old.replace_uses(new)
            erase_dead(op)
            for old, new in pairs:
                take_name(old, new, rw.made)
            for near in (*rw.made, *neighbours, *sources, *rw.touched):
                push(near)
            break
    if log is not None:
        log.extend(entry for op, entries in refusals.items() if not op.erased for entry in entries)
    return fired


def take_name(old: Value, new: Value, made: Iterable[Op]) -> None:
    """A new value takes the name of the one that it replaced and that is gone: outputs keep their names."""
    replaced = old.owner is not None and old.owner.erased
    if replaced and any(new.owner is op for op in made) and new.graph is old.graph:
        new.graph.rename(new, old.name)


def _refusal(r: Rule, op: Op, reason: Reason) -> Refusal:
    site: Any = op.attrs.get("site") or op.meta.get("site", "")
    return Refusal(r.name, op.label, str(site), reason)


def loc_named(loc: Loc, name: str) -> Loc:
    """``loc`` with another node name."""
    return Loc(name, loc.scope, loc.source)
