"""An exported program as a graph of the ``aten`` dialect, nothing lost: see :func:`load` for what stands where."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from qcompiler.backends.torch import canary, subclasses, writes
from qcompiler.backends.torch.archive import open_lazily
from qcompiler.backends.torch.dims import program_symbols
from qcompiler.backends.torch.names import op_name, to_atom
from qcompiler.backends.torch.notes import Notes
from qcompiler.backends.torch.payload import TorchPayload, element_of, same_storage
from qcompiler.backends.torch.specs import spec_text
from qcompiler.backends.torch.stack import loc_of
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Attr, Dim, Graph, Hole, Loc, OpaqueType, TensorType, Type, Value
from qcompiler.payload import ArrayPayload, Payload
from qcompiler.text import DENSE_LIMIT

_ROLES = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "tensor",
}
_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "input",
}


def load(program: ExportedProgram | str | Path, notes: Notes | None = None) -> Graph:
    """The graph of ``program``, or of the ``.pt2`` file at a path, whose weights then stay in the file.

    Each call is one op named ``namespace.op.overload`` whose attributes ``args`` and ``kwargs`` are the
    call with a ``Hole`` for each operand; a call that returns several values has ``unpack`` and a result
    for each. Subgraphs are regions, named in the call by ``region`` atoms. A parameter, buffer or lifted
    tensor is a constant under its qualified name (``meta``: its ``role``, its ``aliases`` when tied); one
    that the program writes to is an input with that value as its default. An op with ``effect`` in its
    ``meta`` does more than compute its results. ``graph.meta`` holds the calling convention: ``in_spec``,
    ``out_spec``, ``arg_names``, ``returns`` (the output with holes), ``mutations`` (what trailing outputs
    are written back to), ``ranges`` of the symbolic sizes and the file's ``metadata``. ``notes`` are those of
    the file that a program was read from. Raises InputError, in one sentence, for what cannot be carried.
    """
    stored: Mapping[str, Payload] = {}
    if not isinstance(program, ExportedProgram):
        path = Path(program)
        program, stored = open_lazily(path)
        notes = Notes.inside(path)
    notes = notes or Notes()
    program, classes = subclasses.plain(program)
    symbols = {str(s): name for s, name in program_symbols(program, notes.sizes).items()}
    graph = Graph("main", "aten")
    capture = BodyReader(symbols)
    _declare(graph, capture, program, stored)
    returned = capture.body(program.graph_module, graph)
    _call_convention(graph, program, capture, returned)
    subclasses.tell(graph, classes)
    canary.uproot(graph)
    if notes.metadata:
        graph.meta["metadata"] = tuple(notes.metadata.items())
    return graph


# -- inputs and constants ------------------------------------------------------------------------------------


def _declare(graph: Graph, capture: BodyReader, program: ExportedProgram, stored: Mapping[str, Payload]) -> None:
    """Inputs, constants and written buffers of ``graph``, and what each placeholder means."""
    nodes = [n for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    written = writes.written_placeholders(program.graph_module)
    lifted: dict[Any, list[tuple[fx.Node, InputSpec, Payload]]] = {}
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            value = graph.add_input(node.name, capture.type_of(node.meta.get("val")))
            capture.env[node] = value
            if node.name in written:
                value.meta["written"] = True
        elif spec.kind in _ROLES and subclasses.is_wrapped(tensor := program.state_dict.get(str(spec.target))):
            capture.wrapped[node] = subclasses.declare(graph, tensor, str(spec.target))
        elif spec.kind in _ROLES:
            payload, key = _payload(program, spec, stored)
            lifted.setdefault(key, []).append((node, spec, payload))
        else:
            raise InputError(
                f"the program has an input {spec.target!r} of kind {spec.kind.name}, which cannot be captured"
            )
    updated = {str(s.target) for s in program.graph_signature.output_specs if s.kind in _MUTATIONS}
    for tied in lifted.values():
        _declare_one(graph, capture, tied, any(n.name in written or s.target in updated for n, s, _ in tied))


def _declare_one(
    graph: Graph, capture: BodyReader, tied: list[tuple[fx.Node, InputSpec, Payload]], written: bool
) -> None:
    """One value for the placeholders that are one tensor."""
    node, spec, payload = tied[0]
    target = str(spec.target)
    name = graph.fresh(target)
    value = (
        graph.add_const(name, payload)
        if not written
        else graph.add_input(name, capture.type_of(node.meta["val"]), payload)
    )
    value.meta["role"] = _ROLES[spec.kind]
    if name != target:
        value.meta["target"] = target  # forward has an argument of that name
    if spec.kind is InputKind.BUFFER and spec.persistent is False:
        value.meta["persistent"] = False
    if aliases := tuple(str(s.target) for _, s, _ in tied[1:]):
        value.meta["aliases"] = aliases
    for other, _, _ in tied:
        capture.env[other] = value


def _payload(program: ExportedProgram, spec: InputSpec, stored: Mapping[str, Payload]) -> tuple[Payload, Any]:
    """The value of a parameter, buffer or lifted tensor, and a key that tied ones share."""
    name = str(spec.target)
    if (found := stored.get(name)) is not None:
        return found, id(found)
    tensor = program.state_dict.get(name)
    if tensor is None:
        tensor = program.constants.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"the program has no value for {name!r}")
    payload: Payload = TorchPayload(tensor, name)
    if spec.kind is InputKind.CONSTANT_TENSOR and payload.size <= DENSE_LIMIT:
        # A literal of the program: as text it shows its values and can be read again.
        payload = ArrayPayload(payload.array().copy(), payload.dtype)
    return payload, same_storage(tensor)


# -- the calling convention ----------------------------------------------------------------------------------


def _call_convention(graph: Graph, program: ExportedProgram, capture: BodyReader, returned: Attr) -> None:
    specs = program.graph_signature.output_specs
    mutations: list[tuple[str, str]] = []
    user: list[Attr] = []
    for item, spec in zip(returned, specs, strict=True):
        if spec.kind in _MUTATIONS:
            if not isinstance(item, Hole):
                raise InputError(f"the program writes a constant to {spec.target!r}, which cannot be captured")
            mutations.append((_MUTATIONS[spec.kind], str(spec.target)))
        elif spec.kind is OutputKind.USER_OUTPUT:
            user.append(item)
        else:
            raise InputError(f"the program has an output of kind {spec.kind.name}; only inference is captured")
    # Mutations come first in a program; here what the user sees does.
    outputs = list(graph.outputs)
    written = [outputs[i.index] for i, s in zip(returned, specs, strict=True) if s.kind in _MUTATIONS]
    seen = [outputs[i.index] for i in user if isinstance(i, Hole)]
    for slot, value in enumerate([*seen, *written]):
        graph.set_output(slot, value)
    order = iter(range(len(seen)))
    for key, what, call_spec in (
        ("in_spec", "arguments", program.call_spec.in_spec),
        ("out_spec", "results", program.call_spec.out_spec),
    ):
        if call_spec is not None:
            graph.meta[key] = spec_text(call_spec, what)
    graph.meta["arg_names"] = tuple(_arg_names(program))
    graph.meta["returns"] = tuple(Hole(next(order)) if isinstance(i, Hole) else i for i in user)
    if mutations:
        graph.meta["mutations"] = tuple(mutations)
    if ranges := tuple(_ranges(program, capture.symbols)):
        graph.meta["ranges"] = ranges


def _arg_names(program: ExportedProgram) -> list[str]:
    """Names of the arguments, positional ones first, as ``program.module()`` has them."""
    signature = program.module_call_graph[0].signature
    if signature is not None and signature.forward_arg_names:
        return list(signature.forward_arg_names)
    spec = program.call_spec.in_spec
    if spec is None:
        return []
    args, kwargs = spec.children()
    return [f"arg_{i}" for i in range(args.num_children)] + list(kwargs.context or ())


def _ranges(program: ExportedProgram, symbols: Mapping[str, str]) -> Iterator[tuple[str, int | None, int | None]]:
    """``(name, smallest, largest)`` of each symbolic size, None where unbounded."""
    for symbol, bounds in program.range_constraints.items():
        if str(symbol) in symbols:
            yield symbols[str(symbol)], _bound(bounds.lower), _bound(bounds.upper)


def _bound(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


# -- bodies --------------------------------------------------------------------------------------------------


class BodyReader:
    """What is known while one program is read: the value of each node, the name of each symbol."""

    def __init__(self, symbols: Mapping[str, str]) -> None:
        self.symbols = symbols
        self.env: dict[fx.Node, Value] = {}
        self.named: set[str] = set()
        self.wrapped: dict[fx.Node, subclasses.Inner] = {}
        self._picks: dict[fx.Node, list[list[fx.Node]] | None] = {}
        self._symbol = re.compile(r"\b(?:" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None

    def body(self, module: fx.GraphModule, graph: Graph) -> Attr:
        """Append the ops and outputs of ``module`` to ``graph``; returns the output with holes."""
        returned: Attr = None
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.call(node, module, graph)
            elif node.op == "get_attr":
                self.attribute(node, module, graph)
            elif node.op == "output":
                values: list[Value] = []
                returned = self.skeleton(node.args[0], values, {})
                for value in values:
                    graph.add_output(value)
            elif node.op != "placeholder":
                raise InputError(f"node {node.name!r} is a {node.op}; only exported programs can be captured")
        return returned

    def call(self, node: fx.Node, module: fx.GraphModule, graph: Graph) -> None:
        if self._is_pick(node):
            return
        if (inner := subclasses.accessed(node, self.wrapped)) is not None:
            if isinstance(inner, Value):
                self.env[node] = inner
            else:
                self.wrapped[node] = inner
            return
        regions: dict[str, fx.GraphModule] = {}
        operands: list[Value] = []
        regions_of = {n: m for n in node.all_input_nodes if (m := _submodule(n, module)) is not None}
        args = tuple(self.skeleton(a, operands, regions_of, regions) for a in node.args)
        kwargs = tuple((k, self.skeleton(v, operands, regions_of, regions)) for k, v in node.kwargs.items())
        attrs: dict[str, Attr] = {"args": args}
        if kwargs:
            attrs["kwargs"] = kwargs
        name = op_name(node.target)
        if name == "aten._assert_scalar.default":
            attrs["args"] = tuple(self.renamed(a) if isinstance(a, str) else a for a in args)
        picks = self.picks(node)
        results = self.results(node, picks, graph)
        if picks is not None:
            attrs["unpack"] = True
        op = graph.create(name, operands, attrs, results, loc=self.loc(node))
        if effect := writes.effect(node, bool(results)):
            op.meta["effect"] = effect
        for key, body in regions.items():
            self.region(body, graph, op, key)
        if picks is None:
            if op.results:
                self.env[node] = op.results[0]
            return
        for i, users in enumerate(picks):
            for user in users:
                self.env[user] = op.results[i]

    def region(self, body: fx.GraphModule, graph: Graph, op: Any, key: str) -> None:
        region = graph.add_region(op, key)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                name = region.fresh(node.name)
                self.env[node] = region.add_input(name, self.type_of(node.meta.get("val")))
        region.meta["returns"] = self.body(body, region)

    def attribute(self, node: fx.Node, module: fx.GraphModule, graph: Graph) -> None:
        """A ``get_attr``: a subgraph, which its caller takes, or a tensor that export did not lift."""
        if _submodule(node, module) is not None:
            return
        tensor: Any = module
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part, None)
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"node {node.name!r} reads {node.target!r}, which is no tensor")
        value = graph.add_const(graph.fresh(str(node.target)), TorchPayload(tensor, str(node.target)))
        value.meta["role"] = "tensor"
        self.env[node] = value

    # -- several results -------------------------------------------------------------------------------------

    def picks(self, node: fx.Node) -> list[list[fx.Node]] | None:
        """For a call that returns a sequence of which only elements are used: the ``getitem`` nodes of each one."""
        if node not in self._picks:
            self._picks[node] = _picks(node)
        return self._picks[node]

    def _is_pick(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return isinstance(source, fx.Node) and _picked(node, source) is not None and self.picks(source) is not None

    def results(self, node: fx.Node, picks: list[list[fx.Node]] | None, graph: Graph) -> list[tuple[str, Type]]:
        val = node.meta.get("val")
        if picks is None:
            if val is None and not node.users:
                return []
            return [(graph.fresh(node.name), self.type_of(val))]
        taken: set[str] = set()
        out: list[tuple[str, Type]] = []
        for i, (item, users) in enumerate(zip(val or (), picks, strict=True)):
            name = graph.fresh(users[0].name if users else f"{node.name}.{i}")
            while name in taken:
                name += "_"
            taken.add(name)
            out.append((name, self.type_of(item)))
        return out

    def loc(self, node: fx.Node) -> Loc:
        """Where ``node`` comes from; its scope is the qualified name of the module that was called."""
        return loc_of(node, self.named)

    # -- values, types ---------------------------------------------------------------------------------------

    def skeleton(
        self,
        arg: Any,
        operands: list[Value],
        regions_of: Mapping[fx.Node, fx.GraphModule],
        regions: dict[str, fx.GraphModule] | None = None,
    ) -> Attr:
        """``arg`` with a hole for each node, whose value is appended to ``operands``."""
        if isinstance(arg, fx.Node):
            if arg in regions_of and regions is not None:
                key = str(arg.target).rpartition(".")[2]
                regions[key] = regions_of[arg]
                return Atom("region", key)
            if arg not in self.env:
                raise InputError(f"node {arg.name!r} is used as a value, but is a subgraph or gives none")
            operands.append(self.env[arg])
            return Hole(len(operands) - 1)
        if isinstance(arg, (list, tuple)):
            return tuple(self.skeleton(a, operands, regions_of, regions) for a in arg)
        if arg is None or isinstance(arg, (bool, str)) or type(arg) in (int, float):
            return arg
        if (atom := to_atom(arg)) is not None:
            return atom
        raise InputError(f"a call takes {type(arg).__name__} {str(arg)[:60]!r}, which cannot be captured")

    def renamed(self, text: str) -> str:
        return self._symbol.sub(lambda m: self.symbols[m[0]], text) if self._symbol is not None else text

    def type_of(self, val: Any) -> Type:
        """The type of a node whose example value is ``val``: a tensor's, or the host's word for anything else."""
        if isinstance(val, torch.Tensor):
            return TensorType(element_of(val.dtype), tuple(map(self.dim, val.shape)))
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return OpaqueType(f"{type(val).__name__} {self.renamed(str(val.node.expr))}")
        if isinstance(val, (list, tuple)):
            return OpaqueType(f"{type(val).__name__}[{len(val)}]")
        if val is None or isinstance(val, (bool, int, float, str)):
            return OpaqueType("None" if val is None else f"{type(val).__name__} {val!r}")
        return OpaqueType(type(val).__name__)

    def dim(self, size: Any) -> Dim:
        return int(size) if isinstance(size, int) else self.renamed(str(size.node.expr))


def _submodule(node: fx.Node, module: fx.GraphModule) -> fx.GraphModule | None:
    if node.op != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, fx.GraphModule) else None


def _picks(node: fx.Node) -> list[list[fx.Node]] | None:
    val = node.meta.get("val")
    if not isinstance(val, (list, tuple)) or not val:
        return None
    found: list[list[fx.Node]] = [[] for _ in val]
    for user in node.users:
        index = _picked(user, node)
        if index is None or not 0 <= index < len(val):
            return None
        found[index].append(user)
    return found


def _picked(user: fx.Node, source: fx.Node) -> int | None:
    """The index when ``user`` is ``source[index]``."""
    if user.op != "call_function" or user.target is not operator.getitem or user.args[0] is not source:
        return None
    index = user.args[1]
    return index if type(index) is int else None
