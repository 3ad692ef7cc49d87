"""One model through load, text and emit: is anything lost?"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from onnx.external_data_helper import load_external_data_for_model

from qcompiler.backends.onnx.attributes import GRAPHS, attribute_type
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.tensors import Origin, payload_of
from qcompiler.backends.onnx.typemap import DEFAULT_DOMAINS
from qcompiler.errors import InputError
from qcompiler.reader import parse
from qcompiler.text import show
from tests.backends.onnx.corpus import Case, Reference, reference, run, session


@dataclass(frozen=True)
class Outcome:
    """``verdict``: equal (bits), structure (compared as graphs only), refused (by us, in a sentence), or wrong."""

    verdict: str
    detail: str = ""


def roundtrip(case: Case, folder: Path, *, external: bool | None = None) -> Outcome:
    """Capture ``case``, print and parse it, emit it under ``folder``, compare text, graph and outputs."""
    found = reference(case)
    try:
        graph = load_onnx(case.source)
    except InputError as e:
        return Outcome("wrong" if isinstance(found, Reference) else "refused", str(e))
    text = show(graph)
    if show(parse(text)) != text:
        return Outcome("wrong", "the text does not print again as it was")
    out = folder / "out.onnx"
    emit_onnx(graph, out, external=external)
    if difference := compare_models(proto_of(case.source), proto_of(out)):
        return Outcome("wrong", difference)
    if valid(case.source) and not valid(out):
        return Outcome("wrong", "onnx's checker accepts the model and not what was emitted")
    if show(graph) != text:
        return Outcome("wrong", "emission changed the graph")
    again = load_onnx(out)
    if len(again) != len(graph) or again.consts.keys() != graph.consts.keys():
        return Outcome("wrong", "capturing the emitted model gives another graph")
    if not isinstance(found, Reference):
        return Outcome("structure", found)
    try:
        outputs = run(session(out), found.feeds)
    except Exception as e:
        return Outcome("wrong", f"ORT refuses what was emitted: {e}")
    if not found.stable:
        return Outcome("structure", "computes something else each time")
    return Outcome("equal") if outputs == found.outputs else Outcome("wrong", "outputs differ")


def valid(source: Path | onnx.ModelProto) -> bool:
    """What onnx's own checker says."""
    try:
        onnx.checker.check_model(source)
    except Exception:
        return False
    return True


def proto_of(source: Path | onnx.ModelProto) -> onnx.ModelProto:
    """The whole model in memory, functions inlined."""
    if isinstance(source, onnx.ModelProto):
        model = source
    else:
        model = onnx.load(source, load_external_data=False)
        load_external_data_for_model(model, str(source.parent))
    return onnx.inliner.inline_local_functions(model) if model.functions else model


# -- graphs as comparable values -------------------------------------------------------------------------------


def compare_models(a: onnx.ModelProto, b: onnx.ModelProto) -> str:
    """The first difference that matters between two models, or an empty string."""
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if getattr(a, name) != getattr(b, name):
            return f"{name}: {getattr(a, name)!r} became {getattr(b, name)!r}"
    if _pairs(a.metadata_props) != _pairs(b.metadata_props):
        return "the model's metadata differ"
    opsets = [{"" if o.domain in DEFAULT_DOMAINS else o.domain: o.version for o in m.opset_import} for m in (a, b)]
    if not opsets[0].items() <= opsets[1].items():
        return f"opsets {opsets[0]} became {opsets[1]}"
    if (list(a.training_info), a.ir_version > b.ir_version) != (list(b.training_info), a.ir_version > 13):
        return f"training info or IR version differ ({a.ir_version}, {b.ir_version})"
    return _difference(graph_form(a.graph, a.ir_version), graph_form(b.graph, b.ir_version), "graph")


def _difference(a: Any, b: Any, where: str) -> str:
    if type(a) is type(b) and isinstance(a, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                return f"{where}.{key} {'appeared' if key not in a else 'is gone'}"
            if found := _difference(a[key], b[key], f"{where}.{key}"):
                return found
        return ""
    if type(a) is type(b) and isinstance(a, list) and len(a) == len(b):
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := _difference(x, y, f"{where}[{i}]"))), ""
        )
    return "" if a == b else f"{where}: {str(a)[:200]} became {str(b)[:200]}"


def _pairs(entries: Any) -> dict[str, str]:
    return {e.key: e.value for e in entries}


def _info(info: onnx.ValueInfoProto) -> Any:
    return (info.type.SerializeToString(deterministic=True), info.doc_string, _pairs(info.metadata_props))


def _tensor(tensor: onnx.TensorProto) -> Any:
    payload = payload_of(tensor, Origin(None))
    data = payload.array().tolist() if payload.dtype.kind == "string" else b"".join(payload.chunks())
    return (str(payload.dtype), payload.shape, data)


def _attribute(a: onnx.AttributeProto, ir_version: int) -> Any:
    kind = attribute_type(a)
    if kind in GRAPHS:
        return [graph_form(g, ir_version) for g in (a.graphs if a.graphs else [a.g])]
    if kind == onnx.AttributeProto.TENSOR:
        return (_tensor(a.t), a.doc_string)
    if kind == onnx.AttributeProto.TENSORS:
        return ([_tensor(t) for t in a.tensors], a.doc_string)
    copy = onnx.AttributeProto()
    copy.CopyFrom(a)
    copy.type = kind
    return copy.SerializeToString(deterministic=True)


def graph_form(graph: onnx.GraphProto, ir_version: int) -> dict[str, Any]:
    """A graph without what may change: the order of attributes, how bytes are stored, Constant nodes."""
    infos = {v.name: v for part in (graph.value_info, graph.output) for v in part}

    def notes(message: Any, name: str) -> Any:
        """A constant has one place for notes; those of its value_info go there too."""
        info = infos.get(name, onnx.ValueInfoProto())
        metadata = _pairs(message.metadata_props) or _pairs(info.metadata_props)
        return (message.doc_string or info.doc_string, metadata)

    constants = {t.name: (_tensor(t), notes(t, t.name)) for t in graph.initializer}
    nodes: list[dict[str, Any]] = []
    for n in graph.node:
        if n.op_type == "Constant" and n.domain in DEFAULT_DOMAINS and n.attribute[0].name.startswith("value"):
            constants[n.output[0]] = (_constant(n.attribute[0]), notes(n, n.output[0]))
            continue
        form = {
            "op": (n.domain if n.domain not in DEFAULT_DOMAINS else "", n.op_type, n.overload, n.name),
            "input": list(n.input),
            "output": list(n.output),
            "notes": (n.doc_string, _pairs(n.metadata_props)),
            "attributes": {a.name: _attribute(a, ir_version) for a in n.attribute},
        }
        nodes.append(form)
    computed = {name for n in nodes for name in n["output"]}
    given = [i for i in graph.input if ir_version >= 4 or i.name not in constants]
    outputs = {o.name for o in graph.output}
    order = Counter(tuple(n["output"]) for n in nodes)
    if max(order.values(), default=1) == 1:
        nodes.sort(key=lambda n: n["output"])  # nodes of a file that is out of order are put in order
    return {
        "name": graph.name,
        "notes": (graph.doc_string, _pairs(graph.metadata_props)),
        "input": {i.name: _info(i) for i in given},
        "output": {
            o.name: o.type.SerializeToString(deterministic=True) if o.name in computed else None for o in graph.output
        },
        "value_info": {v.name: _info(v) for v in graph.value_info if v.name in computed and v.name not in outputs},
        "constants": constants,
        "sparse": {s.values.name: s.SerializeToString(deterministic=True) for s in graph.sparse_initializer},
        "annotations": [a.SerializeToString(deterministic=True) for a in graph.quantization_annotation],
        "nodes": nodes,
    }


def _constant(a: onnx.AttributeProto) -> Any:
    match a.name:
        case "value":
            return _tensor(a.t)
        case "value_float" | "value_floats":
            values: Any = onnx.helper.get_attribute_value(a)
            dims = [] if a.name == "value_float" else [len(values)]
            return _tensor(onnx.helper.make_tensor("", 1, dims, [values] if not dims else values))
        case "value_int" | "value_ints":
            values = onnx.helper.get_attribute_value(a)
            dims = [] if a.name == "value_int" else [len(values)]
            return _tensor(onnx.helper.make_tensor("", 7, dims, [values] if not dims else values))
        case "value_string" | "value_strings":
            values = onnx.helper.get_attribute_value(a)
            dims = [] if a.name == "value_string" else [len(values)]
            return _tensor(onnx.helper.make_tensor("", 8, dims, [values] if not dims else values))
        case _:
            return a.SerializeToString(deterministic=True)
