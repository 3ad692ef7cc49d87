"""Two graphs that should compute the same: where they differ on a sample, and which op is the first to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler.agreement import NONE, Gap, Rounding, codes_differing, differing
from qcompiler.clipping import Floats
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.float_codes import largest
from qcompiler.ir import Graph, Op, Value
from qcompiler.numerics import evaluate
from qcompiler.replay import chunked, computed_names, divergent, redefined, segment
from qcompiler.scheme import Scheme
from qcompiler.subgraph import Runner, reads

CHUNK = 48
"""So many values inside a graph are held at a time."""

Feed = Mapping[str, Array]
KernelError = Callable[[Op, Sequence[Array | None]], "Array | float"]
"""How far the kernel behind a lowered op may be from the reference semantics: steps for codes, else absolute."""


@dataclass(frozen=True)
class Fault:
    """Where two graphs part: the op that computes ``value`` in the later one."""

    op: str
    value: str
    gap: Gap
    made_by: str = ""


def outputs_of(runner: Runner, graph: Graph, feed: Feed) -> list[Array]:
    """The outputs of ``graph`` on one sample, in order."""
    with runner(graph, ()) as run:
        found = run(feed)
    return [found[v.name] for v in graph.outputs]


@dataclass
class Compared:
    """Two states of a graph and what tells them apart."""

    runner: Runner
    before: Graph
    after: Graph
    kernel_error: KernelError
    rounding: Rounding = field(init=False)
    known: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.known = computed_names(self.before)
        whole = Rounding(self.before), Rounding(self.after)
        self.rounding = max(whole, key=lambda r: max((r.relative(v) for v in r.steps), default=0.0))
        self._limits = [
            max(r.relative(v) for r, v in zip(whole, ends, strict=True))
            for ends in zip(self.before.outputs, self.after.outputs, strict=True)
        ]

    def outputs_gap(self, before: Sequence[Array], after: Sequence[Array]) -> Gap:
        """The worst difference of the outputs, end to end."""
        gaps = [differing(a, b, limit) for a, b, limit in zip(before, after, self._limits, strict=True)]
        return max(gaps, key=lambda g: g.ratio, default=NONE)

    def fault(self, value: Value, gap: Gap) -> Fault:
        """``value`` of the later graph is wrong."""
        op = value.owner
        label = value.name if op is None else str(op.attrs.get("site") or op.label)
        return Fault(label, value.name, gap, "" if op is None else op.name)

    # -- bisection -------------------------------------------------------------------------------------------

    def blame(self, feed: Feed, before: Sequence[Array], after: Sequence[Array]) -> tuple[Fault | None, Gap]:
        """The first op that diverges on the way to an output that differs; None, and the worst that was seen, where
        every value that was redefined agrees when it is recomputed from what the earlier graph computed."""
        suspects, worst = [], NONE
        holds_codes = any(op.name.startswith("q.") for g in (self.before, self.after) for op in g)
        for value, gap in self.replayed(feed, redefined(self.before, self.after)):
            if not gap.fits:
                suspects.append((value, gap))
            worst = max(worst, gap, key=lambda g: g.ratio)
        if not suspects and holds_codes:
            return None, worst
        wrong = self._wrong_names(feed)
        for a, b, limit, value in zip(before, after, self._limits, self.after.outputs, strict=True):
            if not (gap := differing(a, b, limit)).fits:
                wrong[value.name] = gap
        path = divergent(self.after, set(wrong), self.known)
        on_the_way = [(v, g) for v, g in suspects if v in set(path)]
        if on_the_way:
            return self.fault(*on_the_way[0]), worst
        if path:
            return self.fault(path[0], wrong[path[0].name]), worst
        name = next(iter(wrong), "")
        value = next((v for v in self.after.outputs if v.name == name), self.after.outputs[0])
        return self.fault(value, wrong.get(value.name, worst)), worst

    def _wrong_names(self, feed: Feed) -> dict[str, Gap]:
        """The values of both graphs that differ, end to end."""
        wrong: dict[str, Gap] = {}
        by_name = {r.name: r for op in self.after for r in op.results}
        for names in chunked((n for n in by_name if n in self.known), CHUNK):
            with self.runner(self.before, names) as run:
                was = run(feed)
            with self.runner(self.after, names) as run:
                now = run(feed)
            for name in names:
                gap = differing(was[name], now[name], self.rounding.relative(by_name[name]))
                if not gap.fits:
                    wrong[name] = gap
        return wrong

    # -- replay ----------------------------------------------------------------------------------------------

    def replayed(self, feed: Feed, values: Sequence[Value]) -> Iterable[tuple[Value, Gap]]:
        """Each of ``values``, recomputed by the later graph from what the earlier one computed, and how it differs."""
        for at in range(0, len(values), CHUNK):
            chunk = [(v, *segment(self.after, v, self.known)) for v in values[at : at + CHUNK]]
            names = {v.name for v, _, _ in chunk} | {n for _, _, inputs in chunk for n in inputs}
            for value, _, _ in chunk:
                rounder, _ = self._rounder(value)
                names |= set() if rounder is None else {v.name for v in reads(rounder) if not v.is_const}
            with self.runner(self.before, sorted(names)) as run:
                was = run(feed)
            for value, made, inputs in chunk:
                given = {n: was[n] for n in inputs}
                try:
                    yield value, self._segment_gap(value, made, given, was)
                except InputError as e:
                    yield value, Gap(math.inf, 0.0, str(e))

    def _segment_gap(self, value: Value, made: Graph, given: Feed, was: Mapping[str, Array]) -> Gap:
        kernels = [op for op in made if any(v is not None and v.is_const for v in op.operands)]
        live = {v.name for op in kernels for v in op.operands if v is not None and not v.is_const}
        with self.runner(made, sorted(live)) as run:
            found = run(given)
        now, old = found[value.name], was[value.name]
        relative = Rounding(made).relative(made.outputs[0])
        rounder, dequantize = self._rounder(value)
        scheme = None if rounder is None else rounder.attrs.get("y_scheme") or rounder.attrs["scheme"]
        whole = old.dtype.kind in "iuV" and old.dtype.itemsize == 1
        if not whole and (rounder is None or dequantize is None):
            gap = differing(old, now, relative)
            return gap if gap.fits else differing(old, now, relative, self._allowance(kernels, found, now.shape))
        exact = None if rounder is None else _before_rounding(rounder, was)
        slack = relative * (255 if scheme is None else _span(scheme))
        if dequantize is not None:
            if (gap := differing(old, now, relative)).fits:
                return gap
            old, now = (_in_steps(dequantize, a) for a in (old, now))
        gap = codes_differing(old, now, exact, slack, scheme)
        if gap.fits:
            return gap
        coders = [op for op in kernels if _gives_codes(op)]  # the errors of others are no steps
        more = max((float(np.max(self._error(op, found))) for op in coders), default=0.0)
        return codes_differing(old, now, exact, slack + more, scheme)

    def _rounder(self, value: Value) -> tuple[Op | None, Op | None]:
        """The op of the earlier graph that rounds to the codes which ``value`` is, and the dequantize behind it where
        ``value`` is those codes in floats; (None, None) where it is neither."""
        was = self.before.local(value.name)
        maker = None if was is None else was.owner
        if maker is not None and _rounds(maker):
            return maker, None
        if maker is None or maker.name != "q.dequantize" or maker.operands[0] is None:
            return None, None
        source = maker.operands[0].owner
        constant = all(v is None or v.is_const for v in maker.operands[1:])
        tensor = maker.attrs["scheme"].granularity == "tensor"
        return (source, maker) if source is not None and _rounds(source) and constant and tensor else (None, None)

    def _allowance(self, kernels: Sequence[Op], found: Mapping[str, Array], shape: tuple[int, ...]) -> Array | float:
        """What the kernels of a segment may be off by: element by element where there is one that fits."""
        errors = [np.asarray(self._error(op, found)) for op in kernels]
        if len(errors) == 1 and errors[0].size == math.prod(shape):
            return errors[0].reshape(shape)
        return float(sum(float(e.max(initial=0.0)) for e in errors))

    def _error(self, op: Op, found: Mapping[str, Array]) -> Array | float:
        operands: list[Array | None] = []
        for v in op.operands:
            payload = None if v is None or not v.is_const else v.payload
            operands.append(None if v is None else payload.array() if payload is not None else found[v.name])
        return self.kernel_error(op, operands)


def _gives_codes(op: Op) -> bool:
    element = op.results[0].tensor.dtype if op.results else None
    return element is not None and (element.is_integer or element.bits <= 8)


def _span(scheme: Scheme) -> float:
    """From the smallest to the largest code, in steps."""
    element = scheme.dtype
    return float(element.qmax - element.qmin) if element.is_integer else 2 * largest(element)


def _rounds(op: Op) -> bool:
    """True for a q op whose result is codes of a number that can be computed."""
    return op.name == "q.quantize" or "y_scheme" in op.attrs


def _result_slot(op: Op) -> int:
    """Where the scale of the result stands."""
    return {"q.conv": 7, "q.linear_static": 7, "q.matmul": 6}.get(op.name, len(op.operands) // 3 * 3)


def _in_steps(dequantize: Op, x: Array) -> Array:
    """Dequantized values as their codes; float codes as what they stand for, in steps."""
    scale, zero = (None if v is None or v.payload is None else v.payload.array() for v in dequantize.operands[1:3])
    assert scale is not None
    if not dequantize.attrs["scheme"].dtype.is_integer:
        in_steps: Array = x.astype(np.float64) / float(scale)
        return in_steps
    steps = np.rint(x.astype(np.float64) / float(scale)) + (0.0 if zero is None else float(zero))
    return steps.astype(np.int64)


def _before_rounding(op: Op, was: Mapping[str, Array]) -> Floats | None:
    """The number that ``op`` rounds to a code, in steps with the zero point added; None where scales differ."""
    arrays: list[Array | None] = []
    for v in op.operands:
        payload = None if v is None or not v.is_const else v.payload
        arrays.append(None if v is None else payload.array() if payload is not None else was[v.name])
    if op.name == "q.quantize":
        scheme, y, slot = op.attrs["scheme"], arrays[0], 1
        if scheme.granularity != "tensor":
            return None
    else:
        slot = _result_slot(op)
        attrs = {k: v for k, v in op.attrs.items() if k != "y_scheme"}
        bare = [a if i < slot else None for i, a in enumerate(arrays)]
        if op.name == "q.apply":
            bare = arrays[: slot + 1]
        y = evaluate(op.name, bare, attrs)
    zero = arrays[slot + 1] if slot + 1 < len(arrays) else None
    assert y is not None
    middle = 0.0 if zero is None else float(zero)
    steps: Floats = y.astype(np.float64) / float(arrays[slot]) + middle  # type: ignore[arg-type]
    return steps
