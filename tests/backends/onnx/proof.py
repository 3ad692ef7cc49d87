"""Small quantized graphs, what they should compute in float64, and what ONNX Runtime did when it ran them."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.kernels import target
from qcompiler.dtypes import F32, INT64, Array, DType, dtype_of
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.payload import ArrayPayload, constant
from qcompiler.pipeline import Context
from qcompiler.scheme import Scheme, parse_scheme
from qcompiler.spec import check

FALLBACK = "Falling back to using unpacked compute mode"
"""What the runtime logs on each call of a MatMulNBits that expands its weight."""


@dataclass(frozen=True)
class Table:
    """A random quantized matrix: canonical codes ``[N, K]``, scales and zeros ``[N, G]``, and its values."""

    scheme: Scheme
    codes: Array
    scale: Array
    zero: Array | None

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        return int(self.codes.shape[1])

    def over(self, values: Array) -> NDArray[np.float64]:
        """Scales or zeros, one a code."""
        width = self.scheme.group_size or self.k
        wide = np.repeat(values.astype(np.float64), width, axis=1)[:, : self.k]
        return np.broadcast_to(wide, self.codes.shape)

    @functools.cached_property
    def values(self) -> NDArray[np.float64]:
        zero = 0.0 if self.zero is None else self.over(self.zero)
        return (self.codes.astype(np.float64) - zero) * self.over(self.scale)

    @functools.cached_property
    def stored_magnitude(self) -> NDArray[np.float64]:
        """What a kernel sums that adds codes and zero points, both unsigned, apart from each other."""
        shift = 1 << (self.scheme.bits - 1) if self.scheme.dtype.signed else 0
        zero = 0.0 if self.zero is None else self.over(self.zero)
        return (self.codes.astype(np.float64) + shift + zero + shift) * self.over(self.scale)


def table(text: str, n: int, k: int, element: DType = F32, seed: int = 0) -> Table:
    """A table under the scheme ``text`` whose values are of the order of 1; some zero points lie at the ends."""
    rng = np.random.default_rng([seed, n, k])
    scheme = parse_scheme(text).with_axis(1)
    d = scheme.dtype
    shape = (1, 1) if scheme.granularity == "tensor" else (n, scheme.groups(k))
    scale = (rng.uniform(0.5, 1.5, shape) * 2.0 / (1 << d.bits)).astype(element.storage)
    zero = None if scheme.symmetric else rng.integers(d.qmin, d.qmax + 1, shape).astype(d.storage)
    return Table(scheme, rng.integers(d.qmin, d.qmax + 1, (n, k)).astype(d.storage), scale, zero)


def operands(graph: Graph, t: Table) -> list[Any]:
    parameters = [graph.add_const("codes", ArrayPayload(t.codes, t.scheme.dtype))]
    parameters.append(graph.add_const("scale", constant(t.scale)))
    if t.zero is not None:
        parameters.append(graph.add_const("zero", ArrayPayload(t.zero, t.scheme.dtype)))
    return parameters


def add_linear(graph: Graph, t: Table, parameters: list[Any], lead: Sequence[Any], bias: Array | None = None) -> Op:
    """``q.linear`` at site ``head`` on a new input ``x`` of shape ``[*lead, K]``."""
    x = graph.add_input("x", TensorType(dtype_of(t.scale.dtype), (*lead, t.k)))
    operands = [x, *parameters]
    if bias is not None:
        operands += [None] * (4 - len(operands)) + [graph.add_const("bias", constant(bias))]
    attrs = {"scheme": t.scheme, "site": "head"}
    made = graph.create("q.linear", operands, attrs, [("y", TensorType(x.tensor.dtype, (*lead, t.n)))])
    graph.add_output(made.result)
    return made


def add_embedding(graph: Graph, t: Table, parameters: list[Any], lead: Sequence[Any], indices: DType = INT64) -> Op:
    """``q.embedding`` at site ``embed`` on a new input ``i`` of shape ``lead``."""
    i = graph.add_input("i", TensorType(indices, tuple(lead)))
    element = dtype_of(t.scale.dtype)
    attrs = {"scheme": t.scheme, "site": "embed"}
    result = ("e", TensorType(element, (*lead, t.k)))
    made = graph.create("q.embedding", [i, *parameters], attrs, [result])
    graph.add_output(made.result)
    return made


def linear(t: Table, lead: Sequence[Any] = ("m",), bias: Array | None = None) -> Graph:
    graph = Graph()
    add_linear(graph, t, operands(graph, t), lead, bias)
    check(graph)
    return graph


def embedding(t: Table, lead: Sequence[Any] = ("b", "s"), indices: DType = INT64) -> Graph:
    graph = Graph()
    add_embedding(graph, t, operands(graph, t), lead, indices)
    check(graph)
    return graph


def tied(t: Table, lead: Sequence[Any] = ("b", "s"), *, head_first: bool = False) -> Graph:
    """One table read by an embedding and by a linear layer."""
    graph = Graph()
    parameters = operands(graph, t)
    if head_first:
        add_linear(graph, t, parameters, ("m",))
    add_embedding(graph, t, parameters, lead)
    if not head_first:
        add_linear(graph, t, parameters, ("m",))
    check(graph)
    return graph


def lower(graph: Graph, spec: str = "ort-cpu:avx2", kernel: str = "") -> Graph:
    """``graph`` after choose-layout for ``spec``, checked."""
    from qcompiler.passes.choose_layout import ChooseLayout

    ChooseLayout(kernel=kernel).run(graph, Context(target=target(spec)))
    check(graph)
    return graph


@dataclass
class Seen:
    """``outputs[i]`` and ``temp[i]`` (node -> bytes of temporary memory so far) of the i-th run, and fallback lines."""

    outputs: list[list[Array]] = field(default_factory=list)
    temp: list[dict[str, int]] = field(default_factory=list)
    fallbacks: int = 0


def run(graph: Graph, feeds: Sequence[dict[str, Array]]) -> Seen:
    """Run ``graph``, which must be lowered, on each of ``feeds``, and keep the runtime's own account of it."""
    seen = Seen()
    model = to_model(graph).SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        stats, log = Path(folder, "memory.csv"), Path(folder, "log")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 1
        options.add_session_config_entry("session.collect_node_memory_stats_to_file", str(stats))
        with open(log, "wb") as f:
            stderr = os.dup(2)
            os.dup2(f.fileno(), 2)
            try:
                session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                for feed in feeds:
                    seen.outputs.append(session.run(None, feed))
                    seen.temp.append(_temp(stats))
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
        seen.fallbacks = log.read_text(errors="replace").count(FALLBACK)
    return seen


def _temp(stats: Path) -> dict[str, int]:
    """Node name -> temporary bytes; the runtime appends ``_<hash>`` to a name and updates the file after each run."""
    out: dict[str, int] = {}
    for line in stats.read_text().splitlines()[1:]:
        name, *_, temp = line.rsplit(",", 4)
        out[name.rpartition("_")[0]] = int(temp)
    return out
