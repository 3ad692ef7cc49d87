"""Write a graph of the IR as an ONNX model: what :mod:`qcompiler.backends.onnx.load` read comes out again.

Nodes and their wires go out through onnx-graphsurgeon; attributes, types, metadata and constants are written beside
it, since it drops or changes some of them. Constants are copied a piece at a time: memory depends on the biggest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from qcompiler.backends.onnx import wire
from qcompiler.backends.onnx.attributes import LIST_KEY, TYPE, attribute_proto
from qcompiler.backends.onnx.provenance import as_dict, extra_metadata, put_notes, put_pairs
from qcompiler.backends.onnx.storage import EXTERNAL_OVER, INLINE_BELOW, INLINE_LIMIT, DataFile, copy_rope
from qcompiler.backends.onnx.tensors import external as external_tensor
from qcompiler.backends.onnx.tensors import inline as inline_tensor
from qcompiler.backends.onnx.typemap import SINCE_IR, agrees, from_text, type_from_onnx, type_to_onnx
from qcompiler.backends.streaming import Releaser, reading_order
from qcompiler.errors import InputError, StructureError
from qcompiler.fileio import Staged
from qcompiler.ir import Atom, Graph, Op, Value
from qcompiler.payload import Payload

MAX_IR = 13
"""The newest IR version that the oldest supported ONNX Runtime loads."""
DEFAULT_IR, DEFAULT_OPSET = 10, 21
"""For graphs that came from no file."""


@dataclass(frozen=True)
class EmitInfo:
    """What was written: the model, its data file if any, their sizes in bytes."""

    path: Path
    data_path: Path | None
    nbytes: int
    data_nbytes: int
    ir_version: int
    external_tensors: int


def emit_onnx(
    graph: Graph,
    path: str | Path,
    *,
    external: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    told: Callable[[int, int], None] | None = None,
) -> EmitInfo:
    """Write ``graph`` to ``path``, whole or not at all, with ``path.data`` beside it where the weights go there.

    ``external``: put weights into the data file; None decides by size (over 1 GiB). ``metadata`` is added to the
    model's metadata_props; ``told`` hears how many bytes of constants are written, of how many. Raises StructureError
    for ``q.*`` ops and types that ONNX cannot express, InputError where ``path`` cannot be written or the model is too
    big for one file.
    """
    path = Path(path)
    with Staged(path) as stage:
        location = path.name + ".data"
        encoded = encode(graph, location if _goes_outside(graph, external) else None, metadata)
        releaser = Releaser(encoded.payloads(), told)
        data = encoded.data
        if data is not None and data.places:
            with open(stage.beside(".data"), "wb") as f:
                data.write(f, releaser)
        with open(stage.main, "wb") as f:
            copy_rope(encoded.rope, f, releaser)
        stage.commit()
    outside = data if data is not None and data.places else None
    return EmitInfo(
        path,
        path.with_name(location) if outside else None,
        encoded.rope.size,
        outside.size if outside else 0,
        encoded.ir_version,
        encoded.external_tensors,
    )


def to_model(graph: Graph, *, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """``graph`` as a model in memory, for graphs of moderate size."""
    encoded = encode(graph, None, metadata)
    releaser = Releaser(encoded.payloads())
    out = bytearray()
    for part in encoded.rope.parts:
        if isinstance(part, Payload):
            out += b"".join(part.chunks())
            releaser.written(part)
        else:
            out += part
    model = onnx.ModelProto()
    model.ParseFromString(bytes(out))
    return model


def _goes_outside(graph: Graph, external: bool | None) -> bool:
    total = sum(v.payload.nbytes for g in graph.graphs() for v in g.consts.values() if v.payload is not None)
    if external is False and total >= INLINE_LIMIT:
        raise InputError(f"{total} bytes of constants do not fit into one ONNX file; let them go into a data file")
    return total > EXTERNAL_OVER if external is None else external


@dataclass
class Encoded:
    """A model as a message whose constants are not read yet, and the layout of its data file."""

    rope: wire.Rope
    data: DataFile | None
    ir_version: int
    external_tensors: int

    def payloads(self) -> Iterator[Payload]:
        yield from (p for p in self.rope.parts if isinstance(p, Payload))
        if self.data is not None:
            yield from (p for _, p in self.data.places)


def encode(graph: Graph, location: str | None, metadata: Mapping[str, str] | None = None) -> Encoded:
    """The model of ``graph``; constants of 1 KiB and more in a data file called ``location`` unless that is None."""
    if graph.dialect != "onnx":
        raise StructureError(f"a graph of dialect '{graph.dialect}' cannot be written as ONNX; capture it through ONNX")
    encoder = _Encoder(DataFile(location) if location is not None else None)
    body = encoder.graph(graph, set())
    model = _model_header(graph, encoder, metadata)
    rope = wire.Rope(model.SerializeToString())
    rope.message(7, body)
    return Encoded(rope, encoder.data, model.ir_version, encoder.external_tensors)


def _model_header(graph: Graph, encoder: _Encoder, metadata: Mapping[str, str] | None) -> onnx.ModelProto:
    """Everything of the model but its graph."""
    meta = graph.meta
    model = onnx.ModelProto()
    wanted = max(int(meta.get("ir_version", DEFAULT_IR)), encoder.least_ir)
    model.ir_version = min(wanted, MAX_IR)
    imports = dict(meta.get("opset_import", ()))
    for domain in sorted(encoder.domains):
        imports.setdefault(domain, 1 if domain else DEFAULT_OPSET)
    imports = imports or {"": DEFAULT_OPSET}
    for domain, version in imports.items():
        model.opset_import.add(domain=domain, version=version)
    for name in ("producer_name", "producer_version", "domain", "model_version"):
        if name in meta:
            setattr(model, name, meta[name])
    if "model_doc_string" in meta:
        model.doc_string = meta["model_doc_string"]
    props = dict(as_dict(meta.get("model_metadata_props"))) | dict(metadata or {})
    put_pairs(model.metadata_props, tuple(props.items()))
    for name in ("training_info", "configuration"):
        for data in meta.get(name, ()):
            getattr(model, name).add().MergeFromString(data)
    return model


class _Encoder:
    """Encodes one model's graphs, noting what its header must say."""

    def __init__(self, data: DataFile | None) -> None:
        self.data = data
        self.domains: set[str] = set()
        self.least_ir = 0
        self.external_tensors = 0
        self.names: dict[Value, str] = {}

    # -- names -----------------------------------------------------------------------------------------------

    def name_values(self, graph: Graph, taken: set[str]) -> set[str]:
        """Name the values of ``graph``; a name of an enclosing graph (``taken``) is used only where the file did."""
        own: set[str] = set()
        captured: set[str] | None = None
        for value in _values(graph):
            name = value.name
            if (file_name := value.meta.get("hides")) is not None:
                captured = self.captured(graph) if captured is None else captured
                if file_name not in captured and file_name not in own:
                    name = file_name
            elif value.meta.get("absent") and not value.uses:
                name = ""
            if name and (name in own or (name in taken and name != file_name)):
                n = 1
                while (other := f"{name}_{n}") in own or other in taken:
                    n += 1
                name = other
            self.names[value] = name
            own.add(name)
        return own - {""}

    def captured(self, graph: Graph) -> set[str]:
        """The names under which ``graph`` and what is in it read values of enclosing graphs."""
        inside = set(graph.graphs())
        read = [v for op in graph.walk() for v in op.operands if v is not None]
        read += [v for g in inside for v in g.outputs]
        return {self.names[v] for v in read if v.graph not in inside}

    # -- graphs ----------------------------------------------------------------------------------------------

    def graph(self, graph: Graph, taken: set[str]) -> wire.Rope:
        """GraphProto of ``graph``, whose enclosing graphs use the names ``taken``."""
        own = self.name_values(graph, taken)
        proto = onnx.GraphProto(name=graph.name)
        put_notes(proto, graph.meta)
        for value in graph.inputs:
            self.value_info(proto.input.add(), value)
        for value in graph.outputs:
            self.value_info(proto.output.add(), value)
        stated = {id(v) for v in graph.outputs}
        for op in graph:
            for value in op.results:
                if "declared" in value.meta and id(value) not in stated:
                    self.value_info(proto.value_info.add(), value)
        names = {self.names[v] for v in _values(graph)}
        for data in graph.meta.get("quantization_annotation", ()):
            annotation = onnx.TensorAnnotation.FromString(data)
            if annotation.tensor_name in names:
                proto.quantization_annotation.append(annotation)
        ops = []
        for op in graph:
            if op.name == "onnx.Constant" and op.result.meta.get("sparse"):
                from_text(op.attrs["sparse_value"].text, proto.sparse_initializer.add())
                proto.sparse_initializer[-1].values.name = self.names[op.result]
            else:
                ops.append(op)
        rope = wire.Rope(proto.SerializeToString())
        visible = taken | own
        for op, node in zip(ops, self.wired(ops), strict=True):
            rope.message(1, self.node(op, node, visible))
        held = [v for v in graph.inputs if v.payload is not None]
        for value in [*held, *reading_order(graph.consts.values())]:
            rope.message(5, self.tensor(value))
        return rope

    def tensor(self, value: Value) -> wire.Rope:
        payload = value.payload
        assert payload is not None
        name = self.names[value]
        self.least_ir = max(self.least_ir, 4, SINCE_IR.get(payload.dtype.name, 0))
        notes = onnx.TensorProto()
        if value.is_const:
            put_notes(notes, value.meta)
        if self.data is None or payload.dtype.kind == "string" or payload.nbytes < INLINE_BELOW:
            rope = inline_tensor(name, payload)
        else:
            rope = external_tensor(name, payload, self.data.location, self.data.place(payload))
            self.external_tensors += 1
        rope.add(notes.SerializeToString())
        return rope

    def value_info(self, proto: onnx.ValueInfoProto, value: Value) -> None:
        proto.name = self.names[value]
        proto.type.CopyFrom(_stated_type(value))
        if not proto.type.ByteSize():
            proto.ClearField("type")
        if not value.is_const:
            put_notes(proto, value.meta)

    # -- nodes -----------------------------------------------------------------------------------------------

    def wired(self, ops: list[Op]) -> list[onnx.NodeProto]:
        """NodeProtos of ``ops`` with operator, inputs and outputs, as graphsurgeon exports them."""
        variables: dict[str, gs.Variable] = {}

        def variable(value: Value | None) -> gs.Variable:
            name = "" if value is None else self.names[value]
            if not name:
                return gs.Variable.empty()
            if name not in variables:
                variables[name] = gs.Variable(name)
            return variables[name]

        nodes = []
        for op in ops:
            domain, _, op_type = op.name.rpartition(".")
            if (dotted := op.meta.get("op_type")) is not None and op.name.endswith(f".{dotted}"):
                domain, op_type = op.name.removesuffix(f".{dotted}"), dotted
            if domain == "q":
                raise StructureError(f"{op.name} '{op.label}' cannot be written as ONNX; lower it first")
            if not domain:
                raise StructureError(f"op '{op.name}' has no dialect and cannot be written as ONNX")
            domain = "" if domain == "onnx" else domain
            self.domains.add(domain)
            ins, outs = [variable(v) for v in op.operands], [variable(v) for v in op.results]
            nodes.append(gs.Node(op_type, inputs=ins, outputs=outs, domain=domain or None))
        model = gs.export_onnx(gs.Graph(nodes, opset=DEFAULT_OPSET), do_type_check=False)
        return list(model.graph.node)

    def node(self, op: Op, proto: onnx.NodeProto, taken: set[str]) -> wire.Rope:
        where = f"{op.name} '{op.label}'"
        if op.loc.name:
            proto.name = op.loc.name
        put_notes(proto, op.meta)
        for key, value in extra_metadata(op.loc, proto.op_type, as_dict(op.meta.get("metadata_props"))).items():
            proto.metadata_props.add(key=key, value=value)
        if "overload" in op.meta:
            proto.overload = op.meta["overload"]
        for data in op.meta.get("device_configurations", ()):
            proto.device_configurations.add().MergeFromString(data)
        docs = dict(op.meta.get("attribute_docs", ()))
        for name, value in op.attrs.items():
            if value is not None:
                attribute = attribute_proto(name, value, where)
                if name in docs:
                    attribute.doc_string = docs[name]
                proto.attribute.append(attribute)
        rope = wire.Rope(proto.SerializeToString())
        lists: dict[str, list[Graph]] = {}
        for key, region in op.regions.items():
            if (m := LIST_KEY.match(key)) is not None:
                lists.setdefault(m[1], []).append(region)
            else:
                rope.message(5, self.graph_attribute(key, [region], docs.get(key, ""), taken, single=True))
        for key, regions in lists.items():
            rope.message(5, self.graph_attribute(key, regions, docs.get(key, ""), taken, single=False))
        return rope

    def graph_attribute(self, name: str, regions: list[Graph], doc: str, taken: set[str], *, single: bool) -> wire.Rope:
        kind = onnx.AttributeProto.GRAPH if single else onnx.AttributeProto.GRAPHS
        rope = wire.Rope(onnx.AttributeProto(name=name, type=kind, doc_string=doc or None).SerializeToString())
        for region in regions:
            rope.message(6 if single else 11, self.graph(region, taken))
        return rope


def _values(graph: Graph) -> Iterator[Value]:
    """The values that ``graph`` itself defines."""
    yield from graph.inputs
    yield from graph.consts.values()
    for op in graph:
        yield from op.results


def _stated_type(value: Value) -> onnx.TypeProto:
    """What the file says of the type of ``value``: what it said before, where that still holds."""
    where = f"value '{value.name}'"
    stated = value.meta.get("declared", True)
    if stated is not True:
        proto = None
        if isinstance(stated, Atom) and stated.kind == TYPE:
            proto = from_text(stated.text, onnx.TypeProto())
            stated = type_from_onnx(proto)
        if agrees(stated, value.type):
            return proto if proto is not None else type_to_onnx(stated, where)
    return type_to_onnx(value.type, where)
