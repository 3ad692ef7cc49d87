"""The graph that AOTAutograd makes of dynamo's, as a graph of the ``aten`` dialect whose weights are constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.backends.torch import writes
from qcompiler.backends.torch.capture import BodyReader
from qcompiler.backends.torch.dims import name_symbols, symbolic
from qcompiler.backends.torch.jit.cache import WeightPayload
from qcompiler.backends.torch.jit.names import Held, Names
from qcompiler.ir import Graph, Loc, Value


@dataclass
class CapturedGraph:
    """A graph, the argument that each of its inputs is, and the argument that each of its weights is."""

    graph: Graph
    places: dict[Value, int]
    weights: dict[WeightPayload, int]

    @property
    def has_weights(self) -> bool:
        """True when something in it could be quantized."""
        return any(p.dtype.is_float and len(p.shape) > 1 for p in self.weights)


class _Reader(BodyReader):
    """Reads a body whose module stack is in dynamo's words."""

    def __init__(self, symbols: Mapping[str, str], names: Names) -> None:
        super().__init__(symbols)
        self.names = names

    def loc(self, node: fx.Node) -> Loc:
        found = super().loc(node)
        return Loc(found.name, self.names.scope(found.scope), found.source)


def arguments_of(module: fx.GraphModule) -> list[int | None]:
    """For each placeholder of AOT's graph the placeholder of dynamo's that it is; None for what AOT made up."""
    out: list[int | None] = []
    for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        description = node.meta.get("desc")
        if description is None:
            out.append(i)
        else:
            index = getattr(description, "idx", None)
            out.append(index if type(description).__name__ == "PlainAOTInput" and isinstance(index, int) else None)
    return out


def capture_graph(module: fx.GraphModule, names: Names) -> CapturedGraph:
    """The inference graph ``module`` of AOTAutograd; parameters and buffers that it does not write to are constants.

    ``names`` are of dynamo's placeholders. Raises InputError, in one sentence, for what cannot be carried.
    """
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [s for n in module.graph.nodes for s in symbolic(n.meta.get("val"))]
    reader = _Reader({str(s): name for s, name in name_symbols(sizes, {}).items()}, names)
    graph = Graph("main", "aten")
    written = writes.written_placeholders(module)
    captured = CapturedGraph(graph, {}, {})
    known: dict[int, Value] = {}
    for place, (node, source) in enumerate(zip(nodes, arguments_of(module), strict=True)):
        held = None if source is None else names.held.get(source)
        if held is None or node.name in written:
            called = held.name if held is not None else names.inputs.get(-1 if source is None else source, node.name)
            value = graph.add_input(graph.fresh(called), reader.type_of(node.meta.get("val")))
            if node.name in written:
                value.meta["written"] = True
            captured.places[value] = place
        else:
            tensor = held.tensor
            value = known.get(id(tensor)) or _weight(captured, held, tensor, place)
            known[id(tensor)] = value
        reader.env[node] = value
    graph.meta["returns"] = reader.body(module, graph)
    return captured


def _weight(captured: CapturedGraph, held: Held, tensor: torch.Tensor, place: int) -> Value:
    payload = WeightPayload(tensor, held.name)
    value = captured.graph.add_const(captured.graph.fresh(held.name), payload)
    value.meta["role"] = held.role
    captured.weights[payload] = place
    return value


def sizes_of(val: Any) -> Sequence[int]:
    """The sizes of an example value that are plain numbers and none of 0 and 1."""
    return [d for d in val.shape if type(d) is int and d > 1] if isinstance(val, torch.Tensor) else []
