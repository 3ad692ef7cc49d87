"""``--check``: the graph before and after each pass, run on samples (law L5).

What a pass promises decides what is compared:

- *exact*: the outputs, end to end, within what rounding does (:mod:`qcompiler.agreement`). Where the graph holds codes,
  rounding may flip one and move an output by a step; outputs that differ are then looked into: each value that the pass
  redefined is recomputed from what the earlier graph has, and a flip at a tie is no fault.
- *layout*: each value that the pass redefined, recomputed in this way, within what rounding and the chosen kernel do.
- *lossy*: with every pair of quantize and dequantize taken out, both graphs are equal as under *exact*; and each new
  pair keeps the bound of its scheme (:mod:`qcompiler.pair_bounds`). The drift of the outputs is told, not judged.

One sample is in memory at a time; of values inside the graph, :data:`~qcompiler.comparing.CHUNK` at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.agreement import NONE, Gap
from qcompiler.bias_correction import correction
from qcompiler.comparing import CHUNK, Compared, Fault, Feed, KernelError, outputs_of
from qcompiler.dtypes import Array
from qcompiler.errors import Error, InputError
from qcompiler.ir import Graph, Op, Value
from qcompiler.numerics import spread
from qcompiler.pair_bounds import (
    ROUNDING,
    Range,
    activation_gap,
    asked_step,
    code_range,
    correction_gap,
    rounded_gap,
    weight_gap,
)
from qcompiler.pipeline import Context, Pass
from qcompiler.replay import opened, pairs, redefined, rounded, same_graph
from qcompiler.scheme import Scheme
from qcompiler.subgraph import Runner, duplicate
from qcompiler.verify.findings import Finding

SAMPLES = 4
"""So many batches of the data, or made-up inputs, go through the graphs."""


@dataclass(frozen=True)
class CheckedPass:
    """What was found at one pass. ``error`` is the worst of what was compared and ``bound`` what it may be, in the unit
    of the pass's kind: shares of the largest element (exact, layout) or steps (lossy). ``drift`` is how far the outputs
    moved, as a share of their largest element (None where that is not finite); ``seconds`` what the check took."""

    number: int
    name: str
    kind: str
    samples: int
    compared: int
    error: float
    bound: float
    drift: float | None
    seconds: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CheckFailed(Error):
    """A pass broke its promise; ``finding`` says which and where, ``repro`` is a file."""

    repro: Path | None = None

    def __init__(self, item: Pass, finding: Finding) -> None:
        super().__init__(str(finding))
        self.item, self.finding = item, finding


@dataclass
class CheckHook:
    """Compares the graph before and after each pass; raises :class:`CheckFailed` at the first that breaks its promise.

    ``feeds`` are the samples; ``complete`` says that they are all of the data that ranges were taken from.
    """

    runner: Runner
    feeds: Sequence[Feed]
    kernel_error: KernelError = lambda op, operands: 0.0
    complete: bool = False
    results: list[CheckedPass] = field(default_factory=list)
    _was: Graph | None = None
    _outputs: list[list[Array]] = field(default_factory=list)

    def before(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        """Keep what the graph is now; its constants are shared."""
        self._was = duplicate(graph)
        if not self._outputs and inside_regions(graph) is None:
            self._outputs = [outputs_of(self.runner, self._was, feed) for feed in self.feeds]

    def after(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        """Judge what the pass made of it."""
        was, start = self._was, time.perf_counter()
        assert was is not None
        self._was = None
        ctx.progress(f"check {item.name}")
        if same_graph(was, graph):
            self._note(number, item, NONE, 0, 0.0, start, "it changed nothing")
            return
        if (op := inside_regions(was) or inside_regions(graph)) is not None:
            note = f"not compared: {op.name} '{op.label}' stands inside a subgraph, where it cannot be run"
            self._outputs = []
            self._note(number, item, NONE, 0, 0.0, start, note)
            return
        try:
            outputs = [outputs_of(self.runner, graph, feed) for feed in self.feeds]
        except InputError as e:
            raise self._failed(number, item, self._breaks(was, graph, e)) from e
        drift = max((_drift(a, b) for a, b in zip(self._outputs, outputs, strict=True)), default=0.0)
        pair = Compared(self.runner, was, graph, self.kernel_error)
        match item.kind:
            case "exact":
                gap, count, note = self._exact(number, item, pair, outputs)
            case "layout":
                gap, count, note = self._layout(number, item, pair)
            case _:
                gap, count, note = self._lossy(number, item, was, graph)
        self._outputs = outputs
        self._note(number, item, gap, count, drift, start, note)

    def _note(self, number: int, item: Pass, gap: Gap, count: int, drift: float, start: float, note: str) -> None:
        seconds = time.perf_counter() - start
        samples, moved = len(self.feeds), drift if math.isfinite(drift) else None
        made = CheckedPass(
            number + 1, item.name, item.kind, samples, count, gap.error, gap.allowed, moved, seconds, note
        )
        self.results.append(made)

    def _failed(self, number: int, item: Pass, fault: Fault) -> CheckFailed:
        message = f"pass {number + 1}, {item.name} ({item.kind}), changed %{fault.value}: {fault.gap.text}"
        reason = _PROMISES[item.kind] + (f"; %{fault.value} is made by {fault.made_by}" if fault.made_by else "")
        fix = f"the pass is at fault: leave it out, or leave '{fault.op}' alone with --skip"
        return CheckFailed(item, Finding("QC303", fault.op, message, reason, fix))

    # -- exact -----------------------------------------------------------------------------------------------

    def _exact(self, number: int, item: Pass, pair: Compared, outputs: list[list[Array]]) -> tuple[Gap, int, str]:
        worst, note = NONE, ""
        for feed, was, now in zip(self.feeds, self._outputs, outputs, strict=True):
            gap = pair.outputs_gap(was, now)
            if not gap.fits:
                fault, gap = pair.blame(feed, was, now)
                if fault is not None:
                    raise self._failed(number, item, fault)
                note = "codes that lie at a tie flipped; each value that was redefined agrees on equal inputs"
            worst = max(worst, gap, key=lambda g: g.ratio)
        return worst, len(outputs[0]) if outputs else 0, note

    # -- layout ----------------------------------------------------------------------------------------------

    def _layout(self, number: int, item: Pass, pair: Compared) -> tuple[Gap, int, str]:
        worst, names = NONE, redefined(pair.before, pair.after)
        for feed in self.feeds:
            for value, gap in pair.replayed(feed, names):
                if not gap.fits:
                    raise self._failed(number, item, pair.fault(value, gap))
                worst = max(worst, gap, key=lambda g: g.ratio)
        return worst, len(names), "each value that was redefined, on equal inputs"

    # -- lossy -----------------------------------------------------------------------------------------------

    def _lossy(self, number: int, item: Pass, was: Graph, graph: Graph) -> tuple[Gap, int, str]:
        pair = Compared(self.runner, opened(was), opened(graph), self.kernel_error)
        for feed in self.feeds:
            a, b = (outputs_of(self.runner, g, feed) for g in (pair.before, pair.after))
            if not pair.outputs_gap(a, b).fits:
                fault, _ = pair.blame(feed, a, b)
                if fault is not None:
                    raise self._failed(number, item, fault)
        known = {r.name for op in was.walk() for r in op.results}
        new = [p for p in pairs(graph) if p[1].result.name not in known]
        exact_range = getattr(item, "observer", "minmax") == "minmax"
        shrunk = getattr(item, "clip", "absmax") == "mse"
        worst, count, inside = NONE, 0, 0
        live: list[tuple[Op, Op]] = []
        for q, dq in new:
            found = weight_gap(q, dq, shrunk=shrunk)
            if found is None and dq.graph is graph:
                live.append((q, dq))
                continue
            if found is None:
                inside += 1
                continue
            count += 1
            if not found.fits:
                raise self._failed(number, item, _pair_fault(q, dq, found))
            worst = max(worst, found, key=lambda g: g.ratio)
        for fault in _other_constants(was, graph, known, shrunk=shrunk):
            count += 1
            if not fault.gap.fits:
                raise self._failed(number, item, fault)
            worst = max(worst, fault.gap, key=lambda g: g.ratio)
        floats = opened(graph, {dq.result.name for _, dq in live})  # ranges were taken with weights quantized
        for q, dq, gap in self._activations(floats, live, whole=exact_range):
            count += 1
            if not gap.fits:
                raise self._failed(number, item, _pair_fault(q, dq, gap))
            worst = max(worst, gap, key=lambda g: g.ratio)
        note = f"{count} pairs and biases; without them the graphs are equal"
        return worst, count, note + (f"; {inside} inside subgraphs were not run alone" if inside else "")

    def _activations(self, graph: Graph, live: list[tuple[Op, Op]], *, whole: bool) -> Iterable[tuple[Op, Op, Gap]]:
        """The gap of every pair around an activation; ``graph`` runs in floats, the pairs beside it. ``whole``: ranges
        were taken to hold all of the data."""
        ranges: dict[Value, Range] = {}
        for at in range(0, len(live), CHUNK):
            chunk = live[at : at + CHUNK]
            names = {v.name for q, dq in chunk for v in (*q.operands, *dq.operands[1:], dq.result) if v is not None}
            worst = [NONE] * len(chunk)
            with self.runner(graph, sorted(names)) as run:
                for feed in self.feeds:
                    found = run(feed)
                    for i, (q, dq) in enumerate(chunk):
                        gap = self._activation(q, dq, found, whole=whole, ranges=ranges)
                        worst[i] = max(worst[i], gap, key=lambda g: g.ratio)
            yield from ((q, dq, gap) for (q, dq), gap in zip(chunk, worst, strict=True))
        if whole and self.complete:
            yield from self._too_wide(live, ranges)

    def _activation(self, q: Op, dq: Op, found: Mapping[str, Array], *, whole: bool, ranges: dict[Value, Range]) -> Gap:
        x_value, scale_value, zero_value = q.operands[0], q.operands[1], q.operand(2)
        assert x_value is not None and scale_value is not None
        scheme: Scheme = q.attrs["scheme"]
        x, scale = found[x_value.name], found[scale_value.name]
        zero = 0.0 if zero_value is None else float(found[zero_value.name].astype(np.float64).max(initial=0.0))
        if not x.size:
            return NONE
        if scheme.granularity != "tensor":
            return activation_gap(x, found[dq.result.name], spread(scale, x.shape, scheme), scheme.dtype, covered=None)
        covered = None if whole or scheme.dynamic else code_range(float(scale), zero, scheme)
        ranges.setdefault(scale_value, Range()).widen(x)
        return activation_gap(x, found[dq.result.name], float(scale), scheme.dtype, covered=covered)

    @staticmethod
    def _too_wide(live: list[tuple[Op, Op]], ranges: Mapping[Value, Range]) -> Iterable[tuple[Op, Op, Gap]]:
        """Static scales that are larger than all of the values which share them ask for."""
        for q, dq in live:
            scale, scheme = q.operands[1], q.attrs["scheme"]
            if scale is None or not scale.is_const or scale.payload is None or scale not in ranges:
                continue
            have, asked = float(scale.payload.array()), asked_step(ranges[scale], scheme)
            text = f"its scale is {have:.6g}, {have / asked:.4g} times what the values ask for"
            yield q, dq, Gap(have / asked, 1 + 4 * ROUNDING, text)

    # -- a graph that does not run ---------------------------------------------------------------------------

    def _breaks(self, was: Graph, graph: Graph, error: InputError) -> Fault:
        """The first value that the pass redefined and that cannot be computed any more."""
        pair = Compared(self.runner, was, graph, self.kernel_error)
        for feed in self.feeds[:1]:
            for value, gap in pair.replayed(feed, redefined(was, graph)):
                if not gap.fits:
                    return pair.fault(value, gap)
        value = graph.outputs[0]
        return Fault(value.name, value.name, Gap(math.inf, 0.0, str(error)))


_PROMISES = {
    "exact": "an exact pass keeps every output up to rounding",
    "layout": "a layout pass keeps every value within what its kernel rounds",
    "lossy": "a lossy pass keeps each value within half a step of its scheme, and all else exactly",
}


def inside_regions(graph: Graph) -> Op | None:
    """A q op inside a subgraph that works on what is computed, not on constants: those the runner does not run."""
    constant: set[Value] = set()
    for op in graph.walk():
        if not op.name.startswith("q."):
            continue
        if all(v is None or v.is_const or v in constant for v in op.operands):
            constant.update(op.results)
        elif op.graph is not graph:
            return op
    return None


def running_feeds(
    runner: Runner, graph: Graph, made_up: Callable[[Graph, int], Iterable[Feed]], count: int = 2
) -> list[Feed]:
    """``count`` made-up inputs on which ``graph`` runs; raises InputError where none is found."""
    why = "its inputs are of types or sizes that no values are made up for"
    feeds: list[Feed] = []
    for seed in range(count):
        for feed in made_up(graph, seed):
            try:
                outputs_of(runner, graph, feed)
            except InputError as e:
                why = str(e)
                continue
            feeds.append(feed)
            break
    if not feeds:
        raise InputError(f"--check found no inputs on which the model runs ({why}); give --calibration DATA")
    return feeds


def told(checks: Sequence[CheckedPass]) -> list[str]:
    """What a report says of the checks, one line."""
    if not checks:
        return []
    judged = [c for c in checks if c.compared]
    blind = [c.name for c in checks if c.note.startswith("not compared")]
    names = ", ".join(
        f"{c.name} {c.error:.2g} of {c.bound:.2g} {'steps' if c.kind == 'lossy' else 'allowed'}" for c in judged
    )
    drift = max((c for c in checks if c.kind == "lossy"), key=lambda c: c.drift or 0.0, default=None)
    moved = (
        ""
        if drift is None or drift.drift is None
        else f"; {drift.name} moves the outputs by {drift.drift:.2g} of their largest element"
    )
    seconds = sum(c.seconds for c in checks)
    samples = max(c.samples for c in checks)
    kept = f"check: {len(checks) - len(blind)} passes keep their promise on {samples} samples ({seconds:.1f} s)"
    missed = f"; not compared: {', '.join(blind)}" if blind else ""
    return [f"{kept}: {names or 'none changed anything'}{moved}{missed}"]


def _other_constants(was: Graph, graph: Graph, known: set[str], *, shrunk: bool) -> Iterable[Fault]:
    """New codes that are no pair's, and new biases that take back what rounding does: how far they are off."""
    for dq, by in rounded(graph):
        if dq.result.name not in known:
            yield Fault(dq.label, dq.result.name, rounded_gap(dq, by, shrunk=shrunk), dq.name)
    for value in graph.consts.values():
        made = None if value.name in was.consts else correction(value)
        if made is not None and not shrunk:
            yield Fault(value.name, value.name, correction_gap(made))


def _pair_fault(q: Op, dq: Op, gap: Gap) -> Fault:
    x = q.operands[0]
    assert x is not None
    sites = dq.attrs.get("sites")
    label = str(sites[0]) if sites else q.loc.name or x.name
    return Fault(label, x.name, gap, dq.name)


def _drift(before: Sequence[Array], after: Sequence[Array]) -> float:
    """The largest move of a float output, as a share of its largest element; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.size and a.dtype.kind not in "biuSUO":
            with np.errstate(invalid="ignore"):
                moved = float(np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0.0))
            top = float(np.nanmax(np.abs(a.astype(np.float64)), initial=0.0))
            worst = max(worst, moved / top if top else moved)
    return worst
