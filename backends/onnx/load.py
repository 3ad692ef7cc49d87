"""Capture an ONNX model as a graph of the IR, losing nothing that :mod:`qcompiler.backends.onnx.emit` must write again.

Op ``onnx.X`` is operator X of the default domain, ``com.microsoft.X`` one of another domain. What the IR has no
place for is kept in ``meta``, under the name of its ONNX field (``doc_string``, ``opset_import`` ...) and:

- ``declared``: the file states the type of this result: True, or what it states where inference knows more.
- ``absent``: an optional output that the file leaves out. ``hides``: the file's name of a value, which hides an
  outer value of the same name and is called differently here.
- ``node``: the name of the ``Constant`` node that this constant was. ``sparse``: the result of an ``onnx.Constant``
  that is a sparse initializer in the file.

Before IR version 4 every initializer also had to be an input; those are constants here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from qcompiler.backends.onnx.attributes import (
    EMPTY,
    GRAPHS,
    LIST_KEY,
    SPARSE,
    TYPE,
    attr_of,
    attribute_type,
)
from qcompiler.backends.onnx.constants import constant_of
from qcompiler.backends.onnx.provenance import as_dict, location, node_notes, notes_of, pairs
from qcompiler.backends.onnx.source import infer_types, read_model
from qcompiler.backends.onnx.tensors import Origin, payload_of
from qcompiler.backends.onnx.typemap import DEFAULT_DOMAINS, merged, sane, text, to_text, type_from_onnx, type_to_onnx
from qcompiler.backends.onnx.wiring import Wiring, defined_names, subgraphs
from qcompiler.errors import InputError, StructureError
from qcompiler.ir import UNKNOWN, Atom, Attr, Graph, Op, Type, Value
from qcompiler.payload import Payload

_MODEL_FIELDS = ("producer_name", "producer_version", "domain", "model_version")


def load_onnx(source: str | Path | onnx.ModelProto) -> Graph:
    """The graph of an ONNX file (external data included, any size) or of a model in memory.

    No weight is read: constants of a file are ranges of it. Raises InputError, one sentence, for a file that is no
    model, external data that is absent, short or outside the model's folder, and values without a single definition.
    """
    model, origin = read_model(source)
    graph = Graph("main")
    loader = _Loader(origin, model.ir_version)
    try:
        graph.meta = _model_meta(model)
        loader.collect_names(model.graph)
        loader.fill(graph, _Protos(model.graph, infer_types(model)), None)
    except UnicodeDecodeError as e:
        raise InputError(f"{origin.label} has a name that is no UTF-8 text ({e.object!r}); export it again") from None
    except StructureError as e:
        raise InputError(f"{origin.label} cannot be captured: {e}") from None
    return graph


def opset_of(graph: Graph, domain: str = "") -> int:
    """The version of ``domain`` that ``graph`` imports; 0 when it does not."""
    return int(dict(graph.root.meta.get("opset_import", ())).get(domain, 0))


def _model_meta(model: onnx.ModelProto) -> dict[str, Attr]:
    meta: dict[str, Attr] = {"ir_version": int(model.ir_version)}
    imports = {"" if o.domain in DEFAULT_DOMAINS else o.domain: int(o.version) for o in model.opset_import}
    meta["opset_import"] = tuple((text(domain), version) for domain, version in imports.items())
    for name in _MODEL_FIELDS:
        if value := getattr(model, name):
            meta[name] = value if isinstance(value, int) else text(value)
    if model.doc_string:
        meta["model_doc_string"] = text(model.doc_string)
    if model.metadata_props:
        meta["model_metadata_props"] = pairs(model.metadata_props)
    for name in ("training_info", "configuration"):
        if found := getattr(model, name, ()):
            meta[name] = tuple(m.SerializeToString() for m in found)
    return meta


@dataclass
class _Protos:
    """A graph as the file has it, and with inferred types."""

    graph: onnx.GraphProto
    typed: onnx.GraphProto

    def __post_init__(self) -> None:
        self.inferred = {v.name: v for part in ("value_info", "output") for v in getattr(self.typed, part)}
        self.declared = {v.name: v for part in ("value_info", "output") for v in getattr(self.graph, part)}
        self.outputs = {v.name for v in self.graph.output}


@dataclass
class _Scope:
    """What names mean inside a graph: its own values, then those of the enclosing graphs."""

    outer: _Scope | None
    own: set[str]
    values: dict[str, Value] = field(default_factory=dict)

    def hides(self, name: str) -> bool:
        scope = self.outer
        while scope is not None:
            if name in scope.own:
                return True
            scope = scope.outer
        return False

    def find(self, name: str) -> Value | None:
        scope: _Scope | None = self
        while scope is not None:
            if (found := scope.values.get(name)) is not None or name in scope.own:
                return found
            scope = scope.outer
        return None


class _Loader:
    def __init__(self, origin: Origin, ir_version: int) -> None:
        self.origin = origin
        self.overridable = ir_version >= 4
        self.names: set[str] = set()

    def collect_names(self, graph: onnx.GraphProto) -> None:
        """Note every name in the model: a name made up here is used nowhere in it."""
        self.names |= {text(name) for name in defined_names(graph)}
        for node in graph.node:
            for inner in subgraphs(node):
                self.collect_names(inner)

    def fresh(self, hint: str) -> str:
        name, n = hint, 0
        while name in self.names:
            n += 1
            name = f"{hint}_{n}"
        self.names.add(name)
        return name

    # -- graphs ----------------------------------------------------------------------------------------------

    def fill(self, graph: Graph, protos: _Protos, outer: _Scope | None) -> None:
        proto = protos.graph
        graph.name = text(proto.name)
        graph.meta.update(notes_of(proto))
        if proto.quantization_annotation:
            graph.meta["quantization_annotation"] = tuple(a.SerializeToString() for a in proto.quantization_annotation)
        wiring = Wiring(proto, self.origin.label)
        scope = _Scope(outer, defined_names(proto))
        self.inputs_and_constants(graph, protos, scope)
        for index, node in wiring.order:
            typed = protos.typed.node[index] if protos.typed is not proto else proto.node[index]
            self.node(graph, proto.node[index], typed, node, protos, scope)
        for output in proto.output:
            value = scope.find(output.name)
            if value is None:
                raise InputError(f"{self.origin.label}: the output '{output.name}' is computed by nothing")
            graph.add_output(value)

    def inputs_and_constants(self, graph: Graph, protos: _Protos, scope: _Scope) -> None:
        proto = protos.graph
        tensors = {t.name: t for t in proto.initializer}
        held = set(tensors) | {s.values.name for s in proto.sparse_initializer}
        defaults = set()
        for info in proto.input:
            if info.name in held and not self.overridable:
                continue
            name, meta = self.name(info.name, scope)
            default = None
            if info.name in tensors:
                defaults.add(info.name)
                default = payload_of(tensors[info.name], self.origin)
            type, stated = _stated(info.type)
            value = graph.add_input(name, sane(type), default)
            value.meta = meta | notes_of(info)
            if stated is not None or sane(type) != type:
                value.meta["declared"] = stated or type
            scope.values[info.name] = value
        for tensor in proto.initializer:
            if tensor.name not in defaults:
                payload = payload_of(tensor, self.origin)
                self.constant(graph, tensor.name, payload, notes_of(tensor), protos, scope)
        for sparse in proto.sparse_initializer:
            self.sparse(graph, sparse, scope)

    def constant(
        self,
        graph: Graph,
        name: str,
        payload: Payload,
        meta: dict[str, Attr],
        protos: _Protos,
        scope: _Scope,
    ) -> None:
        used, own = self.name(name, scope)
        value = graph.add_const(used, payload)
        info = protos.declared.get(name)
        value.meta = own | (notes_of(info) if info is not None else {}) | meta
        scope.values[name] = value

    def sparse(self, graph: Graph, tensor: onnx.SparseTensorProto, scope: _Scope) -> None:
        name, meta = self.name(tensor.values.name, scope)
        atom = Atom(SPARSE, to_text(tensor))
        op = graph.create("onnx.Constant", (), {"sparse_value": atom}, [(name, UNKNOWN)])
        op.result.meta = meta | {"sparse": True}
        scope.values[tensor.values.name] = op.result

    def name(self, name: str, scope: _Scope) -> tuple[str, dict[str, Attr]]:
        """The name of a value here, and the meta that recalls the file's name when it differs."""
        if scope.hides(name):
            return self.fresh(f"{name}_inner"), {"hides": name}
        return name, {}

    # -- nodes -----------------------------------------------------------------------------------------------

    def node(
        self,
        graph: Graph,
        node: onnx.NodeProto,
        typed: onnx.NodeProto,
        wired: Any,
        protos: _Protos,
        scope: _Scope,
    ) -> None:
        where = f"{self.origin.label}: node '{node.name or wired.op}'"
        if (payload := constant_of(node, self.origin, where)) is not None:
            meta = node_notes(node) | ({"node": node.name} if node.name else {})
            self.constant(graph, node.output[0], payload, meta, protos, scope)
            return
        operands = [self.operand(t.name, scope, where) for t in wired.inputs]
        results: list[tuple[str, Type]] = []
        metas: list[dict[str, Attr]] = []
        for i, tensor in enumerate(wired.outputs):
            if tensor.name:
                name, meta = self.name(tensor.name, scope)
                type, more = self.result_type(tensor.name, protos)
                results.append((name, type))
                metas.append(meta | more)
            else:
                results.append((self.fresh(f"{node.name or wired.op}_absent{i}"), UNKNOWN))
                metas.append({"absent": True})
        metadata = pairs(node.metadata_props)
        loc = location(text(node.name), text(node.op_type), as_dict(metadata))
        op = graph.create(_op_name(node, where), operands, {}, results, loc=loc)
        op.meta = node_notes(node)
        for value, tensor, meta in zip(op.results, wired.outputs, metas, strict=True):
            value.meta = meta
            if tensor.name:
                scope.values[tensor.name] = value
        self.attributes(op, node, typed, scope, where)

    def operand(self, name: str, scope: _Scope, where: str) -> Value | None:
        if not name:
            return None
        value = scope.find(name)
        if value is None:
            raise InputError(f"{where} reads '{name}', which nothing in the model provides")
        return value

    def result_type(self, name: str, protos: _Protos) -> tuple[Type, dict[str, Attr]]:
        inferred = protos.inferred.get(name)
        known = sane(type_from_onnx(inferred.type)) if inferred is not None else UNKNOWN
        info = protos.declared.get(name)
        if info is None:
            return known, {}
        type, stated = _stated(info.type)
        best = merged(sane(type), known)
        return best, {"declared": stated or (True if best == type else type)} | notes_of(info)

    def attributes(self, op: Op, node: onnx.NodeProto, typed: onnx.NodeProto, scope: _Scope, where: str) -> None:
        docs = []
        inferred = {a.name: a for a in typed.attribute}
        for attribute in node.attribute:
            same = inferred.get(attribute.name, attribute)
            name = text(attribute.name)
            if name in op.attrs or name in op.regions:
                raise InputError(f"{where} has the attribute '{name}' twice")
            if attribute.doc_string:
                docs.append((name, attribute.doc_string))
            kind = attribute_type(attribute)
            if kind not in GRAPHS or attribute.ref_attr_name:
                op.attrs[name] = attr_of(attribute, self.origin, where)
            elif LIST_KEY.match(name):
                raise InputError(
                    f"{where}: qcompiler cannot name a nested graph '{name}'; call the attribute differently"
                )
            elif kind == onnx.AttributeProto.GRAPH:
                self.fill(op.graph.add_region(op, name), _Protos(attribute.g, same.g), scope)
            elif not attribute.graphs:
                op.attrs[name] = Atom(EMPTY, "GRAPHS")
            else:
                for i, (inner, inner_typed) in enumerate(zip(attribute.graphs, same.graphs, strict=True)):
                    self.fill(op.graph.add_region(op, f"{name}.{i}"), _Protos(inner, inner_typed), scope)
        if docs:
            op.meta["attribute_docs"] = tuple(docs)


def _stated(proto: onnx.TypeProto) -> tuple[Type, Atom | None]:
    """The type in the file, and its exact text where the IR's type says less (denotations)."""
    type = type_from_onnx(proto)
    if type_to_onnx(type, "") == proto:
        return type, None
    return type, Atom(TYPE, to_text(proto))


def _op_name(node: onnx.NodeProto, where: str) -> str:
    domain = "onnx" if node.domain in DEFAULT_DOMAINS else text(node.domain)
    if node.domain in ("onnx", "q") or not node.op_type:
        raise InputError(f"{where}: qcompiler cannot name operator '{node.op_type}' of domain '{node.domain}'")
    return f"{domain}.{text(node.op_type)}"
