"""A graph of the ``aten`` dialect as a ``torch.fx.GraphModule`` that is called as the exported program was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.inputs import InputCheck
from qcompiler.backends.torch.names import from_atom, target_of
from qcompiler.backends.torch.payload import tensor_of
from qcompiler.backends.torch.specs import parse_spec
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Attr, Graph, Hole, Op, Value

Lower = Callable[[Op], Callable[..., Any] | None]
"""What to call for an op that torch has no operator for (``q.linear``): it gets the operands, then the attributes."""
Tensors = Callable[[Value], torch.Tensor]
"""The tensor of a constant or of a default that is not written to; by default its values."""
CUSTOM = "qcompiler"
"""Key in a node's ``custom`` metadata: the name and the source line of the op that it was made of. Export and
``.pt2`` files keep it, so that sites keep their names."""


def to_graph_module(
    graph: Graph, lower: Lower | None = None, *, check_inputs: bool = True, tensors: Tensors | None = None
) -> fx.GraphModule:
    """The module that ``graph`` describes, in eval mode; inverse of :func:`qcompiler.backends.torch.capture.load`.

    Arguments and result have the structure of the captured program. Constants become parameters and buffers
    under their qualified names and share memory with their payloads; what the program writes to is copied,
    so that calls change this module only. ``lower`` gives what to call for an op outside torch; absent
    operands are passed as None. With ``check_inputs`` a call with other shapes or element types than
    captured raises InputError. ``tensors`` gives other tensors than the values of constants, of their types and
    shapes. Raises InputError for a graph of another dialect and for an op that neither
    torch nor ``lower`` knows.
    """
    if graph.dialect != "aten":
        raise InputError(f"a graph of dialect {graph.dialect!r} cannot be emitted as a torch module")
    emitter = _Emitter(lower, tensors)
    body = emitter.body(graph, graph.meta.get("returns"), graph.meta.get("mutations", ()))
    in_spec, out_spec = _spec(graph, "in_spec"), _spec(graph, "out_spec")
    if in_spec is not None:
        names = [str(n) for n in graph.meta.get("arg_names", ())]
        body._codegen = _PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec))
    module = emitter.module(graph.name)
    if check_inputs and in_spec is not None:
        module.register_forward_pre_hook(InputCheck.of(graph, in_spec), with_kwargs=True)
    return module.eval()


def _spec(graph: Graph, key: str) -> pytree.TreeSpec | None:
    text = graph.meta.get(key)
    return parse_spec(text) if text else None


class _Emitter:
    """One body: the FX graph under construction and the node of each value."""

    def __init__(self, lower: Lower | None, tensors: Tensors | None = None) -> None:
        self.root, self.lower, self.tensors = nn.Module(), lower, tensors
        self.placed: list[tuple[str, torch.Tensor, bool]] = []
        self.fx = fx.Graph()
        self.nodes: dict[Value, fx.Node] = {}

    def body(self, graph: Graph, returns: Attr, mutations: tuple[Any, ...] = ()) -> fx.Graph:
        """Emit all of ``graph``. ``returns`` is the output with holes; outputs behind those are written back."""
        for value in graph.inputs:
            if value.payload is None:
                self.nodes[value] = self.fx.create_node("placeholder", value.name, name=_identifier(value.name))
        for value in graph.inputs:
            if value.payload is not None:
                self.nodes[value] = self.constant(value, copy=True)
        for value in graph.consts.values():
            self.nodes[value] = self.constant(value)
        for op in graph:
            self.op(op)
        outputs = [self.nodes[v] for v in graph.outputs]
        written: dict[fx.Node, fx.Node] = {}
        back = outputs[len(outputs) - len(mutations) :] if mutations else []
        for (_, target), node in zip(mutations, back, strict=True):
            copy = self.fx.call_function(torch.ops.aten.copy_.default, (self.target(graph, target), node))
            written[node] = copy  # the program returns what it has written, as its own module does
        outputs = [written.get(n, n) for n in outputs]
        result = tuple(outputs) if returns is None else filled(returns, outputs, tuple)
        self.fx.output(result)
        self.fx.lint()
        return self.fx

    def module(self, name: str) -> fx.GraphModule:
        """The emitted body as a module that owns its constants."""
        out = fx.GraphModule(self.root, self.fx, name)
        # It takes over what the code reads, as persistent; the other names of tied tensors are not read.
        for path, tensor, persistent in self.placed:
            *parts, leaf = path.split(".")
            home: nn.Module = out
            for part in parts:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                home.register_parameter(leaf, tensor)
            else:
                home._buffers.pop(leaf, None)
                home.register_buffer(leaf, tensor, persistent=persistent)
        return out

    def target(self, graph: Graph, name: str) -> fx.Node:
        for value in graph.inputs:
            if name in (value.meta.get("target", value.name), *value.meta.get("aliases", ())):
                return self.nodes[value]
        raise InputError(f"the graph writes to {name!r}, which is none of its inputs")

    def constant(self, value: Value, *, copy: bool = False) -> fx.Node:
        assert value.payload is not None
        tensor = tensor_of(value.payload) if self.tensors is None or copy else self.tensors(value)
        if tensor.is_meta:
            raise InputError(f"constant {value.name!r} has no values")
        role = value.meta.get("role", "buffer")
        if copy:
            tensor = tensor.detach().clone()
        is_parameter = role == "parameter" and (tensor.is_floating_point() or tensor.is_complex())
        if is_parameter and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        elif not is_parameter:
            tensor = tensor.detach()
        names = [str(value.meta.get("target", value.name)), *map(str, value.meta.get("aliases", ()))]
        persistent = bool(value.meta.get("persistent", role != "tensor"))
        places = [_register(self.root, n, tensor, persistent) for n in names]
        self.placed += [(place, tensor, persistent) for place in places]
        return self.fx.create_node("get_attr", places[0], name=_identifier(value.name))

    def op(self, op: Op) -> None:
        operands = [self.node_of(op, v) if v is not None else None for v in op.operands]
        target = self.lower(op) if self.lower is not None else None
        if target is not None:
            kwargs = {k: v for k, v in op.attrs.items() if k not in ("args", "kwargs", "unpack")}
            node = self.fx.create_node("call_function", target, tuple(operands), kwargs, name=self.name(op))
        elif op.name.startswith("q.") or "args" not in op.attrs:
            raise InputError(f"{op.name} '{op.label}' has no implementation in torch here")
        else:
            node = self.call(op, operands)
        if op.loc.scope:
            node.meta["nn_module_stack"] = {op.loc.scope: (op.loc.scope, "")}
        if op.loc.name:
            node.meta["custom"] = {CUSTOM: [op.loc.name, op.loc.source]}
        if not op.attrs.get("unpack", len(op.results) > 1):
            for result in op.results:
                self.nodes[result] = node
            return
        for i, result in enumerate(op.results):
            if result.uses:
                call = target_of("py.operator.getitem")
                name = _identifier(result.name)
                self.nodes[result] = self.fx.create_node("call_function", call, (node, i), name=name)

    def call(self, op: Op, operands: list[fx.Node | None]) -> fx.Node:
        regions = {key: self.region(op, key, region) for key, region in op.regions.items()}
        target = target_of(op.name)
        # Schemas take lists; the operators with subgraphs insist on tuples.
        kind = list if isinstance(target, torch._ops.OpOverload) else tuple
        args = filled(op.attrs["args"], operands, kind, regions)
        kwargs = {k: filled(v, operands, kind, regions) for k, v in op.attrs.get("kwargs", ())}
        return self.fx.create_node("call_function", target, tuple(args), kwargs, name=self.name(op))

    def region(self, op: Op, key: str, region: Graph) -> fx.Node:
        name = _free(self.root, _identifier(key))
        self.root.add_module(name, region_module(region, key, self.lower, self.tensors))
        return self.fx.get_attr(name)

    def node_of(self, op: Op, value: Value) -> fx.Node:
        found = self.nodes.get(value)
        if found is None:
            raise InputError(
                f"{op.name} '{op.label}' reads {value!r} of an enclosing graph, which torch cannot express"
            )
        return found

    @staticmethod
    def name(op: Op) -> str:
        single = len(op.results) == 1 and not op.attrs.get("unpack")
        return _identifier(op.results[0].name if single else op.label)


def region_module(
    region: Graph, name: str, lower: Lower | None = None, tensors: Tensors | None = None
) -> fx.GraphModule:
    """A region as the module that the operator around it calls."""
    inner = _Emitter(lower, tensors)
    inner.body(region, region.meta.get("returns"))
    return inner.module(name)


def filled(
    skeleton: Attr,
    operands: Sequence[Any],
    kind: type,
    regions: Mapping[str, Any] | None = None,
) -> Any:
    """``skeleton`` of a call with its holes filled, atoms turned back, sequences made ``kind``.

    ``operands`` and ``regions`` are FX nodes, or tensors and modules.
    """
    if isinstance(skeleton, Hole):
        return operands[skeleton.index]
    if isinstance(skeleton, Atom):
        if skeleton.kind == "region":
            return (regions or {})[skeleton.text]
        return from_atom(skeleton)
    if isinstance(skeleton, tuple):
        return kind(filled(s, operands, kind, regions) for s in skeleton)
    return skeleton


def _identifier(name: str) -> str:
    """``name`` as FX can print it; FX itself keeps such names apart."""
    word = re.sub(r"\W", "_", name)
    return word if word[:1].isalpha() or word.startswith("_") else f"_{word}"


def _free(root: nn.Module, name: str) -> str:
    candidate, n = name, 0
    while hasattr(root, candidate):
        n += 1
        candidate = f"{name}_{n}"
    return candidate


def _register(root: nn.Module, name: str, tensor: torch.Tensor, persistent: bool) -> str:
    """Make ``tensor`` an attribute of ``root`` at the dotted path ``name``; returns where it came to stand.

    Where a tensor already stands at a prefix of the path (``proj.weight`` before ``proj.weight.scale``),
    the last dot becomes an underscore.
    """
    *path, leaf = name.split(".")
    home = root
    for part in path:
        inner = home._modules.get(part)
        if inner is None:
            if hasattr(home, part):
                return _register(root, "_".join(name.rsplit(".", 1)), tensor, persistent)
            inner = nn.Module()
            home.add_module(part, inner)
        home = inner
    leaf = leaf if leaf and not hasattr(home, leaf) else _free(home, _identifier(leaf or "tensor"))
    if isinstance(tensor, nn.Parameter):
        home.register_parameter(leaf, tensor)
    else:
        home.register_buffer(leaf, tensor, persistent=persistent)
    return ".".join([*path, leaf])
