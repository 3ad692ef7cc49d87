"""Where pairs of activations go: which values become codes, and which of them share one scale.

Three kinds of place ask for codes or make them:

- *anchors*: products whose weight is quantized. Their activations must be codes. A linear's result stays float, unless
  all that read it want codes; a convolution, whose kernel is best at making codes, makes them where something wants
  codes, and a float result else (or codes always, where the target has no kernel with a float result).
- *capable* ops, for which the target has an integer kernel (Add, Concat, Sigmoid ...): they run on codes where a codes
  value reaches them and their result is wanted as codes, else in float.
- *movement* and clamps (:mod:`qcompiler.movement`), which run on whatever they are given.

Values that movement or clamps connect behind one op that makes codes are one *group*: the codes are made once and only
move, so there is one scale. Its range is the union of the ranges at the places where the codes are read, so that no
reader is clipped; a reader that would like a narrower range pays in resolution. Where all readers stand behind a Relu
or a MaxPool, theirs is the range, and the clamp costs nothing: quantizing saturates.

The operands of a Concat that nothing else reads join the group of its result: they would be rounded to its scale
anyway, once more, and with one scale the Concat is a copy. An operand with other readers keeps its own scale, and the
integer kernel rescales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qcompiler.ir import Graph, Op, Use, Value
from qcompiler.movement import clamp, data_operands, movement_kind


@dataclass(frozen=True)
class Anchor:
    """A product with a quantized weight (or of two activations): ``slots`` are the operands that become codes.

    ``makes`` says of its result whether it is made as codes: never, always, or where something wants codes.
    """

    op: Op
    slots: tuple[int, ...]
    site: str
    makes: Literal["floats", "codes", "wanted"] = "floats"


@dataclass
class Group:
    """Values that share one scale. ``points`` are those whose range counts, ``constants`` among them stored values.

    ``every`` are values of which each use reads codes, ``some`` single uses of values that stay float elsewhere.
    """

    points: dict[Value, None] = field(default_factory=dict)
    every: dict[Value, None] = field(default_factory=dict)
    some: dict[Value, list[Use]] = field(default_factory=dict)
    anchors: dict[str, None] = field(default_factory=dict)
    """The sites that read or make these codes."""


def passes(use: Use) -> bool:
    """True where the user only moves or clamps the value; a Concat counts as an op of its own."""
    op = use.user
    if not isinstance(op, Op):
        return False
    if clamp(op) is not None:
        return use.slot == 0
    return movement_kind(op) not in (None, "concat") and use.slot in data_operands(op)


def activation_slots(op: Op) -> tuple[int, ...]:
    """The operands of a capable op that become codes."""
    if op.name in ("onnx.Add", "onnx.Mul"):
        return (0, 1)
    return data_operands(op)


class Placement:
    """The groups of ``graph`` (its top level; regions read floats) for ``anchors`` and the ops that ``capable`` names.

    ``integer`` are the capable ops that will run on codes.
    """

    def __init__(self, graph: Graph, anchors: Iterable[Anchor], capable: Callable[[Op], bool]) -> None:
        self.graph = graph
        self.anchors = {a.op: a for a in anchors if a.op.graph is graph}
        self.integer: set[Op] = {op for op in graph if op not in self.anchors and capable(op)}
        self.makers: set[Op] = {a.op for a in self.anchors.values() if a.makes != "floats"}
        self.codes: set[Value] = set()
        self._settle()
        self._joined: set[Use] = set()
        self._parent: dict[Value, Value] = {}
        self.groups = self._groups()

    # -- what is codes ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Take capable ops away until each one left has codes before it and a reader of codes behind it; convolutions
        that nobody wants codes of make floats."""
        order = list(self.graph)
        while True:
            self.codes = self._made(order)
            wanted = self._wanted(order)
            kept = {
                op
                for op in self.integer
                if op.result in wanted and any(op.operand(i) in self.codes for i in activation_slots(op))
            }
            makers = {op for op in self.makers if self.anchors[op].makes == "codes" or op.result in wanted}
            if kept == self.integer and makers == self.makers:
                return
            self.integer, self.makers = kept, makers

    def _made(self, order: Sequence[Op]) -> set[Value]:
        """The values that some op makes as codes, and those that move behind them."""
        out: set[Value] = set()
        for op in order:
            if op in self.anchors:
                if op in self.makers:
                    out.add(op.result)
            elif op in self.integer:
                if any(op.operand(i) in out for i in activation_slots(op)):
                    out.add(op.result)
            elif op.operand(0) in out and passes(Use(op, 0)):
                out.update(op.results)
        return out

    def _wanted(self, order: Sequence[Op]) -> set[Value]:
        """The values that an anchor reads as codes, through movement and the ops that run on codes."""
        out: set[Value] = set()
        for op in reversed(order):
            for result in op.results:
                for use in result.uses:
                    if self._reads_codes(use) or (
                        isinstance(use.user, Op) and passes(use) and any(r in out for r in use.user.results)
                    ):
                        out.add(result)
        return out

    def _reads_codes(self, use: Use) -> bool:
        op = use.user
        if not isinstance(op, Op):
            return False
        if op in self.anchors:
            return use.slot in self.anchors[op].slots
        return op in self.integer and use.slot in activation_slots(op)

    # -- what shares a scale ---------------------------------------------------------------------------------

    def _find(self, value: Value) -> Value:
        root = value
        while self._parent.get(root, root) is not root:
            root = self._parent[root]
        while self._parent.get(value, value) is not root:
            self._parent[value], value = root, self._parent[value]
        return root

    def _join(self, a: Value, b: Value) -> None:
        self._parent[self._find(a)] = self._find(b)

    def _groups(self) -> list[Group]:
        for op in self.graph:  # codes move: what a moved value is made of shares its scale
            moved = op.operand(0)
            if moved in self.codes and passes(Use(op, 0)) and op not in self.integer and op not in self.anchors:
                for result in op.results:
                    self._join(result, moved)
        members: dict[Value, list[Value]] = {}
        for value in self._in_order():
            members.setdefault(self._find(value), []).append(value)
        for op in self.graph:
            if op in self.integer and op.name == "onnx.Concat":
                self._join_operands(op, members)
        groups: dict[Value, Group] = {}
        for value in self._in_order():
            self._place_made(value, groups.setdefault(self._find(value), Group()))
        for value in self._floats():
            uses = [u for u in value.uses if self._reads_codes(u)]
            joined = [u for u in uses if self._is_concat(u)]
            for use in joined:
                assert isinstance(use.user, Op)
                group = groups[self._find(use.user.result)]
                group.some.setdefault(value, []).append(use)
            if own := [u for u in uses if u not in joined]:
                groups[value] = Group({value: None}, some={value: own})
                self._note_sites(groups[value], own)
        return [g for g in groups.values() if g.every or g.some]

    def _in_order(self) -> list[Value]:
        return [r for op in self.graph for r in op.results if r in self.codes]

    def _floats(self) -> list[Value]:
        """Values that no op makes as codes and that something reads as codes, in order of definition."""
        defined = [*self.graph.inputs, *self.graph.consts.values(), *(r for op in self.graph for r in op.results)]
        return [v for v in defined if v not in self.codes and any(self._reads_codes(u) for u in v.uses)]

    def _is_concat(self, use: Use) -> bool:
        return isinstance(use.user, Op) and use.user in self.integer and use.user.name == "onnx.Concat"

    def _join_operands(self, concat: Op, members: dict[Value, list[Value]]) -> None:
        for value in dict.fromkeys(v for v in concat.operands if v in self.codes):
            assert value is not None
            around = members.get(self._find(value), [value])
            readers = [u for v in around for u in v.uses if not passes(u)]
            if all(u.user is concat for u in readers):
                self._joined.update(readers)
                root, other = self._find(value), self._find(concat.result)
                if root is not other:
                    merged = members.pop(root, []) + members.pop(other, [])
                    self._join(value, concat.result)
                    members[self._find(concat.result)] = merged

    def _place_made(self, value: Value, group: Group) -> None:
        """A value that is made as codes: a pair on all of it, where it is read or moves in another way than whole."""
        maker = value.owner
        if maker is not None and maker in self.makers:
            group.anchors[self.anchors[maker].site] = None
        read = [u for u in value.uses if not passes(u)]
        if any(u not in self._joined for u in read):
            group.points[value] = None
        cut = [u for u in value.uses if isinstance(u.user, Op) and passes(u) and not _whole(u.user)]
        if read or cut:
            group.every[value] = None
        self._note_sites(group, read)

    def _note_sites(self, group: Group, uses: Iterable[Use]) -> None:
        for use in uses:
            if isinstance(use.user, Op) and use.user in self.anchors:
                group.anchors[self.anchors[use.user].site] = None


def _whole(op: Op) -> bool:
    """A quantize behind ``op`` can be moved before it: a reordering or a clamp."""
    return clamp(op) is not None or movement_kind(op) == "permute"
