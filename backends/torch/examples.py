"""Arguments that a graph can be exported with: tensors of its input types, and which of their sizes stay open."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.backends.torch.specs import parse_spec
from qcompiler.errors import InputError
from qcompiler.ir import Graph, OpaqueType, TensorType, Value

_WORD = re.compile(r"[A-Za-z_]\w*(?!\w*\()")
_FIRST, _STEP = 3, 2
"""Sizes of the open axes: 3, 5, 7 ... so that none is 0 or 1, which export would fix, and no two are equal."""


class Example(NamedTuple):
    """Arguments, and the dynamic shapes of ``torch.export.export`` by the name of the argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def example_of(graph: Graph) -> Example:
    """Arguments of zeros for ``graph``, symbolic sizes kept open; raises InputError for an input of another kind."""
    inputs = [v for v in graph.inputs if v.payload is None]
    sizes = _sizes(graph, inputs)
    dims = {
        name: Dim(name, min=low, max=high) for name, low, high in _ranges(graph, sizes) if low is None or low != high
    }
    leaves, shapes = [], []
    for value in inputs:
        leaf, shape = _leaf(value, sizes, dims)
        leaves.append(leaf)
        shapes.append(shape)
    spec = (
        parse_spec(str(graph.meta["in_spec"]))
        if "in_spec" in graph.meta
        else pytree.tree_structure((tuple(leaves), {}))
    )
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    told = iter(shapes)
    positional, by_name = (_told(child, told) for child in spec.children())
    names = [str(n) for n in graph.meta.get("arg_names", ())] or [v.name for v in inputs]
    return Example(tuple(args), dict(kwargs), dict(zip(names, positional, strict=False)) | dict(by_name))


def _told(spec: pytree.TreeSpec, shapes: Any) -> Any:
    """The next of ``shapes`` in the structure ``spec``; a container of another class than Python's own is a list."""
    if spec.is_leaf():
        return next(shapes)
    children = [_told(child, shapes) for child in spec.children()]
    if spec.type is dict:
        return dict(zip(spec.context, children, strict=True))
    return tuple(children) if spec.type is tuple else children


def _leaf(value: Value, sizes: Mapping[str, int], dims: Mapping[str, Dim]) -> tuple[Any, Any]:
    if isinstance(value.type, OpaqueType):
        kind, _, text = value.type.text.partition(" ")
        if kind == "SymInt":
            return _size(text, sizes, value), Dim.DYNAMIC
        if kind in ("None", "bool", "int", "float", "str"):
            return ast.literal_eval(text or kind), None
        raise InputError(f"input {value.name!r} is a {kind}, and a torch program takes tensors and numbers")
    element, shape = value.tensor.dtype, value.tensor.shape
    if element not in TO_TORCH or shape is None or any(d is None for d in shape):
        raise InputError(f"input {value.name!r} is of type {value.type}, of which no torch tensor can be made")
    tensor = torch.zeros(
        [d if isinstance(d, int) else _size(str(d), sizes, value) for d in shape], dtype=TO_TORCH[element]
    )
    # A sum or product of sizes is what the program makes of them: export finds that out itself.
    return tensor, {i: dims.get(d, Dim.AUTO) for i, d in enumerate(shape) if isinstance(d, str)} or None


def _sizes(graph: Graph, inputs: Sequence[Value]) -> dict[str, int]:
    """A size for every symbol in the types of the inputs, inside its range."""
    texts = [v.type.text for v in inputs if isinstance(v.type, OpaqueType) and v.type.text.startswith("Sym")]
    texts += [d for v in inputs if isinstance(v.type, TensorType) for d in v.type.shape or () if isinstance(d, str)]
    names = dict.fromkeys(w for t in texts for w in _WORD.findall(t.removeprefix("SymInt ")))
    ranges = {name: (low or 0, high) for name, low, high in graph.meta.get("ranges", ())}
    out = {}
    for i, name in enumerate(names):
        low, high = ranges.get(name, (0, None))
        size = max(_FIRST + _STEP * i, low)
        out[name] = size if high is None else min(size, high)
    return out


def _ranges(graph: Graph, sizes: Mapping[str, int]) -> list[tuple[str, int | None, int | None]]:
    """``(name, smallest, largest)`` of what is left open: a size with one value is none."""
    known = {name: (low, high) for name, low, high in graph.meta.get("ranges", ())}
    found = [(name, *known.get(name, (None, None))) for name in sizes]
    return [(name, low, high) for name, low, high in found if low is None or low != high]


def _size(text: str, sizes: Mapping[str, int], value: Value) -> int:
    """The value of a sum, difference, product or quotient of symbols and numbers."""

    def found(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=a, op=ast.Add(), right=b):
                return found(a) + found(b)
            case ast.BinOp(left=a, op=ast.Sub(), right=b):
                return found(a) - found(b)
            case ast.BinOp(left=a, op=ast.Mult(), right=b):
                return found(a) * found(b)
            case ast.BinOp(left=a, op=ast.FloorDiv(), right=b):
                return found(a) // found(b)
            case ast.UnaryOp(op=ast.USub(), operand=a):
                return -found(a)
        raise InputError(f"input {value.name!r} has a size {text!r}, of which no number can be made")

    try:
        return max(found(ast.parse(text, mode="eval").body), 1)
    except (SyntaxError, ZeroDivisionError):
        raise InputError(f"input {value.name!r} has a size {text!r}, of which no number can be made") from None
