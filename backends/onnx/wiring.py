"""The nodes of one ONNX graph and what connects them, read by onnx-graphsurgeon.

Graphsurgeon sees a skeleton: names, operators and wires, neither attributes nor types nor bytes, for it drops or
corrupts some of those (metadata, 4-bit constants, types that are no tensors). Each graph is shown to it alone: on
nested graphs its import is quadratic, and it does not keep an inner name apart from the outer one that it hides.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from qcompiler.backends.onnx.attributes import GRAPHS, attribute_type
from qcompiler.errors import InputError


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs among the attributes of ``node``."""
    found: list[onnx.GraphProto] = []
    for a in node.attribute:
        if attribute_type(a) in GRAPHS:
            found += a.graphs if a.graphs else [a.g]
    return found


def defined_names(graph: onnx.GraphProto) -> set[str]:
    """The names that ``graph`` itself gives to values."""
    names = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    names |= {s.values.name for s in graph.sparse_initializer}
    names.update(name for n in graph.node for name in n.output if name)
    return names


def captured_names(graph: onnx.GraphProto) -> set[str]:
    """The names that ``graph`` reads and does not define."""
    read = {name for n in graph.node for name in n.input if name} | {v.name for v in graph.output}
    for node in graph.node:
        for inner in subgraphs(node):
            read |= captured_names(inner)
    return read - defined_names(graph)


class Wiring:
    """Graphsurgeon's view of ``graph``: :attr:`order` holds (index, gs.Node) so that definitions precede uses.

    Raises InputError for a value with two definitions and for a cycle.
    """

    def __init__(self, graph: onnx.GraphProto, label: str) -> None:
        self._label = label
        self._proto = graph
        skeleton = onnx.ModelProto(ir_version=10, opset_import=[onnx.OperatorSetIdProto(version=17)])
        given = [v.name for v in graph.input]
        held = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
        for name in given:
            skeleton.graph.input.add(name=name)
        for name in held:
            skeleton.graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT)
        for n in graph.node:
            skeleton.graph.node.add(op_type=n.op_type, domain=n.domain, input=n.input, output=n.output)
        self.nodes: list[gs.Node] = gs.import_onnx(skeleton).nodes
        self._refuse_twice(given, "an input")
        self._refuse_twice(held, "an initializer")
        self._check_definitions(set(given) | set(held))
        self.order = self._sorted()

    def _refuse_twice(self, names: Iterable[str], what: str) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(f"{self._label}: '{name}' is {what} twice; give each value a name of its own")
            seen.add(name)

    def _check_definitions(self, held: set[str]) -> None:
        for node in self.nodes:
            for tensor in node.outputs:
                if not tensor.name:
                    continue
                if len(tensor.inputs) > 1 or tensor.name in held:
                    other = "is computed twice" if len(tensor.inputs) > 1 else "is given and computed"
                    raise InputError(f"{self._label}: '{tensor.name}' {other}; give each value a name of its own")

    def _depends_on(self, index: int, producer: dict[str, int]) -> set[int]:
        found = {producer[t.name] for t in self.nodes[index].inputs if t.name in producer}
        for inner in subgraphs(self._proto.node[index]):
            found |= {producer[name] for name in captured_names(inner) if name in producer}
        return found

    def _sorted(self) -> list[tuple[int, Any]]:
        """The order of the file where that is topological, else the nearest one that is."""
        producer = {t.name: i for i, n in enumerate(self.nodes) for t in n.outputs if t.name}
        before = [self._depends_on(i, producer) for i in range(len(self.nodes))]
        if all(j < i for i, found in enumerate(before) for j in found):
            return list(enumerate(self.nodes))
        after: list[list[int]] = [[] for _ in before]
        for i, found in enumerate(before):
            for j in found:
                after[j].append(i)
        waiting = [len(found) for found in before]
        ready = [i for i, n in enumerate(waiting) if n == 0]
        order: list[int] = []
        while ready:
            order.append(i := heapq.heappop(ready))
            for j in after[i]:
                waiting[j] -= 1
                if waiting[j] == 0:
                    heapq.heappush(ready, j)
        if len(order) < len(before):
            stuck = self.nodes[next(i for i, n in enumerate(waiting) if n)]
            raise InputError(
                f"{self._label}: the graph has a cycle through {stuck.op} "
                f"'{stuck.outputs[0].name if stuck.outputs else ''}'"
            )
        return [(i, self.nodes[i]) for i in order]
