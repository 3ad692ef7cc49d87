"""Run a graph of the ``aten`` dialect as it stands, taps included: an interpreter over torch's own operators.

``q.*`` ops are run by their reference semantics, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qcompiler import numerics
from qcompiler.backends.torch.emit import filled, region_module
from qcompiler.backends.torch.names import target_of
from qcompiler.backends.torch.payload import TorchPayload, tensor_of
from qcompiler.dtypes import Array
from qcompiler.errors import Error, InputError
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ArrayPayload
from qcompiler.subgraph import Run, reads


@contextmanager
def runnable(graph: Graph, taps: Sequence[str]) -> Iterator[Run]:
    """``graph`` as a function: inputs by name -> its outputs and the values named in ``taps``, by name.

    Neither ``graph`` nor what is given is changed: what the program writes to is copied for each call. A tap holds the
    value as its op left it, whatever is written to it afterwards. Raises InputError for a name that is not there, for
    inputs that are not the graph's, and for what torch refuses.
    """
    yield Interpreter(graph, taps)


class Interpreter:
    """A graph that can be called. ``device``: where its tensors are, and those that it makes; None: as it says."""

    device: torch.device | None = None

    def __init__(self, graph: Graph, taps: Sequence[str]) -> None:
        if graph.dialect != "aten":
            raise InputError(f"a graph of dialect {graph.dialect!r} cannot be run in torch")
        self.graph = graph
        for name in taps:
            if graph.local(name) is None:
                raise InputError(f"the graph has no value %{name} to tap")
        self.taps = {v for v in map(graph.local, taps) if v is not None}
        self.regions = {op: {k: region_module(r, k) for k, r in op.regions.items()} for op in graph if op.regions}
        # Parameters stay what they are: torch chooses other kernels for tensors that want gradients, even in no_grad.
        self.constants = {v: tensor_of(p) for v in graph.consts.values() if (p := v.payload) is not None}
        last: dict[Value, Op] = {v: op for op in graph for v in (*op.results, *reads(op))}
        kept = {*graph.outputs, *graph.consts.values()}
        self.done: dict[Op, list[Value]] = {}
        for value, op in last.items():
            if value not in kept:
                self.done.setdefault(op, []).append(value)

    @torch.no_grad()
    def __call__(self, given: Mapping[str, Array]) -> dict[str, Array]:
        known: dict[Value, Any] = self.constants | self._fed(given)
        out = {v.name: _array(known[v]) for v in self.taps if v in known}
        for op in self.graph:
            try:
                known.update(zip(op.results, self._results(op, known), strict=True))
            except Error:
                raise
            except Exception as e:
                line = (str(e).splitlines() or [type(e).__name__])[0]
                raise InputError(f"torch cannot run {op.name} '{op.label}': {line}") from e
            out |= {v.name: _array(known[v]) for v in op.results if v in self.taps}
            for value in self.done.get(op, ()):
                known.pop(value, None)
        return {v.name: _array(known[v]) for v in self.graph.outputs} | out

    def _fed(self, given: Mapping[str, Array]) -> dict[Value, Any]:
        names = {v.name for v in self.graph.inputs}
        absent = [v.name for v in self.graph.inputs if v.payload is None and v.name not in given]
        if absent or not names.issuperset(given):
            extra = ", ".join(sorted(set(given) - names))
            what = f"inputs {', '.join(absent)} are missing" if absent else f"there is no input {extra}"
            raise InputError(
                f"the graph cannot be run: {what}; it takes {', '.join(v.name for v in self.graph.inputs)}"
            )
        out: dict[Value, Any] = {}
        for value in self.graph.inputs:
            if value.name in given:
                out[value] = _fed_one(value, np.asarray(given[value.name]))
            elif value.payload is not None:
                out[value] = tensor_of(value.payload).detach().clone()
        return out

    def _results(self, op: Op, known: Mapping[Value, Any]) -> list[Any]:
        operands = [None if v is None else known[v] for v in op.operands]
        if op.name.startswith("q."):
            arrays = [
                None if v is None or t is None else _coded(t, _array(v))
                for t, v in zip(op.operands, operands, strict=True)
            ]
            found = numerics.evaluate_all(op.name, arrays, op.attrs)
            return [_tensor(r, a) for r, a in zip(op.results, found, strict=True)]
        target = target_of(op.name)
        kind = list if isinstance(target, torch._ops.OpOverload) else tuple
        regions = self.regions.get(op, {})
        args = filled(op.attrs["args"], operands, kind, regions)
        kwargs = {k: filled(v, operands, kind, regions) for k, v in op.attrs.get("kwargs", ())}
        if self.device is not None:
            args, kwargs = self._there(args), self._there(kwargs)
        result = target(*args, **kwargs)
        if op.attrs.get("unpack", len(op.results) > 1):
            return list(result)[: len(op.results)]
        return [result] * len(op.results)

    def _there(self, given: Any) -> Any:
        """``given`` with this device in the place of any that it names."""
        return pytree.tree_map(lambda v: self.device if isinstance(v, torch.device) else v, given)


def _fed_one(value: Value, array: Array) -> Any:
    if value.tensor.dtype is None and not array.ndim:
        return array.item()  # a size
    return _tensor(value, array).clone()


def _tensor(value: Value, array: Array) -> torch.Tensor:
    """``array`` as a tensor of the type of ``value``; codes of fewer than 8 bits are one a byte.

    A dequantized activation comes in the type of its scale, which is f32 where it was chosen for a narrower float.
    """
    element = value.tensor.dtype
    if element is not None and element.is_float and element.bits > 8 and array.dtype.kind == "f":
        array = array.astype(element.storage)
    if element is None or element.storage != array.dtype:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return tensor_of(ArrayPayload(array, element))


def _coded(value: Value, array: Array) -> Array:
    """``array`` in the storage of codes that torch has no type for, and keeps as bytes."""
    element = value.tensor.dtype
    return array.view(element.storage) if element is not None and element.packed and element.is_float else array


def _array(value: Any) -> Array:
    """A copy of a tensor, or a number, as an array."""
    return TorchPayload(value.detach().clone()).array() if isinstance(value, torch.Tensor) else np.asarray(value)
