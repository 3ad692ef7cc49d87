"""Two states of one graph, side by side: which values a pass has redefined, and what each gives on the same inputs.

Values keep their names across passes, and names are never given twice, so a value of the later graph is the value of
the earlier one that is called the same. A *segment* computes one such value from others of them: replayed on what the
earlier graph computed, it shows what the pass did there, and nothing that happened before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

import numpy as np

from qcompiler.bias_correction import correction
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ArrayPayload, ComputedPayload
from qcompiler.subgraph import duplicate, part, reads
from qcompiler.weights import WeightQuantization

SMALL = 64
"""Constants of up to so many elements are compared by value."""


def computed_names(graph: Graph) -> set[str]:
    """The names of what the ops of ``graph``, not of its regions, compute."""
    return {r.name for op in graph for r in op.results}


def _same_const(a: Value, b: Value) -> bool:
    if a.payload is b.payload:
        return True
    if isinstance(a.payload, ArrayPayload) and isinstance(b.payload, ArrayPayload) and a.type == b.type:
        return a.payload.size <= SMALL and np.array_equal(a.payload.array(), b.payload.array())
    return False


def _same_operand(a: Value | None, b: Value | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.is_const or b.is_const:
        return a.is_const and b.is_const and _same_const(a, b)
    return a.name == b.name


def same_op(a: Op, b: Op) -> bool:
    """True when both compute the same from values of the same names."""
    if a.name != b.name or a.attrs != b.attrs or len(a.operands) != len(b.operands):
        return False
    if not all(map(_same_operand, a.operands, b.operands)) or a.regions.keys() != b.regions.keys():
        return False
    return all(same_graph(a.regions[k], b.regions[k]) for k in a.regions)


def same_graph(a: Graph, b: Graph) -> bool:
    """True when two graphs, or regions, are the same op by op."""
    if len(a) != len(b) or [v.name for v in a.outputs] != [v.name for v in b.outputs]:
        return False
    return all(
        same_op(x, y) and [r.name for r in x.results] == [r.name for r in y.results] for x, y in zip(a, b, strict=True)
    )


def redefined(before: Graph, after: Graph) -> list[Value]:
    """The values of ``after`` that ``before`` has too and computes in another way, in order."""
    known = computed_names(before)
    out = []
    for op in after:
        for result in op.results:
            if result.name not in known:
                continue
            was = before.local(result.name)
            assert was is not None
            if was.owner is None or was.index != result.index or not same_op(was.owner, op) or _reads_new(op, known):
                out.append(result)
    return out


def _reads_new(op: Op, known: set[str]) -> bool:
    """True when ``op`` reads what the earlier graph did not compute."""
    return any(v.owner is not None and v.graph is op.graph and v.name not in known for v in reads(op))


def segment(after: Graph, value: Value, known: set[str]) -> tuple[Graph, list[str]]:
    """The ops of ``after`` that compute ``value`` from values whose names are ``known`` (and inputs and constants), as
    a graph with that one output; and the names of its inputs."""
    assert value.owner is not None
    chosen = {value.owner}
    work = [value.owner]
    while work:
        for v in reads(work.pop()):
            if v.owner is not None and v.graph is after and v.name not in known and v.owner not in chosen:
                chosen.add(v.owner)
                work.append(v.owner)
    made, inputs = part(after, [op for op in after if op in chosen], [value])
    return made, [v.name for v in inputs]


def pairs(graph: Graph) -> Iterator[tuple[Op, Op]]:
    """Every dequantize that reads what a quantize gives, regions included: ``(quantize, dequantize)``."""
    for op in graph.walk():
        maker = op.operands[0].owner if op.name == "q.dequantize" and op.operands[0] is not None else None
        if maker is not None and maker.name == "q.quantize":
            yield maker, op


def _wide_pairs(graph: Graph) -> list[tuple[Op, Op]]:
    """``(dequantize, quantize)`` of the host dialect with 16-bit codes, which have no ``q.*`` op."""
    out = []
    for op in graph.walk():
        codes = op.operands[0] if op.name.endswith(".DequantizeLinear") and op.operands else None
        if codes is not None and codes.owner is not None and codes.owner.name.endswith(".QuantizeLinear"):
            out.append((op, codes.owner))
    return out


def rounded(graph: Graph) -> Iterator[tuple[Op, WeightQuantization]]:
    """Every dequantize of constant codes that are not the nearest to their float weight, and what made them."""
    for op in graph.walk():
        codes = op.operand(0) if op.name == "q.dequantize" else None
        made = codes.payload.computation if codes is not None and isinstance(codes.payload, ComputedPayload) else None
        if isinstance(made, WeightQuantization) and made.rounding != "nearest" and made.scheme == op.attrs["scheme"]:
            yield op, made


def opened(graph: Graph, only: Set[str] | None = None) -> Graph:
    """A copy in which nothing reads a dequantized value that was quantized just before: it reads the float instead.

    ``only`` names the dequantized values that are meant; None means all, those of weights that were rounded in another
    way too, and then biases that were corrected for what is rounded are again as they were.
    """
    made = duplicate(graph)
    for value in made.consts.values() if only is None else ():
        if (corrected := correction(value)) is not None:
            value.payload = corrected.uncorrected()
    for op in [o for o in made.walk() if o.meta.get("freed")] if only is None else ():
        assert op.operands[0] is not None  # a clip that stands for a pair: it cuts off what the codes did
        op.result.replace_uses(op.operands[0])
    for dequantize, quantize in _wide_pairs(made) if only is None else ():
        assert quantize.operands[0] is not None
        dequantize.result.replace_uses(quantize.operands[0])
    for dequantize, by in list(rounded(made)) if only is None else ():
        home = dequantize.graph
        dequantize.result.replace_uses(home.add_const(home.fresh(f"{dequantize.result.name}_float"), by.weight))
    for quantize, dequantize in list(pairs(made)):
        x = quantize.operand(0)
        if x is not None and (only is None or dequantize.result.name in only):
            dequantize.result.replace_uses(x)
    return made


def divergent(after: Graph, wrong: set[str], known: set[str]) -> list[Value]:
    """The values called ``wrong`` from which a wrong output is reached through wrong ones, in order.

    Values that are not ``known`` in the other graph count as wrong where something wrong reads them.
    """
    reached: set[Value] = set()
    work = [v for v in after.outputs if v.name in wrong]
    while work:
        value = work.pop()
        if value in reached or value.owner is None or value.graph is not after:
            continue
        reached.add(value)
        work += [v for v in reads(value.owner) if v.name in wrong or (v.owner is not None and v.name not in known)]
    return [r for op in after for r in op.results if r in reached and r.name in wrong]


def chunked(names: Iterable[str], size: int) -> Iterator[list[str]]:
    """``names`` in lists of at most ``size``."""
    chunk: list[str] = []
    for name in names:
        chunk.append(name)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
