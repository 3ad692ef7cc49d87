"""torch -> ONNX through torch's own exporter: the road of every torch model to an ONNX Runtime target.

What the exporter leaves to be done here: weights keep the qualified names of their parameters (it folds the
transpose of each ``nn.Linear`` weight into an initializer called ``val_109``), symbolic sizes keep the
user's names, each node says in two short properties where it came from, and a failure is one sentence.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from qcompiler.backends.torch.dims import program_symbols, refuse_fixed
from qcompiler.backends.torch.quiet import one_sentence
from qcompiler.backends.torch.stack import source_line
from qcompiler.errors import InputError

OPSET = 21  # the first whose DequantizeLinear takes int4 and blocks
EXTERNAL_BYTES = 1 << 30
TIED = "qcompiler.tied"
SCOPE, SOURCE = "qcompiler.scope", "qcompiler.source"
_NOISE = ("pkg.torch.onnx.fx_node", "pkg.torch.onnx.stack_trace", "pkg.torch.onnx.class_hierarchy")
_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand")


def export_onnx(
    source: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    dynamic_shapes: Any,
    out: Path,
    *,
    external: bool | None = None,
    opset: int = OPSET,
) -> Path:
    """Write ``source`` as the ONNX file ``out``, weights in ``<out>.data`` when over 1 GiB or ``external``.

    ``args`` and ``dynamic_shapes`` are those of ``torch.export.export`` and are not read when ``source`` is
    an ExportedProgram. Inputs keep the names of forward's parameters, sizes the names of their ``Dim``;
    where there is none, d0, d1 ... in order. A weight that is stored once but used under two names becomes
    two initializers. Raises InputError, one sentence that names the cause, when the model cannot be
    exported; nothing is left behind.
    """
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into")
    captured = isinstance(source, ExportedProgram)
    label = "the exported program" if captured else type(source).__name__
    with one_sentence(f"cannot export {label} to ONNX"):
        program = torch.onnx.export(
            source,
            () if captured else args,
            dynamic_shapes=None if captured else dynamic_shapes,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
        )
        if program is None or program.exported_program is None:
            raise InputError("the exporter returned nothing")
        _refuse_state(program.exported_program, label)
        if isinstance(source, nn.Module):
            refuse_fixed(program.exported_program, source.forward, args, dynamic_shapes)
        symbols = {str(s): name for s, name in program_symbols(program.exported_program).items()}
        ties: dict[str, str] = {}
        lineage = _own_weights(program.model.graph, _aliases(program.exported_program, source), ties)
        program.optimize()
        program.rename_axes({s: name for s, name in symbols.items() if s != name})
    _name_folded(program.model.graph, lineage)
    _name_outputs(program.model.graph, _output_names(source, program.exported_program))
    _trim(program.model)
    if ties := {
        turned: name for turned, name in ties.items() if {turned, name} <= set(program.model.graph.initializers)
    }:
        program.model.metadata_props[TIED] = json.dumps(ties)
    _save(program.model, out, external)
    return out


def _refuse_state(program: ExportedProgram, label: str) -> None:
    """InputError when the model writes to what it was given: the exporter drops that without a word."""
    for spec in program.graph_signature.output_specs:
        if spec.kind in _WRITES:
            what = "argument" if spec.kind is OutputKind.USER_INPUT_MUTATION else "buffer"
            raise InputError(
                f"{label} writes to its {what} {spec.target!r}, and an ONNX graph keeps no state; "
                "take it as an argument and return the new value"
            )


# -- weights -------------------------------------------------------------------------------------------------


def _aliases(program: ExportedProgram, source: Any) -> dict[str, tuple[str, ...]]:
    """Every name of each parameter and buffer -> all the names that share its storage, itself included."""
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(source, nn.Module):
        tensors |= dict(source.named_parameters(remove_duplicate=False))
        tensors |= dict(source.named_buffers(remove_duplicate=False))
    tensors |= {n: t for n, t in program.state_dict.items() if n not in tensors}
    groups: dict[Any, list[str]] = {}
    for name, t in tensors.items():
        same = (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) if t.numel() else name
        groups.setdefault(same, []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _own_weights(graph: ir.Graph, aliases: Mapping[str, tuple[str, ...]], ties: dict[str, str]) -> dict[str, str]:
    """Give each module its weight under its own name, transposed where it is read transposed.

    ``ties`` receives the matrices that the model stores once and reads both ways: transposed name -> name.
    Returns what was computed from one weight alone: the name of the value -> that of the weight. The
    transposes are taken when the file is written, one at a time, so no second copy of the model is made.
    """
    for weight in list(graph.initializers.values()):
        if weight.const_value is None or weight.name is None or weight.name not in aliases:
            continue
        names = aliases[weight.name]
        turned: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
        for node in [use.node for use in weight.uses()]:
            if node.op_type != "Transpose" or node.graph is not graph or (perm := _perm(node)) is None:
                continue
            name = _name_for(node, names)
            value = turned.get((name, perm))
            if value is None:
                # The last consumer to leave hands its weight's own name on.
                value = turned[name, perm] = _transposed(weight, perm, name)
            node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        direct = list(weight.uses())
        if direct or weight.is_graph_output():
            own = _name_for(direct[0].node, names) if direct else weight.name
            if own != weight.name and own not in graph.initializers:
                graph.initializers.pop(weight.name)
                weight.name = own
                graph.initializers[own] = weight
        elif turned:
            graph.initializers.pop(weight.name)
        for (_, perm), value in turned.items():
            value.name = _free(str(value.name), graph, ".T")
            graph.initializers[value.name] = value
            if direct and perm == (1, 0):
                ties[value.name] = str(weight.name)
    return _lineage(graph)


def _perm(node: ir.Node) -> tuple[int, ...] | None:
    attr = node.attributes.get("perm")
    return tuple(attr.as_ints()) if attr is not None else None


def _transposed(weight: ir.Value, perm: tuple[int, ...], name: str) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    sizes = tensor.shape.numpy()
    shape = ir.Shape([sizes[i] for i in perm])

    def turn() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().transpose(perm).copy(), dtype=tensor.dtype, name=name)

    lazy = ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)


def _name_for(node: ir.Node, names: tuple[str, ...]) -> str:
    """Of the names of one weight, that of the innermost module around ``node``, else the first."""
    scope = _scope(node)
    fits = [n for n in names if n.rpartition(".")[0] == scope]
    return (fits or list(names))[0]


def _free(name: str, graph: ir.Graph, suffix: str) -> str:
    while name in graph.initializers:
        name += suffix
    return name


def _lineage(graph: ir.Graph) -> dict[str, str]:
    """Values that constant folding may compute from one weight -> its name, the arithmetic appended."""
    known: dict[str, str] = {}
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.const_value.size > 1:
            known[name] = name
    constant = set(graph.initializers)
    for node in graph:
        inputs = [v.name for v in node.inputs if v is not None and v.name is not None]
        if node.op_type != "Constant" and not (inputs and all(n in constant for n in inputs)):
            continue
        constant.update(str(o.name) for o in node.outputs)
        parents = {known[n] for n in inputs if n in known}
        if len(parents) == 1 and len(node.outputs) == 1:
            (parent,) = parents
            step = "" if node.op_type in _MOVES else f".{node.op_type.lower()}"
            known[str(node.outputs[0].name)] = parent + step
    return {value: weight for value, weight in known.items() if value != weight}


def _name_folded(graph: ir.Graph, lineage: Mapping[str, str]) -> None:
    for value in list(graph.initializers.values()):
        name = lineage.get(str(value.name))
        if name is not None:
            graph.initializers.pop(str(value.name))
            value.name = _free(name, graph, ".folded")
            graph.initializers[value.name] = value
    for value in list(graph.initializers.values()):
        # Both forms were there when it was named; folding inside a branch may have used up the other one.
        base = str(value.name).removesuffix(".T")
        if base not in graph.initializers:
            graph.initializers.pop(str(value.name))
            value.name = base
            graph.initializers[base] = value
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.const_value.name = value.name


# -- outputs -------------------------------------------------------------------------------------------------


def _output_names(source: Any, program: ExportedProgram) -> list[str]:
    """The module's ``output_names``, the keys of a returned dict, else ``output``, ``output_1`` ..."""
    count = len(program.graph_signature.user_outputs)
    given = getattr(source, "output_names", None)
    if isinstance(given, (tuple, list)) and len(given) == count:
        return [str(n) for n in given]
    spec = program.call_spec.out_spec
    keys = spec.context if spec is not None and spec.type is dict else ()
    if isinstance(keys, (tuple, list)) and len(keys) == count and all(isinstance(k, str) for k in keys):
        return list(keys)
    return ["output", *(f"output_{i}" for i in range(1, count))]


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    taken |= {o.name for node in graph.all_nodes() for o in node.outputs}
    if len(names) != len(graph.outputs) or len(set(map(id, graph.outputs))) != len(names):
        return
    for value, name in zip(graph.outputs, names, strict=True):
        if name not in taken and not value.is_graph_input() and not value.is_initializer():
            value.name = name


# -- provenance ----------------------------------------------------------------------------------------------


def _scope(node: ir.Node) -> str:
    """Path of the innermost module that ``node`` was traced in; empty at the top or when it is not known."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _trim(model: ir.Model) -> None:
    """Each node keeps its scope and source line; the traces, which hold whole paths and much text, go."""
    for node in model.graph.all_nodes():
        props = node.metadata_props
        if scope := _scope(node):
            props[SCOPE] = scope
        if source := source_line(props.get("pkg.torch.onnx.stack_trace", "")):
            props[SOURCE] = source
        for key in _NOISE:
            props.pop(key, None)
    for key in [k for k in model.graph.metadata_props if k.startswith("pkg.torch.export")]:
        del model.graph.metadata_props[key]


# -- writing -------------------------------------------------------------------------------------------------


def _save(model: ir.Model, out: Path, external: bool | None) -> None:
    """Write aside, then rename; the old files stay whole when writing fails."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = f"{out.name}.data"
    beside = size > EXTERNAL_BYTES if external is None else external
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        ir.save(model, aside / out.name, external_data=data if beside else None)
        if beside:
            os.replace(aside / data, out.with_name(data))
        os.replace(aside / out.name, out)
        if not beside:
            out.with_name(data).unlink(missing_ok=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
