"""Names for the symbolic sizes of an exported program: the user's own, else d0, d1 ... in order.

FX calls a size ``s77``, a data-dependent one ``u0``; both change from run to run and mean nothing to a
reader.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qcompiler.errors import InputError

_SYMBOL = re.compile(r"\b[a-z]+\d+\b")


def program_symbols(program: ExportedProgram, sizes: Mapping[str, Sequence[str]] | None = None) -> dict[Any, str]:
    """Each symbol of ``program`` with its name: the ``Dim`` name where the program still knows it.

    ``sizes``: what the sizes of inputs are called, by input, for a program that has forgotten.
    """
    return name_symbols(_sizes(program), _given_names(program) or _told_names(program, sizes or {}))


def _told_names(program: ExportedProgram, sizes: Mapping[str, Sequence[str]]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for node in program.graph_module.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        told = sizes.get(node.name, ()) if node.op == "placeholder" else ()
        for size, name in zip(shape, told, strict=False):
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression is not None and expression.is_symbol and not _SYMBOL.fullmatch(name):
                found[expression] = name
    return found


def name_symbols(sizes: Iterable[Any], given: Mapping[Any, str]) -> dict[Any, str]:
    """Names for the symbols in ``sizes`` (SymInts and the like), in order; ``given`` ones where they are unique."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    count = {"d": 0, "u": 0}
    for size in sizes:
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            if symbol in names:
                continue
            name = given.get(symbol, "")
            if not name.isidentifier() or keyword.iskeyword(name) or name in taken:
                kind = "u" if str(symbol).startswith(("u", "zuf")) else "d"
                while (name := f"{kind}{count[kind]}") in taken or name in given.values():
                    count[kind] += 1
            names[symbol] = name
            taken.add(name)
    return names


def _sizes(program: ExportedProgram) -> Iterable[Any]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                yield from symbolic(node.meta.get("val"))


def symbolic(value: Any) -> Iterable[Any]:
    """The symbolic numbers in a node's example value: itself, its sizes, or those of its elements."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if hasattr(value.node.expr, "free_symbols"):
            yield value
    elif isinstance(value, torch.Tensor):
        for size in value.shape:
            yield from symbolic(size)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from symbolic(item)


def _given_names(program: ExportedProgram) -> dict[Any, str]:
    """What the user called each symbol. A program read from a file has forgotten."""
    for size in _sizes(program):
        env = size.node.shape_env
        called: dict[str, str] = getattr(env, "source_name_to_debug_name", {}) or {}
        symbols: dict[str, Any] = getattr(env, "source_to_var", {}) or {}
        found = {symbols[s]: n for s, n in called.items() if s in symbols}
        # An automatic dimension is called after the symbol itself; that is no name.
        return {s: n for s, n in found.items() if hasattr(s, "free_symbols") and not _SYMBOL.fullmatch(n)}
    return {}


def refuse_fixed(program: ExportedProgram, forward: Any, args: tuple[Any, ...], dynamic_shapes: Any) -> None:
    """InputError when a size that was asked to be dynamic is a plain number in ``program``.

    The ONNX exporter settles such a conflict by fixing the size without a word.
    """
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = program.graph_signature.user_inputs
    for name, spec in zip(names, leaf_specs(forward, args, dynamic_shapes), strict=False):
        node = placeholders.get(str(name))
        value = node.meta.get("val") if node is not None else None
        if not isinstance(value, torch.Tensor):
            continue
        axes = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        for axis, asked in axes:
            if _is_dynamic(asked) and isinstance(value.shape[axis], int):
                called = f" ({asked.__name__!r})" if hasattr(asked, "__name__") else ""
                raise InputError(
                    f"size {axis} of input {name!r} was asked to be dynamic{called}, "
                    f"but the model fixes it to {value.shape[axis]}"
                )


def leaf_specs(forward: Any, args: tuple[Any, ...], dynamic_shapes: Any) -> list[Any]:
    """``dynamic_shapes`` of each flattened argument: None, a tuple with an entry per axis, or axis -> entry."""
    if isinstance(dynamic_shapes, Mapping):
        by_name: list[Any] = []
        for parameter in inspect.signature(forward).parameters.values():
            spec = dynamic_shapes.get(parameter.name)
            many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            by_name += (spec or ()) if many else (spec,)
        dynamic_shapes = by_name
    given = list(dynamic_shapes or ())[: len(args)]
    given += [None] * (len(args) - len(given))
    return [s for value, spec in zip(args, given, strict=True) for s in _leaves(value, spec)]


def _leaves(value: Any, spec: Any) -> list[Any]:
    if type(value) in (list, tuple):
        specs = list(spec) if spec is not None else [None] * len(value)
        return [s for v, inner in zip(value, specs, strict=False) for s in _leaves(v, inner)]
    if type(value) is dict:
        return [s for k, v in value.items() for s in _leaves(v, (spec or {}).get(k))]
    leaves = pytree.tree_leaves(value)
    return [spec] if len(leaves) == 1 and leaves[0] is value else [None] * len(leaves)


def _is_dynamic(asked: Any) -> bool:
    return asked is not None and not isinstance(asked, int) and asked not in (Dim.AUTO, Dim.STATIC)
