"""The integer cases of the ONNX backend as aten graphs, lowered for torch-cpu and run by torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.dtypes import F32, Array, DType, dtype_of
from qcompiler.ir import Graph, TensorType, Value
from qcompiler.payload import ArrayPayload
from qcompiler.spec import check
from tests.backends.onnx.integer import Case
from tests.backends.torch.proof import lower, run

ANY_CHIP = "torch-cpu:avx512vnni"
"""A chip that computes u8s8 exactly; the machine that runs the tests must be one."""


@dataclass
class Ran:
    """The lowered graph and its result, floats in f32."""

    graph: Graph
    result: Array


def aten(case: Case, open_axes: Sequence[int] = ()) -> Graph:
    """``case`` as a graph of the aten dialect; ``open_axes`` of its first operand have symbolic sizes."""
    graph, want = Graph("main", "aten"), case.wanted
    operands: list[Value | None] = []
    for i, array in enumerate(case.arrays):
        if array is None:
            operands.append(None)
        elif i in case.inputs:
            shape = tuple(f"d{a}" if i == 0 and a in open_axes else n for a, n in enumerate(array.shape))
            operands.append(graph.add_input(f"x{i}", TensorType(dtype_of(array.dtype), shape)))
        else:
            operands.append(graph.add_const(f"c{i}", ArrayPayload(np.array(array, order="C"), dtype_of(array.dtype))))
    while operands and operands[-1] is None:
        operands.pop()
    shape = None if open_axes else want.shape
    made = graph.create(case.name, operands, case.attrs, [("y", TensorType(dtype_of(want.dtype), shape))])
    graph.add_output(made.result)
    check(graph)
    return graph


def ran(case: Case, spec: str = ANY_CHIP, kernel: str = "") -> Ran:
    """``case`` lowered for ``spec`` and run."""
    graph = lower(aten(case), spec, kernel)
    feed = [a for i, a in enumerate(case.arrays) if i in case.inputs and a is not None]
    return Ran(graph, run(graph, *feed)[0])


def narrowed(case: Case, element: DType) -> Case:
    """``case`` with its floats in ``element``: activation, scales and bias."""
    if element is F32:
        return case
    arrays = [a if a is None or a.dtype != np.float32 else a.astype(element.storage) for a in case.arrays]
    return Case(case.name, arrays, case.attrs, case.inputs)
