"""Weights that are tensors of a class of their own (torchao's, for one), as the plain tensors that they are made of.

Such a class says by ``__tensor_flatten__`` which plain tensors it holds, and torch.export writes out what it does with
them: a program then reads them by ``export.access_subclass_inner_tensor``. No library is imported for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qcompiler.backends.torch.payload import TorchPayload
from qcompiler.backends.torch.quiet import one_sentence
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Value

ACCESS = "access_subclass_inner_tensor"
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Inner = dict[str, "Value | Inner"]
"""The values of one weight by attribute; a weight inside a weight has values of its own."""


def is_wrapped(tensor: Any) -> bool:
    """Whether ``tensor`` is of a class that holds other tensors."""
    fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return type(tensor) not in _PLAIN and not fake and hasattr(tensor, "__tensor_flatten__")


def class_of(tensor: Any) -> str:
    """``torchao.quantization.Int8Tensor``."""
    cls = type(tensor)
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(program: ExportedProgram) -> tuple[ExportedProgram, dict[str, str]]:
    """``program`` with the weights of which it does more than read their parts taken apart by torch, and the classes of
    those: qualified name -> class. Raises InputError where torch cannot."""
    names = {s.arg.name: str(s.target) for s in program.graph_signature.input_specs if s.target is not None}
    wrapped = {n: f for n, f in names.items() if is_wrapped(program.state_dict.get(f))}
    nodes = [n for n in program.graph_module.graph.nodes if n.op == "placeholder" and n.name in wrapped]
    if all(ACCESS in str(user.target) for n in nodes for user in n.users):
        return program, {}
    classes = {fqn: class_of(program.state_dict[fqn]) for fqn in wrapped.values()}
    with one_sentence(f"cannot take apart the {next(iter(classes.values()))} weights of the program"):
        return program.run_decompositions({}), classes


def tell(graph: Graph, classes: Mapping[str, str]) -> None:
    """Note on the parts that torch made of weights which class they were of."""
    for fqn, cls in classes.items():
        home, _, leaf = fqn.rpartition(".")
        prefix = f"{home}{'.' if home else ''}parametrizations.{leaf}."
        for value in graph.consts.values():
            if value.name.startswith(prefix):
                value.meta["class"] = cls


def declare(graph: Graph, tensor: torch.Tensor, name: str) -> Inner:
    """Add the plain tensors of ``tensor`` to ``graph`` as constants ``<name>.<attribute>``; raises InputError for one
    that is not plain, or has no values."""
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    out: Inner = {}
    for attribute in attributes:
        inner = getattr(tensor, attribute)
        if is_wrapped(inner):
            out[attribute] = declare(graph, inner, f"{name}.{attribute}")
            continue
        value = graph.add_const(graph.fresh(f"{name}.{attribute}"), TorchPayload(inner.detach(), f"{name}.{attribute}"))
        value.meta["role"], value.meta["class"] = "buffer", class_of(tensor)
        out[attribute] = value
    return out


def accessed(node: fx.Node, known: dict[fx.Node, Inner]) -> Value | Inner | None:
    """What ``node`` reads of a weight in ``known``; None for another node. Raises InputError for another attribute."""
    if node.op != "call_function" or ACCESS not in str(node.target) or not node.args:
        return None
    source, attribute = node.args[0], str(node.args[1])
    inner = known.get(source) if isinstance(source, fx.Node) else None
    if inner is None or attribute not in inner:
        raise InputError(f"node {node.name!r} reads {attribute!r} of a tensor that holds no such thing")
    return inner[attribute]
