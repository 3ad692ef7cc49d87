"""Which calls write to their arguments, and which of a program's placeholders are written to."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from qcompiler.backends.torch.names import op_name

# Schemas that do not say so: with the flag at the first index true, the arguments at the others are written to.
_HIDDEN = {
    "aten.batch_norm.default": (5, (3, 4)),
    "aten.native_batch_norm.default": (5, (3, 4)),
    "aten.cudnn_batch_norm.default": (5, (3, 4)),
    "aten.miopen_batch_norm.default": (5, (3, 4)),
    "aten.instance_norm.default": (5, (3, 4)),
}
# Schemas that do not say that a result may be an argument itself or a view of it.
_HIDDEN_VIEWS = frozenset(
    f"aten.{name}"
    for name in [
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "type_as",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "meshgrid",
        "einsum",
    ]
)


def written_placeholders(module: fx.GraphModule) -> set[str]:
    """Names of the placeholders of ``module`` whose storage some call in it writes to, through views as well."""
    roots: dict[fx.Node, frozenset[str]] = {}
    written: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            roots[node] = frozenset([node.name])
            continue
        inputs = {n: roots.get(n, frozenset()) for n in node.all_input_nodes}
        if node.op != "call_function":
            continue
        if isinstance(node.target, HigherOrderOperator):
            # Which operand is which input of a subgraph differs by operator; all count when anything is written.
            reached = frozenset[str]().union(*inputs.values())
            if any(_writes_inside(getattr(module, str(n.target), None)) for n in inputs if n.op == "get_attr"):
                written |= reached
            roots[node] = reached
        else:
            for argument in written_arguments(node):
                written |= roots.get(argument, frozenset())
            roots[node] = frozenset[str]().union(*(inputs[n] for n in _viewed(node) if n in inputs))
    return written


def effect(node: fx.Node, has_results: bool) -> str | None:
    """``write`` for a call that writes to an argument, ``check`` for one that only asserts or returns nothing."""
    if written_arguments(node):
        return "write"
    if isinstance(node.target, HigherOrderOperator):
        owner = node.graph.owning_module
        inside = [getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        if any(_writes_inside(m) for m in inside):
            return "write"
    return None if has_results else "check"


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that the call ``node`` writes to."""
    if not isinstance(node.target, OpOverload):
        return []
    found: list[fx.Node] = []
    for position, (argument, value) in enumerate(_bound(node)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _nodes(value)
        flag = _HIDDEN.get(op_name(node.target))
        if flag is not None and position in flag[1] and len(node.args) > flag[0] and node.args[flag[0]]:
            found += _nodes(value)
    return found


def _viewed(node: fx.Node) -> list[fx.Node]:
    """The argument nodes of which a result may be a view (or the argument itself)."""
    if not isinstance(node.target, OpOverload):
        return list(node.all_input_nodes)  # getitem of a list of views
    if op_name(node.target).rpartition(".")[0] in _HIDDEN_VIEWS:
        return list(node.all_input_nodes)
    labels = {"*"}  # what a list of views is of
    for result in node.target._schema.returns:
        labels |= _labels(result)
    return [n for argument, value in _bound(node) if labels & _labels(argument) for n in _nodes(value)]


def _labels(argument: Any) -> set[str]:
    info = argument.alias_info
    return set() if info is None else {*info.before_set, *info.after_set}


def _bound(node: fx.Node) -> list[tuple[Any, Any]]:
    """The schema's arguments with what the call passes for them."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    pairs = list(zip(arguments, node.args, strict=False))
    by_name = {a.name: a for a in arguments}
    return pairs + [(by_name[k], v) for k, v in node.kwargs.items() if k in by_name]


def _nodes(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    return [n for v in value for n in _nodes(v)] if isinstance(value, (list, tuple)) else []


def _writes_inside(module: Any) -> bool:
    if not isinstance(module, fx.GraphModule):
        return False
    return any(
        written_arguments(n) or (n.op == "get_attr" and _writes_inside(getattr(module, str(n.target), None)))
        for n in module.graph.nodes
    )
