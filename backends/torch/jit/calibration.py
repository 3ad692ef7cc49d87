"""Calibration data for a graph of torch.compile: its sizes are inputs of their own, which data does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qcompiler.backends.torch.backend import TorchBackend
from qcompiler.calibrate.data import Data, open_data
from qcompiler.dtypes import Array
from qcompiler.ir import Graph, OpaqueType, TensorType, Value
from qcompiler.subgraph import Run

_SYMBOLIC = "SymInt "


class TensorData(Data):
    """Data that is asked for tensors alone."""

    def batches(self, inputs: Sequence[Value]) -> Iterator[dict[str, Array]]:
        return super().batches([v for v in inputs if isinstance(v.type, TensorType)])


def data_of(given: Any) -> Data:
    """The data that the option ``calibration`` names, as :func:`qcompiler.calibrate.data.open_data` reads it."""
    return TensorData(open_data(given).source)


class SizingBackend(TorchBackend):
    """Runs graphs whose open sizes are inputs, which it reads from the shapes of the tensors that it is given."""

    @contextmanager
    def runner(self, graph: Graph, taps: Sequence[str]) -> Iterator[Run]:
        with super().runner(graph, taps) as run:

            def sized(given: Mapping[str, Array]) -> dict[str, Array]:
                return run({**_sizes(graph, given), **given})

            yield sized


def _sizes(graph: Graph, given: Mapping[str, Array]) -> dict[str, Array]:
    """The value of each input of ``graph`` that is an open size of a tensor in ``given``."""
    known: dict[str, int] = {}
    for value in graph.inputs:
        if value.name in given and isinstance(value.type, TensorType):
            sizes = zip(value.type.shape or (), np.shape(given[value.name]), strict=True)
            known |= {dim: size for dim, size in sizes if isinstance(dim, str)}
    out: dict[str, Array] = {}
    for value in graph.inputs:
        word = value.type.text.removeprefix(_SYMBOLIC) if isinstance(value.type, OpaqueType) else ""
        if word in known:
            out[value.name] = np.asarray(known[word])
    return out
