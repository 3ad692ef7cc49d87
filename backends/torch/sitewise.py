"""Where a site's result can be seen in a compiled program, and which value of the float program it stands for.

A site is a product of the float program with a weight. What was made of it in the compiled program is the op that
carries its name, or the ops that read constants called ``<site>.<what>``: a kernel's weight, scales and bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qcompiler.backends.torch.calling import is_float
from qcompiler.ir import Graph, Op, Value
from qcompiler.verify.op_kinds import CASTS, MOVES, base_name, is_product
from qcompiler.views import call_args

_FORMS = "view.default reshape.default _unsafe_view.default unflatten.int flatten.using_ints unsqueeze.default"
SAME = frozenset(f"aten.{n}" for n in [*_FORMS.split(), "squeeze.dim", "alias.default", "clone.default"]) | CASTS
"""Ops behind a product that change nothing but the form of its result."""
FINISHING = frozenset(f"aten.{n}.Tensor" for n in ("add", "mul", "sub", "div"))
"""Ops that finish what a kernel began, with constants of its site."""


@dataclass
class SiteTap:
    """One site: its ``got`` in the compiled program, ``want`` in the float one; or the ``reason`` why it has none."""

    name: str
    op: str
    want: Value = field(repr=False)
    got: Value | None = field(default=None, repr=False)
    reason: str = ""

    @property
    def tensor(self) -> str:
        """The value of the float program."""
        return "" if self.reason else self.want.name


def site_taps(reference: Graph, artifact: Graph) -> list[SiteTap]:
    """Every site of ``reference``, in order."""
    sites = dict(_sites(reference))
    readers = _readers(artifact, sites)
    out = []
    for name, op in sites.items():
        tap = SiteTap(name, base_name(op), _finished(op.results[0], sites))
        _place(tap, readers.get(name, []), sites)
        out.append(tap)
    return out


def _sites(reference: Graph) -> Iterator[tuple[str, Op]]:
    """The products at the top of the graph that have a weight, under the names that the compiler gives them: that of
    the module that owns the weight, or of the module that the product stands in where several read one weight."""
    products = [(op, w) for op in reference if is_product(op) and op.results and (w := _weight(op)) is not None]
    owners = Counter(w for _, w in products)
    taken: set[str] = set()
    for op, weight in products:
        owned = weight.name.removesuffix(".weight")
        lookups = any(not is_product(u) and u.name not in MOVES for u in weight.users)
        name = op.loc.scope if op.loc.scope and (owners[weight] > 1 or lookups) else owned
        if name not in taken:
            taken.add(name)
            yield name, op


def _weight(op: Op) -> Value | None:
    """The constant of rank 2 or more that ``op`` multiplies by, seen through what only moves it."""
    for value in op.operands:
        while value is not None and value.owner is not None and value.owner.name in MOVES:
            value = value.owner.operand(0)
        if value is not None and value.is_const and len(value.tensor.shape or ()) >= 2:
            return value
    return None


def _readers(artifact: Graph, sites: Mapping[str, Op]) -> dict[str, list[Op]]:
    """Site -> the ops at the top of ``artifact`` that are called like it or read a constant of it, in order."""
    place = {op: i for i, op in enumerate(artifact)}
    found: dict[str, set[Op]] = {op.label: {op} for op in artifact if op.label in sites}
    for value in artifact.consts.values():
        owner = _owner(value.name, sites)
        if owner:
            found.setdefault(owner, set()).update(op for op in value.users if op in place)
    return {name: sorted(ops, key=lambda op: place[op]) for name, ops in found.items()}


def _owner(name: str, sites: Mapping[str, Op]) -> str:
    """The site that a constant belongs to: the longest one that its name begins with."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (head := ".".join(parts[:end])) in sites:
            return head
    return ""


def _place(tap: SiteTap, readers: list[Op], sites: Mapping[str, Op]) -> None:
    """Find what the compiled program computes for the site."""
    n = (tap.want.tensor.shape or (None,))[-1]
    starts = [op.results[0] for op in readers if op.results and op.name not in MOVES]
    if not starts:
        tap.reason = f"no op of the compiled program is called '{tap.name}' or reads a constant called so"
        return
    ends = [v for v in _chain(starts[-1], sites) if is_float(v) and (v.tensor.shape or (None,))[-1] == n]
    if not ends:
        last = starts[-1]
        tap.reason = f"what reads its constants last, '{last.name}', gives {last.type}, not {n} floats a row"
        return
    tap.got = ends[-1]


def _finished(value: Value, sites: Mapping[str, Op]) -> Value:
    """The product's result with the bias of its site added."""
    return next((v for v in reversed(_chain(value, sites)) if v.owner is not None and v.owner.name in FINISHING), value)


def _chain(value: Value, sites: Mapping[str, Op]) -> list[Value]:
    """``value`` and what ops that change its form or finish it make of it, as long as each has one reader."""
    out = [value]
    while len(out[-1].uses) == 1 and out[-1].users and (op := out[-1].users[0]).results:
        others = [v for v in op.operands if v is not None and v is not out[-1]]
        finishing = op.name in FINISHING and others and all(_belongs(v, sites) for v in others)
        if not (finishing or op.name in SAME or _cuts_padding(op)):
            break
        out.append(op.results[0])
    return out


def _belongs(value: Value, sites: Mapping[str, Op]) -> bool:
    """Whether ``value`` is a constant of a site (layers that are tied share theirs), as it stands or moved."""
    while value.owner is not None and value.owner.name in MOVES and (source := value.owner.operand(0)) is not None:
        value = source
    return value.is_const and bool(_owner(value.name, sites))


def _cuts_padding(op: Op) -> bool:
    """A slice of the last axis."""
    if op.name != "aten.slice.Tensor":
        return False
    args, rank = call_args(op), len(op.results[0].tensor.shape or ())
    return len(args) > 1 and args[1] in (-1, rank - 1)
