"""Small quantized aten graphs, run by torch after choose-layout. Tables are those of the ONNX proofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.payload import tensor_of
from qcompiler.dtypes import BF16, Array, DType
from qcompiler.ir import Graph
from qcompiler.payload import constant
from qcompiler.pipeline import Context
from qcompiler.spec import check
from tests.backends.onnx.proof import Table, add_embedding, add_linear, operands, table

__all__ = ["Table", "bf16_table", "embedding", "floats", "linear", "lower", "run", "table", "tied"]


def bf16_table(text: str, n: int, k: int, element: DType, seed: int = 0) -> Table:
    """:func:`table` with scales of at most 8 significant bits, as the quantizer makes them for 4-bit codes."""
    t = table(text, n, k, element, seed)
    return Table(t.scheme, t.codes, t.scale.astype(BF16.storage).astype(element.storage), t.zero)


def linear(t: Table, lead: Sequence[Any] = ("m",), bias: Array | None = None) -> Graph:
    graph = Graph("main", "aten")
    add_linear(graph, t, operands(graph, t), lead, bias)
    check(graph)
    return graph


def embedding(t: Table, lead: Sequence[Any] = ("b", "s")) -> Graph:
    graph = Graph("main", "aten")
    add_embedding(graph, t, operands(graph, t), lead)
    check(graph)
    return graph


def tied(t: Table, *, head_first: bool = False) -> Graph:
    """One table read by an embedding and by a linear layer."""
    graph = Graph("main", "aten")
    parameters = operands(graph, t)
    if head_first:
        add_linear(graph, t, parameters, ("m",))
    add_embedding(graph, t, parameters, ("b", "s"))
    if not head_first:
        add_linear(graph, t, parameters, ("m",))
    check(graph)
    return graph


def lower(graph: Graph, spec: str = "torch-cpu", kernel: str = "") -> Graph:
    """``graph`` after choose-layout for ``spec``, checked."""
    from qcompiler.passes.choose_layout import ChooseLayout

    ChooseLayout(kernel=kernel).run(graph, Context(target=target(spec)))
    check(graph)
    return graph


def run(graph: Graph, *inputs: Array) -> list[Array]:
    """What the lowered ``graph`` computes, in the element types of its outputs."""
    module = to_graph_module(graph)
    with torch.no_grad():
        out = module(*(tensor_of(constant(a)) for a in inputs))
    return [o.float().numpy() if o.is_floating_point() else o.numpy() for o in out]


def floats(a: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    return a.astype(np.float64)
