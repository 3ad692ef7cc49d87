"""Move outliers of activations into the weights that read them, exactly, before anything is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.calibrate.holdback import HeldBack
from qcompiler.dtypes import Array
from qcompiler.errors import Error, RecipeError
from qcompiler.ir import Graph, Op
from qcompiler.migration import (
    Edit,
    Group,
    apply_edits,
    find_groups,
    fold,
    insert_scale,
    rescale_inputs,
    why_not_rescaled,
)
from qcompiler.passes.insert_qdq import site_name
from qcompiler.pipeline import Calibration, Context, Pass
from qcompiler.rewrite import Declined, Refusal
from qcompiler.scheme import Scheme, parse_scheme
from qcompiler.sites import matches
from qcompiler.smoothing import W8A8, Activation, Choice, column_absmax, magnitudes, search_alpha, smoothing_factors
from qcompiler.target import Reason
from qcompiler.views import LINEAR_OPS, LinearView, as_linear

WEIGHTS, ACTIVATIONS = parse_scheme("int8 channel sym"), parse_scheme("uint8 tensor asym")
ROWS = 512
"""Rows of each group's input that a search looks at."""
GAIN = 0.9
"""A search spends an op of its own (``q.scale``) only where that brings the error of its group below this share."""
SAMPLES, SAMPLE_ROWS = 2, 64
"""How many samples, and how many rows of each value, the rescale is proved on."""
TOLERANCE = 1e-3
"""Largest difference that a rescale may make, over the largest magnitude of the value.

Each product of a rescaled weight and activation is off by at most three roundings of f32 (2e-7); the sums of a trained
network with 6 to 12 layers differ by about 1e-6 of their largest value, and deeper ones by a little more. A factor that
is missing or applied twice changes whole channels by tens of per cent.
"""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Rescale the input of each group of f32 linears with constant weights, and their weights the other way.

    ``alpha`` is the migration strength of :mod:`qcompiler.smoothing`, 0 to 1, or ``search``: for each group that of
    ``grid`` (0.5 and no smoothing are always tried) with the least output error once the group is quantized with
    ``weights`` and ``activations``. ``match`` and ``skip`` are globs over site names; each must match something. The
    division goes into what makes the input where that is exact and nothing else reads it, else, with ``explicit``,
    into a ``q.scale``.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float | Literal["search"] = "search"
    grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    match: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    explicit: bool = True
    weights: Scheme = WEIGHTS
    activations: Scheme = ACTIVATIONS

    def __post_init__(self) -> None:
        for number in (*self.grid, *([] if self.alpha == "search" else [self.alpha])):
            if not 0 <= number <= 1:
                raise RecipeError(f'smoothquant: alpha is a number from 0 to 1, or "search"; not {number!r}')
        W8A8(self.weights, self.activations)

    def run(self, graph: Graph, ctx: Context) -> None:
        names: dict[Op, str] = {}
        groups = find_groups(self._linears(graph, ctx, names))
        if not groups:
            ctx.notes.append("smoothquant: there is no linear layer to smooth")
            return
        calibration = ctx.need_calibration("smoothquant")
        if not calibration.measured:  # planning: how far to smooth depends on the data, and no kernel on how far
            return
        known = self._observe(graph, groups, calibration)
        taps = {lin.result.name: group for group in groups for lin in group.linears}
        before = sample(calibration, graph, [*taps, *_float_outputs(graph)])
        done = Done()
        for group in reversed(groups):  # what is folded into a linear's rows is there when its own columns are weighed
            label = ", ".join(names[lin.op] for lin in group.linears)
            try:
                self._smooth(group, known[group], done)
            except Declined as e:
                done.refused[label] = e.reason.message
                ctx.refusals.append(Refusal("smoothquant", group.linears[0].op.label, label, e.reason))
        if done.smoothed:
            after = sample(calibration, graph, list(before))
            prove(before, after, done, {name: _label(g, names) for name, g in taps.items()})
        ctx.notes.append(done.note())

    # -- which -------------------------------------------------------------------------------------------------

    def _linears(self, graph: Graph, ctx: Context, names: dict[Op, str]) -> list[LinearView]:
        """The linears to smooth, their names noted; the others are refused with the reason. RecipeError for a glob
        in vain."""
        found: list[LinearView] = []
        for op in graph.walk():
            if op.name not in LINEAR_OPS:
                continue
            try:
                lin = as_linear(op)
            except Declined:
                continue  # insert-qdq names it, with this reason
            names[op] = site_name(op, lin.weight)
            if op.graph is graph and lin.x.graph is graph:
                found.append(lin)
            else:
                _refuse(ctx, op, names[op], "it is inside a region, whose activations cannot be watched")
        for key, globs in () if ctx.partial else (("match", self.match), ("skip", self.skip)):
            for glob in globs:
                if glob != "*" and not any(matches(n, [glob]) for n in names.values()):
                    has = ", ".join(list(names.values())[:6]) or "none"
                    raise RecipeError(f"QC402: smoothquant.{key} = {glob!r} matched nothing; linears are: {has}")
        wanted = [lin for lin in found if matches(names[lin.op], self.match) and not matches(names[lin.op], self.skip)]
        return self._rescalable(wanted, ctx, names)

    @staticmethod
    def _rescalable(wanted: list[LinearView], ctx: Context, names: Mapping[Op, str]) -> list[LinearView]:
        """Those whose weight nothing else reads: a weight belongs to the linears of one group, or is left alone."""
        kept = list(wanted)
        while True:  # a linear that is refused is one more reader that its group does not reach
            members = {lin.op: {other.op for other in g.linears} for g in find_groups(kept) for lin in g.linears}
            reasons = {lin.op: why_not_rescaled(lin, members[lin.op]) for lin in kept}
            if not any(reasons.values()):
                return kept
            for op, reason in reasons.items():
                if reason is not None:
                    _refuse(ctx, op, names[op], reason)
            kept = [lin for lin in kept if reasons[lin.op] is None]

    # -- how far -----------------------------------------------------------------------------------------------

    @staticmethod
    def _observe(graph: Graph, groups: Sequence[Group], calibration: Calibration) -> dict[Group, HeldBack]:
        """What passed the input of each group, in one run of all the data."""
        known = {group: HeldBack(ROWS) for group in groups}
        calibration.observe(graph, {group.inputs[0].name: [rows] for group, rows in known.items()})
        return known

    def _smooth(self, group: Group, known: HeldBack, done: Done) -> None:
        """Rescale one group; raises Declined with the reason, the graph untouched."""
        if not known.seen:
            raise Declined(f"no calibration data reached its input {group.inputs[0]!r}")
        edits: list[Edit] = []
        reason = ""
        try:
            edits = fold(group)
        except Declined as e:
            reason = e.reason.message
            if not self.explicit:
                raise Declined(Reason("", f"{reason}; smoothquant.explicit allows a q.scale")) from None
        choice = self._choose(group, Activation(*known.parts()))
        if choice.alpha is None:
            done.unmoved.append(group)
            return
        if not edits and self.alpha == "search" and not choice.error <= GAIN * choice.error_of(None):
            less = 1 - choice.error / choice.error_of(None)
            raise Declined(f"{reason}; a q.scale would take {less:.1%} off its error, under the {1 - GAIN:.0%} it must")
        rescale_inputs(group, choice.factors)
        if edits:
            for op in apply_edits(edits, choice.factors):
                done.divided.update({r.name: choice.factors for r in op.results[:1]})
        else:
            insert_scale(group, choice.factors)
            done.explicit += 1
        done.smoothed[group] = choice

    def _choose(self, group: Group, known: Activation) -> Choice:
        columns = np.zeros(group.k)
        for lin in group.weights:
            assert lin.weight.payload is not None
            columns = np.maximum(columns, column_absmax(lin.weight.payload, lin.axis))
        if not np.isfinite(columns).all():
            raise Declined("its weights hold NaN or infinity")
        if self.alpha != "search":
            return Choice(
                self.alpha, smoothing_factors(magnitudes(known.absmax), columns, self.alpha), float("nan"), ()
            )
        loads = [lambda lin=lin: matrix(lin) for lin in group.weights]
        return search_alpha(known, loads, columns, W8A8(self.weights, self.activations), self.grid)


def matrix(lin: LinearView) -> Array:
    """The weight of a linear as it is now, ``[N, K]``."""
    assert lin.weight.payload is not None
    values = lin.weight.payload.array()
    lin.weight.payload.release()
    return values if lin.transposed else np.ascontiguousarray(values.T)


class Done:
    """What became of the groups. ``divided`` are the values that come out divided, with their factors."""

    def __init__(self) -> None:
        self.smoothed: dict[Group, Choice] = {}
        self.unmoved: list[Group] = []
        self.refused: dict[str, str] = {}
        self.divided: dict[str, Array] = {}
        self.explicit = 0

    def note(self) -> str:
        """One line for the report."""
        total = len(self.smoothed) + len(self.unmoved) + len(self.refused)
        alphas = [c.alpha for c in self.smoothed.values() if c.alpha is not None]
        text = f"smoothquant: {len(alphas)} of {total} groups of linears smoothed"
        if alphas:
            text += f", alpha {min(alphas):g} to {max(alphas):g}, {self.explicit} by a q.scale"
        if self.unmoved:
            text += f"; {len(self.unmoved)} are best as they are"
        if self.refused:
            name, reason = next(iter(self.refused.items()))
            text += f"; {len(self.refused)} left alone, the first: {name}: {reason}"
        return text


def _label(group: Group, names: Mapping[Op, str]) -> str:
    return ", ".join(names[lin.op] for lin in group.linears)


def _refuse(ctx: Context, op: Op, site: str, reason: str) -> None:
    ctx.refusals.append(Refusal("smoothquant", op.label, site, Reason("", reason)))


def _float_outputs(graph: Graph) -> list[str]:
    return [v.name for v in graph.outputs if v.tensor.dtype is not None and v.tensor.dtype.is_float]


# -- the proof ---------------------------------------------------------------------------------------------------


def sample(calibration: Calibration, graph: Graph, names: Sequence[str]) -> dict[str, Array]:
    """Some rows of each named value on the first samples of the data, float64 ``[R, K]``."""
    kept: dict[str, list[Array]] = {name: [] for name in names}
    for found in calibration.outputs(graph, names, SAMPLES):
        for name, parts in kept.items():
            x = np.asarray(found[name])
            rows = x.reshape(-1, x.shape[-1]) if x.ndim and x.size else x.reshape(-1, 1)
            at = np.unique(np.linspace(0, max(len(rows) - 1, 0), SAMPLE_ROWS).astype(int))
            parts.append(rows[at].astype(np.float64) if len(rows) else rows.astype(np.float64))
    return {
        name: np.concatenate(parts) for name, parts in kept.items() if parts and len({p.shape[1] for p in parts}) == 1
    }


def difference(before: Array, after: Array) -> float:
    """The largest difference over the largest magnitude, where both are finite; infinite where only one is."""
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(after)):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(before[finite]).max())
    apart = float(np.abs(before[finite] - after[finite]).max())
    return apart / largest if largest > 0 else (0.0 if apart == 0 else float("inf"))


def prove(before: Mapping[str, Array], after: Mapping[str, Array], done: Done, labels: Mapping[str, str]) -> None:
    """Raise Error naming the first group whose results are not what they were, but for what divides them."""
    for name, want in before.items():
        got = after[name] * done.divided[name].astype(np.float64) if name in done.divided else after[name]
        apart = difference(want, got)
        if apart <= TOLERANCE:
            continue
        who = f"the group of {labels[name]}" if name in labels else f"the output '{name}'"
        raise Error(
            f"smoothquant: rescaling changed {who}: %{name} differs by {apart:.2g} of its largest value on calibration "
            f"samples, and float rounding alone stays under {TOLERANCE:g}; is the model random, or does it overflow? "
            "Leave these layers out with smoothquant.skip"
        )
