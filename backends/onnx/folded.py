"""Weights that were in few bits and are float again: folded by the runtime, or by a tool that wrote the file."""

from __future__ import annotations

import math

import numpy as np

from qcompiler.backends.onnx.values import stored
from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import Payload
from qcompiler.verify.findings import Finding
from qcompiler.verify.flow import describe
from qcompiler.verify.op_kinds import LOOKUPS, base_name, is_dequantize, is_product
from qcompiler.verify.static import FIX_WEIGHT, find_spelled_out

SMALL = 4096
"""Elements below which a weight is not looked at."""
RUN = 32
"""Values along K that are looked at together: the smallest group with which weights are quantized."""
LEVELS = 255
MANY = 8
"""Fewer different values in a run than this say nothing (masks, ternary and one-hot weights)."""


def check_folded(source: Graph, final: Graph) -> list[Finding]:
    """QC103: constants of ``final`` that ``source`` computes from codes, and float weights that lie on a low-bit grid.

    What ``source`` computes by casts and arithmetic is reported even when ``final`` is ``source`` itself.
    """
    out = find_spelled_out(source)
    named = " ".join(f.message for f in out)
    for op in source.walk():
        if not is_product(op) and op.name not in LOOKUPS:
            continue
        for value in op.operands:
            if value is None:
                continue
            now = None if f"'{op.label}'" in named else final.local(value.name)
            if value.owner is not None and now is not None and now.is_const and (origin := _codes_behind(value)):
                message = f"{describe(origin)}, becomes a float weight of {base_name(op)} '{op.label}'"
                reason = f"the runtime folds '{value.name}' when it loads the model: {4 * _size(now)} bytes in memory"
                out.append(Finding("QC103", value.owner.label, message, reason, FIX_WEIGHT))
            elif value.is_const and (levels := on_grid(value, op)):
                message = f"the float weight '{value.name}' of {base_name(op)} '{op.label}' holds dequantized codes"
                reason = f"runs of {RUN} values or more lie on even grids of at most {levels} steps"
                out.append(
                    Finding("QC103", op.label, message, reason, "keep the codes: fold no dequantize of a weight")
                )
    return out


def _size(value: Value) -> int:
    return value.payload.size if value.payload is not None else 0


def _codes_behind(value: Value) -> Value | None:
    """The matrix of codes of 8 bits or less from which ``value`` is computed, if there is one."""
    work, seen = [value], {value}
    while work:
        at = work.pop()
        element = at.tensor.dtype
        if (
            at.is_const
            and element is not None
            and element.is_integer
            and element.bits <= 8
            and (at.tensor.rank or 0) > 1
        ):
            return at
        if at.owner is None or len(seen) > 256 or (is_dequantize(at.owner) and at.is_output):
            continue
        for operand in at.owner.operands:
            if operand is not None and operand not in seen:
                seen.add(operand)
                work.append(operand)
    return None


def on_grid(value: Value, op: Op) -> int:
    """Steps of the widest run of values when every run lies on an even grid of its own; 0 when they do not."""
    payload = stored(value)
    if payload is None or payload.dtype.name not in ("f32", "f16") or len(payload.shape) != 2 or payload.size < SMALL:
        return 0
    if min(payload.shape) < 64:
        return 0
    return max(_grid_of(runs, payload) for runs in _samples(payload))


def _samples(payload: Payload) -> list[list[Array]]:
    """A few runs along the second axis, and a few along the first: K may be either."""
    head = payload.rows(0, 4 * RUN).astype(np.float64)
    k = min(512, payload.shape[1])
    rows = [head[i] for i in range(0, min(len(head), 4 * RUN), RUN // 2)]
    columns = [head[:, j] for j in range(0, payload.shape[1], max(1, payload.shape[1] // 8))]
    return [
        [r[:RUN] for r in rows],
        [r[:k] for r in rows],
        [c[:RUN] for c in columns],
        columns,
    ]


def _grid_of(runs: list[Array], payload: Payload) -> int:
    """The most steps among ``runs``; 0 when one lies on no grid, or all on one of round numbers."""
    slack = 0.01 if payload.dtype.name == "f32" else 0.1
    steps, widest = [], 0
    for run in runs:
        levels = np.unique(run)
        gaps = np.diff(levels)
        gaps = gaps[gaps > 1e-3 * gaps.max(initial=0.0)]
        if len(levels) < MANY or gaps.size == 0:
            return 0
        step = float(gaps.min())
        counts = (levels - levels[0]) / step
        if counts[-1] > LEVELS or np.abs(counts - np.round(counts)).max() > slack * max(1.0, counts[-1] / 16):
            return 0
        steps.append(step)
        widest = max(widest, round(float(counts[-1])))
    return 0 if _round(steps) else widest + 1


def _round(steps: list[float]) -> bool:
    """Whether all steps are one round number (1, 0.5, 0.01): somebody wrote such a weight by hand."""
    if max(steps) > 1.001 * min(steps):
        return False
    thousands = steps[0] * 1000
    return math.frexp(steps[0])[0] == 0.5 or (thousands >= 1 and abs(thousands - round(thousands)) < 1e-3)
