"""Run each distinct low-bit node alone: does its kernel expand the weight, and are its numbers right?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler.backends.onnx.extract import NAME, Alone, cut_out
from qcompiler.backends.onnx.nodes import MS, LowBit
from qcompiler.backends.onnx.probe import read_arrays, write_arrays
from qcompiler.backends.onnx.reference import expected
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.dtypes import Array
from qcompiler.payload import Payload
from qcompiler.verify.evidence import Verdict

MANY = 17
"""Rows that stand for a prefill: the CPU kernels take one path for M=1 and another for all M above."""


def probed_rows(m: int) -> int:
    """How many rows a phase of ``m`` rows is probed with."""
    return min(m, MANY)


@dataclass(frozen=True)
class Measured:
    """What one node did with ``m`` rows."""

    verdict: Verdict
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def configuration(node: LowBit) -> tuple[Any, ...]:
    """Nodes that are alike here take the same kernel: type, attributes, shapes and which operands are constant."""
    operands = tuple(
        None if v is None else (v.is_const, v.is_input, v.payload is not None, v.tensor.dtype, v.tensor.static_shape)
        for v in (node.op.operands[i] if i != node.places.x else None for i in range(len(node.op.operands)))
    )
    attrs = tuple(sorted((k, str(v)) for k, v in node.op.attrs.items() if not isinstance(v, Payload)))
    return node.op.name, attrs, operands, node.activation


class Prober:
    """Runs nodes alone, one of each configuration, and remembers what they did."""

    def __init__(self, worker: Worker, folder: Path, session: Mapping[str, str] | None = None) -> None:
        self.worker, self.folder, self.session = worker, folder, dict(session or {})
        self.known: dict[tuple[Any, ...], Measured | None] = {}
        self.count = 0

    def measure(self, node: LowBit, m: int) -> Measured | None:
        """What ``node`` does with ``m`` rows; None where it cannot be run alone."""
        key = (configuration(node), m)
        if key not in self.known:
            alone = cut_out(node, m)
            self.known[key] = None if alone is None else self._run(alone)
        return self.known[key]

    def _run(self, alone: Alone) -> Measured:
        self.count += 1
        path = self.folder / f"alone{self.count}.onnx"
        arrays = str(path.with_suffix(".npz"))
        onnx.save(alone.model, path)
        write_arrays(arrays, list(alone.feed.values()))
        out = self.folder / f"alone{self.count}"
        out.mkdir()
        feed = {"names": list(alone.feed), "arrays": arrays}
        job = {"model": str(path), "feeds": [feed], "outputs": str(out), "session": self.session, "profile": True}
        try:
            answer = self.worker.ask(job)
        except ProbeDied as e:
            return Measured("error", {"m": alone.m}, str(e))
        finally:
            path.unlink()
        run = answer["runs"][0] if answer["runs"] else {"ok": False, "error": answer["error"]}
        if not run["ok"]:
            return Measured("error", {"m": alone.m}, run["error"])
        inputs = [i for i, _ in answer["executed"].get(NAME, {}).get("inputs", [])]
        return judge_run(alone, run, read_arrays(run["arrays"])[0], packed="uint8" not in inputs)


def judge_run(alone: Alone, run: Mapping[str, Any], result: Array, *, packed: bool) -> Measured:
    """The verdict on one run: numbers first, then what the kernel allocated. ``packed``: it saw no codes."""
    node, whole = alone.node, 4 * alone.n * alone.node.k
    temp = int(run["memory"].get(NAME, 0))
    facts: dict[str, Any] = {"m": alone.m, "temp_bytes": temp, "expanded_bytes": whole}
    if node.op.name == MS + "MatMulNBits":
        facts |= {"fallback_lines": run["unpacked"], "weight_packed": packed}
    if alone.n < node.n:
        facts["rows_probed"] = alone.n
    if alone.made_up:
        facts["weight_made_up"] = True
    with np.errstate(invalid="ignore", over="ignore"):  # a weight may hold infinities
        wanted = expected(node, alone.operands, alone.n)
    verdict: Verdict = "fused"
    if run["unpacked"] or (temp >= whole and temp > _activations(alone, result)):
        verdict = "dequant"
    if wanted is not None and not _within(wanted.value, wanted.bound, result, facts):
        verdict = "wrong"
    return Measured(verdict, facts)


def _activations(alone: Alone, result: Array) -> int:
    """Bytes that copies of the activation may take: int8 or f32, with its block scales, aligned.

    A convolution has one for each window, of every group, and sums and results in two orders.
    """
    if alone.node.kind == "conv":
        windows = result.size // max(1, alone.n) * alone.node.k * alone.node.attr("group", 1)
        return 2 * windows + 8 * result.size + 16384
    return alone.m * alone.node.k * 8 + 4096


def _within(value: Array, bound: Array, result: Array, facts: dict[str, Any]) -> bool:
    if result.size != value.size:
        facts["result_shape"] = list(result.shape)
        return False
    off = np.abs(result.astype(np.float64).reshape(value.shape) - value)
    scale = float(np.abs(value).max(initial=0.0)) or 1.0
    facts["relative_error"] = _finite(float(off.max(initial=0.0)) / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(off == 0, 0.0, off / bound)
    facts["share_of_bound"] = _finite(float(ratio.max(initial=0.0)))
    return bool(np.all(ratio <= 1.0))


def _finite(x: float) -> float:
    """JSON has no infinity."""
    return round(x, 6) if math.isfinite(x) else 1e300


def distinct(nodes: Iterable[LowBit]) -> dict[tuple[Any, ...], list[LowBit]]:
    """Nodes by configuration."""
    out: dict[tuple[Any, ...], list[LowBit]] = {}
    for node in nodes:
        out.setdefault(configuration(node), []).append(node)
    return out
