"""Raise a model to a newer opset through ONNX's own converter, without reading its weights."""

from __future__ import annotations

import onnx
from onnx import version_converter

from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.load import load_onnx, opset_of
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.subgraph import duplicate

LARGE = 1 << 10
"""Bytes from which a constant is hidden from the converter: what adapters read (axes, shapes, scales) is smaller."""
CHANGED = {"onnx.GroupNormalization": 21}
"""Ops whose operands mean something else from an opset on, and which onnx 1.23 passes on as they are."""
IR_OF = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""The IR version that came with an opset."""


def raised(graph: Graph, least: int, why: str) -> Graph:
    """``graph`` in opset ``least`` or later: itself where it is, else converted; values keep their names.

    Constants of :data:`LARGE` bytes and more are inputs while the converter works. Raises InputError, beginning with
    ``why``, for a model that it cannot convert.
    """
    have = opset_of(graph)
    if have >= least:
        return graph
    fix = f"export the model with opset {least} or later"
    what = f"{why} needs opset {least}, the model has {have}"
    for op in graph.walk():
        if op.name in CHANGED and have < CHANGED[op.name] <= least:
            raise InputError(f"{what}, and the converter leaves {op.name} '{op.label}' with another meaning; {fix}")
    light = duplicate(graph)
    hidden = [v.name for v in light.consts.values() if v.payload is not None and v.payload.nbytes >= LARGE]
    for name in hidden:
        const = light.consts[name]
        light.rename(const, light.fresh(f"{name}_hidden"))
        given = light.add_input(name, const.type)
        const.replace_uses(given)
        light.remove_const(const)
    try:
        converted = version_converter.convert_version(to_model(light), least)
    except Exception as e:  # the converter raises RuntimeError, ConvertError, IndexError ...
        line = " ".join(str(e).split())[:300]
        raise InputError(f"{what}, and onnx cannot convert it: {line}; {fix}") from e
    made = _loaded(converted, graph, least)
    for name in hidden:
        given = next(v for v in made.inputs if v.name == name)
        payload = graph.consts[name].payload
        assert payload is not None
        made.rename(given, made.fresh(f"{name}_given"))
        const = made.add_const(name, payload)
        given.replace_uses(const)
        made.remove_input(given)
    for name, value in graph.consts.items():
        if (kept := made.consts.get(name)) is not None:
            kept.meta = dict(value.meta)
    return made


def _loaded(model: onnx.ModelProto, graph: Graph, least: int) -> Graph:
    """The converted model as a graph, with what the converter drops: locations, notes, the names of the interface."""
    made = load_onnx(model)
    imports = dict(graph.meta.get("opset_import", ())) | {"": least}
    version = max(int(graph.meta.get("ir_version", 0)), IR_OF.get(least, 13))
    made.meta = dict(graph.meta) | {"opset_import": tuple(imports.items()), "ir_version": version}
    was: dict[str, Op] = {r.name: op for op in graph.walk() for r in op.results}
    for op in made.walk():
        old = next((was[r.name] for r in op.results if r.name in was), None)
        if old is None or old.name != op.name:
            continue
        op.loc, op.meta = old.loc, dict(old.meta)
        for new in op.results:
            known = next((r for r in old.results if r.name == new.name), None)
            if known is not None and isinstance(known.type, TensorType) and known.tensor.shape is not None:
                new.type, new.meta = known.type, dict(known.meta)
    return made
