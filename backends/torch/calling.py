"""How the program in a ``.pt2`` file is called with arrays by input name, and what its results are called."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.payload import FROM_TORCH, TO_TORCH, TorchPayload, tensor_of
from qcompiler.backends.torch.specs import parse_spec
from qcompiler.dtypes import TABLE, Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Hole, OpaqueType, TensorType, Value
from qcompiler.payload import ArrayPayload


@dataclass(frozen=True)
class Slot:
    """One argument, flattened: a tensor of ``element``, a number where that is empty, or the ``constant`` (as Python
    writes it) that the program was captured with."""

    name: str
    element: str = ""
    constant: str = ""

    @property
    def value(self) -> Any:
        """The constant itself."""
        return ast.literal_eval(self.constant)


@dataclass(frozen=True)
class Call:
    """The arguments of a program: its slots in order and the structure they stand in, as text."""

    slots: tuple[Slot, ...]
    spec: str

    @staticmethod
    def of(graph: Graph) -> Call:
        """The call of a captured program; raises InputError for an argument that is neither tensor nor plain value."""
        spec = graph.meta.get("in_spec")
        if not isinstance(spec, str):
            raise InputError("the program does not say how it is called; export the model again")
        return Call(tuple(_slot(v) for v in graph.inputs if v.payload is None), spec)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Call:
        return Call(tuple(Slot(**s) for s in found["slots"]), found["spec"])

    @property
    def fed(self) -> list[str]:
        """The inputs that a caller gives."""
        return [s.name for s in self.slots if not s.constant]

    def arguments(self, feed: Mapping[str, Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments made of copies of the arrays; raises InputError when one is missing."""
        if missing := [n for n in self.fed if n not in feed]:
            raise InputError(f"inputs {', '.join(missing)} are missing; the program takes {', '.join(self.fed)}")
        leaves = [_leaf(s, feed) for s in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, parse_spec(self.spec))
        return tuple(args), dict(kwargs)


def _slot(value: Value) -> Slot:
    if isinstance(value.type, OpaqueType):
        kind, _, text = value.type.text.partition(" ")
        if kind.startswith("Sym"):
            return Slot(value.name)
        if kind in ("None", "bool", "int", "float", "str"):
            return Slot(value.name, constant=text or kind)
        raise InputError(f"input {value.name!r} is a {kind}, of which nothing is made up and nothing read")
    element = value.tensor.dtype
    if element is None or element not in TO_TORCH:
        raise InputError(f"input {value.name!r} is of type {value.type}, of which nothing is made up and nothing read")
    return Slot(value.name, element.name)


def _leaf(slot: Slot, feed: Mapping[str, Array]) -> Any:
    if slot.constant:
        return slot.value
    array = np.asarray(feed[slot.name])
    if not slot.element:
        return array.item()
    element = TABLE[slot.element]
    if array.dtype != element.storage:  # files know no bf16: its bits come as bytes without a type
        array = array.view(element.storage) if array.dtype.kind == "V" else array.astype(element.storage)
    return tensor_of(ArrayPayload(array, element)).clone()


# -- results -------------------------------------------------------------------------------------------------------


def result_names(graph: Graph) -> list[str]:
    """Names of what the program returns, constants left out: keys where the result is a dict or a record, else those
    of the values."""
    holes = _holes(graph)
    paths = _paths(graph)
    if paths and all(paths[i] for i, _ in holes):
        return [paths[i] for i, _ in holes]
    return [graph.outputs[index].name for _, index in holes]


def result_values(graph: Graph) -> list[Value]:
    """The values that the program returns, in the order of :func:`result_names`."""
    return [graph.outputs[index] for _, index in _holes(graph)]


def results(graph: Graph, returned: Any) -> list[Array]:
    """What the program returned as arrays, in the order of :func:`result_names`; bf16 as f32."""
    leaves = pytree.tree_leaves(returned)
    return [_as_array(leaves[i]) for i, _ in _holes(graph)]


def _holes(graph: Graph) -> list[tuple[int, int]]:
    """(place among the flattened results, index of the output) of each result that is computed."""
    returns = graph.meta.get("returns", ())
    return [(i, r.index) for i, r in enumerate(returns) if isinstance(r, Hole)]


def _paths(graph: Graph) -> list[str]:
    """A dotted path of keys for each flattened result; empty where a tuple or a list is all there is."""
    text = graph.meta.get("out_spec")
    if not isinstance(text, str):
        return []
    spec = parse_spec(text)
    found, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return [_dotted(path) for path, _ in found]


def _dotted(path: Sequence[Any]) -> str:
    keys = [(getattr(p, "key", getattr(p, "name", None)), getattr(p, "idx", None)) for p in path]
    if all(key is None for key, _ in keys):
        return ""
    return ".".join(str(index if key is None else key) for key, index in keys)


def _as_array(value: Any) -> Array:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach()
    if value.is_floating_point() and FROM_TORCH[value.dtype].storage.isbuiltin != 1:
        value = value.to(torch.float32)
    return TorchPayload(value).array()


# -- opened --------------------------------------------------------------------------------------------------------


class Opened:
    """A program that can be run: ``graph`` says what it takes and gives, ``module`` is what its user would call.
    Buffers that it writes to are what they were before each run."""

    def __init__(self, graph: Graph, module: Callable[..., Any]) -> None:
        self.graph, self.module, self.call = graph, module, Call.of(graph)
        self.names = result_names(graph)
        self.written = _written(graph, module)

    @torch.no_grad()
    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The results as :func:`results` gives them; raises whatever torch raises."""
        for tensor, before in self.written:
            tensor.copy_(before)
        args, kwargs = self.call.arguments(feed)
        found = results(self.graph, self.module(*args, **kwargs))
        return [a.copy() for a in found] if self.written else found  # a result may be a buffer that is written to


def _written(graph: Graph, module: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The buffers that the program writes to, with copies of what they hold."""
    if not isinstance(module, torch.nn.Module):
        return []
    here: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = [str(v.meta.get("target", v.name)) for v in graph.inputs if v.payload is not None]
    found = [here[n].detach() for n in names if n in here]
    return [(tensor, tensor.clone()) for tensor in found]


def is_float(value: Value) -> bool:
    """Whether a result is a tensor of floats."""
    element = value.tensor.dtype
    return isinstance(value.type, TensorType) and element is not None and element.is_float
