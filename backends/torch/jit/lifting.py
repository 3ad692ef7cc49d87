"""A graph after the passes, as a module whose weights are arguments: what stayed in float is read from the model as it
is called, what was packed comes behind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.jit.cache import WeightPayload
from qcompiler.backends.torch.jit.capture import CapturedGraph
from qcompiler.backends.torch.payload import TO_TORCH, TorchPayload
from qcompiler.ir import Value
from qcompiler.payload import Payload


@dataclass(frozen=True)
class Lifted:
    """A module without weights of its own. It takes the arguments at the places ``read``, then the values of
    ``constants``."""

    module: fx.GraphModule
    read: tuple[int, ...]
    constants: tuple[Payload, ...]


def lift(captured: CapturedGraph) -> Lifted:
    """The module of ``captured``, whose graph this rewrites: constants become inputs."""
    graph = captured.graph
    places = dict(captured.places)
    constants: list[tuple[Value, Payload]] = []
    for value in list(graph.consts.values()):
        payload = value.payload
        if value.uses and payload is not None:
            taken = graph.add_input(graph.fresh(value.name), value.type)
            value.replace_uses(taken)
            if isinstance(payload, WeightPayload):
                places[taken] = captured.weights[payload]
            else:
                constants.append((taken, payload))
        graph.remove_const(value)
    graph.inputs = [*places, *(v for v, _ in constants)]
    for value in graph.inputs:  # they become parameters of a Python function
        graph.rename(value, graph.fresh("in_" + re.sub(r"\W", "_", value.name)))
    module = to_graph_module(graph, check_inputs=False)
    return Lifted(module, tuple(places.values()), tuple(p for _, p in constants))


def examples_for(lifted: Lifted, examples: Sequence[Any]) -> list[Any]:
    """Fake inputs for the module, out of those for the graph that it was made of; no constant is computed.

    Constants are where the model's weights are.
    """
    mode = detect_fake_mode(examples)
    device = next((e.device for e in examples if isinstance(e, torch.Tensor) and e.is_cuda), torch.device("cpu"))
    out = [examples[place] for place in lifted.read]
    for payload in lifted.constants:
        if mode is None:
            out.append(torch.empty(payload.shape, dtype=_stored(payload), device="meta"))
        elif isinstance(payload, TorchPayload):
            out.append(mode.from_tensor(payload.tensor))
        else:
            with mode:
                out.append(torch.empty(payload.shape, dtype=_stored(payload), device=device))
    return out


def _stored(payload: Payload) -> torch.dtype:
    """The type of the tensor that holds ``payload``: codes of fewer than 8 bits are one a byte."""
    known = TO_TORCH.get(payload.dtype)
    if known is not None:
        return known
    return torch.int8 if payload.dtype.is_integer and payload.dtype.signed else torch.uint8
