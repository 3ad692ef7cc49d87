"""Element-wise ops and pools on codes, each run alone on random codes and held against float64.

They hold no weight, so they are no sites; but a wrong one is wrong for good. A code may be half a step from the real
value, and the roundings of float32 more; of a softmax, whose exponentials come from a table, one step more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompiler.backends.onnx.attributes import attribute_proto
from qcompiler.backends.onnx.extract import NAME
from qcompiler.backends.onnx.load import opset_of
from qcompiler.backends.onnx.nodes import MS
from qcompiler.backends.onnx.probe import read_arrays, write_arrays
from qcompiler.backends.onnx.tensors import tensor_proto
from qcompiler.backends.onnx.values import stored
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.dtypes import Array
from qcompiler.integer_numerics import call
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ArrayPayload
from qcompiler.verify.evidence import NodeEvidence
from qcompiler.verify.findings import Finding

FUNCTIONS = {
    MS + f"QLinear{fn}": fn
    for fn in ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool")
}
"""Op -> the function that it computes on dequantized codes."""
OPEN, LARGEST = 3, 24
"""What an open dimension is probed with, and how large a dimension of inputs is at most."""
SLACK = 1e-3
"""Of a step: what roundings of float32 make of 8-bit codes, many times over (256 steps times 2^-24 each)."""

LOGISTIC = 2e-6
"""How far the runtime's float32 approximation of the logistic function may be off (measured: up to 3e-7)."""


@dataclass(frozen=True)
class _Parts:
    """Codes, scale, zero of each operand, then of the result: places among the operands of the op."""

    given: tuple[tuple[int, int, int], ...]
    result: tuple[int, int]


def _parts(op: Op) -> _Parts:
    count = len(op.operands)
    if op.name == MS + "QLinearConcat":
        return _Parts(tuple((i, i + 1, i + 2) for i in range(2, count, 3)), (0, 1))
    given = ((0, 1, 2), (3, 4, 5)) if op.name in (MS + "QLinearAdd", MS + "QLinearMul") else ((0, 1, 2),)
    return _Parts(given, (3 * len(given), 3 * len(given) + 1))


def _constant(op: Op, place: int) -> Array | None:
    payload = stored(op.operand(place))
    return None if payload is None or payload.size != 1 else payload.array().reshape(())


class PointwiseProber:
    """Runs ops alone, one of each kind, and remembers what was wrong with them."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder
        self.known: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def check(self, graph: Graph, names: Mapping[Op, str]) -> tuple[list[NodeEvidence], list[Finding]]:
        """Evidence of every such op of ``graph``, and QC303 for each that computes something else."""
        seen, found = [], []
        for op in graph.walk():
            if op.name not in FUNCTIONS or (facts := self.measure(op)) is None:
                continue
            name, short = names.get(op, op.label), op.name.rpartition(".")[2]
            verdict = "fused" if facts["steps_off"] <= facts["steps_allowed"] else "wrong"
            seen.append(NodeEvidence(name, short, verdict, f"ort-cpu/{short}", "", facts))  # type: ignore[arg-type]
            if verdict == "wrong":
                reason = f"measured: {facts['steps_off']:.3g} steps off, {facts['steps_allowed']:.3g} are right"
                fix = "leave this op in float, or give its result another scale"
                found.append(Finding("QC303", name, f"{short} '{name}' computes wrong codes", reason, fix))
        return seen, found

    def measure(self, op: Op) -> dict[str, Any] | None:
        """How many steps of its result's scale ``op`` is off; None where it cannot be run alone."""
        key = (op.name, str(sorted((k, str(v)) for k, v in op.attrs.items())), *(_described(v) for v in op.operands))
        if key not in self.known:
            self.known[key] = self._run(op)
        return self.known[key]

    def _run(self, op: Op) -> dict[str, Any] | None:
        parts, rng = _parts(op), np.random.default_rng(0)
        scale, zero = _constant(op, parts.result[0]), _constant(op, parts.result[1])
        inputs = _made_up(op, parts, rng)
        if inputs is None or scale is None or zero is None:
            return None
        real = _real(op, parts, inputs)
        result = None if real is None else self._result(op, inputs)
        if real is None or result is None or result.shape != real.shape:
            return None
        info = np.iinfo(result.dtype)
        wanted = np.clip(real / float(scale) + float(zero), info.min, info.max)
        off = float(np.abs(result.astype(np.float64) - wanted).max(initial=0.0))
        allowed = 0.5 + SLACK + (1.0 if op.name.endswith("Softmax") else 0.0)
        if op.name.endswith("Sigmoid"):
            allowed += LOGISTIC / float(scale)
        return {"steps_off": round(off, 6), "steps_allowed": allowed, "elements": int(result.size)}

    def _result(self, op: Op, inputs: Mapping[int, Array]) -> Array | None:
        """What the runtime computes."""
        short, number = op.name.rpartition(".")[2], len(self.known)
        path = self.folder / f"pointwise{number}.onnx"
        onnx.save(_model(op, short, inputs), path)
        arrays, out = str(path.with_suffix(".npz")), self.folder / f"pointwise{number}"
        out.mkdir()
        fed = {f"i{place}": a for place, a in inputs.items() if stored(op.operand(place)) is None}
        write_arrays(arrays, list(fed.values()))
        try:
            job = {"model": str(path), "feeds": [{"names": list(fed), "arrays": arrays}], "outputs": str(out)}
            answer = self.worker.ask(job)
        except ProbeDied:
            return None
        finally:
            path.unlink()
        run: dict[str, Any] = answer["runs"][0] if answer["runs"] else {"ok": False}
        return read_arrays(run["arrays"])[0] if run["ok"] else None


def _described(value: Value | None) -> tuple[Any, ...]:
    """What tells a value of one configuration from another: for parameters their numbers too."""
    if value is None:
        return ()
    payload = stored(value)
    small = payload is not None and payload.size == 1
    return (value.tensor.dtype, value.tensor.shape, value.is_const, payload.array().item() if small else None)  # type: ignore[union-attr]


def _made_up(op: Op, parts: _Parts, rng: np.random.Generator) -> dict[int, Array] | None:
    """Codes for each operand that has some: those of constants as they are, else random ones of a moderate size."""
    places = [place for place, _, _ in parts.given]
    fixed = any(stored(op.operand(place)) is not None for place in places)
    largest = max([LARGEST, *(4 * int(k) for k in op.attrs.get("kernel_shape") or ())])
    out: dict[int, Array] = {}
    for place, _, zero_at in parts.given:
        value, zero = op.operand(place), op.operand(zero_at)
        payload = stored(value)
        if payload is not None:
            out[place] = payload.array()
            continue
        element = (None if value is None else value.tensor.dtype) or (None if zero is None else zero.tensor.dtype)
        shape = _shape(op, places)[place]
        if element is None or shape is None or (fixed and value is not None and value.tensor.shape is None):
            return None
        last = shape[-1:]
        if not fixed:
            shape = tuple(min(d, largest) for d in shape)
        if op.name.endswith("Softmax"):
            shape = (*shape[:-1], *last)
        if math.prod(shape) > 1 << 22:
            return None
        info = np.iinfo(element.storage)
        out[place] = rng.integers(info.min, info.max + 1, shape).astype(element.storage)
    return out


def _shape(op: Op, places: Sequence[int]) -> dict[int, tuple[int, ...] | None]:
    """The shape of each operand of codes; where one is not known, one for all that the op takes, if it takes any."""
    shapes = {p: None if (v := op.operand(p)) is None else v.tensor.shape for p in places}
    if all(s is not None for s in shapes.values()):
        return {p: tuple(d if isinstance(d, int) else OPEN for d in s or ()) for p, s in shapes.items()}
    fn = FUNCTIONS[op.name]
    if fn == "Softmax":
        length = _length(op.operand(places[0]))  # it decides whether the kernel is right
        return dict.fromkeys(places, None if length is None else (OPEN, length))
    axes = len(op.attrs.get("kernel_shape") or (1, 1))
    if fn == "Concat":
        axes = max(2, int(op.attrs.get("axis", 0)) - 1)
    return dict.fromkeys(places, (2, 5, *[LARGEST] * axes))


def _length(value: Value | None) -> int | None:
    """The size of the last axis, read off a reshape where no type tells it: types end at ops that ONNX has not."""
    for _ in range(8):
        if value is None or value.tensor.shape is not None:
            break
        op = value.owner
        if op is not None and op.name == "onnx.Reshape" and (shape := stored(op.operand(1))) is not None:
            last = int(shape.array().reshape(-1)[-1])
            return last if last > 0 else None
        value = op.operand(0) if op is not None and op.name in FUNCTIONS else None
    last_dim = None if value is None or not value.tensor.shape else value.tensor.shape[-1]
    return last_dim if isinstance(last_dim, int) else None


def _real(op: Op, parts: _Parts, inputs: Mapping[int, Array]) -> Array | None:
    """The function of the dequantized codes, float64."""
    xs = []
    for place, scale_at, zero_at in parts.given:
        scale, zero = _constant(op, scale_at), _constant(op, zero_at)
        if scale is None or (zero is None and op.operand(zero_at) is not None):
            return None
        xs.append((inputs[place].astype(np.float64) - (0.0 if zero is None else float(zero))) * float(scale))
    fn, attrs = FUNCTIONS[op.name], dict(op.attrs)
    if fn == "Softmax" and attrs.get("axis", -1) not in (-1, xs[0].ndim - 1):
        return None
    last = bool(attrs.get("channels_last", 0))
    xs = [np.moveaxis(x, -1, 1) for x in xs] if last else xs
    try:
        real: Array = call(fn, xs, attrs)
    except (ValueError, KeyError):
        return None  # sizes that were made up do not fit each other
    return np.moveaxis(real, 1, -1) if last else real


def _model(op: Op, short: str, inputs: Mapping[int, Array]) -> onnx.ModelProto:
    """A model of the op alone; what is constant in the graph is constant here."""
    names, given, tensors = [], [], []
    for i, value in enumerate(op.operands):
        if value is None:
            names.append("")
            continue
        names.append(f"i{i}")
        payload = stored(value)
        if payload is not None:
            tensors.append(tensor_proto(f"i{i}", ArrayPayload(np.array(payload.array(), order="C"), payload.dtype)))
        else:
            kind = helper.np_dtype_to_tensor_dtype(inputs[i].dtype)
            given.append(helper.make_tensor_value_info(f"i{i}", kind, list(inputs[i].shape)))
    proto = helper.make_node(short, names, ["y"], NAME, domain="com.microsoft")
    proto.attribute.extend(attribute_proto(k, v, NAME) for k, v in op.attrs.items())
    graph = helper.make_graph([proto], "alone", given, [helper.make_empty_tensor_value_info("y")], tensors)
    opsets: Sequence[Any] = [
        helper.make_opsetid("", max(opset_of(op.graph), 13)),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10 if opsets[0].version < 25 else 13)
