"""Caches that grow: what a graph returns is marked, so that the next graph takes its length as open from the start.

Dynamo takes every size of a tensor that it sees for the first time as fixed, and compiles again when that size is
another. A cache that one graph made and another extends at each token would cost a compilation for nothing. The sizes
of an output that are those of token ids (of any whole numbers that come in) are therefore marked with
``torch._dynamo.maybe_mark_dynamic``, which promises nothing: where a size turns out to be fixed, it is. Only a graph
without open sizes marks, which is the first one: dynamo compares marks, and learns the rest by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.backends.torch.dims import symbolic
from qcompiler.backends.torch.jit.capture import arguments_of, sizes_of
from qcompiler.backends.torch.jit.names import Names
from qcompiler.backends.torch.jit.running import CompiledGraph


def marked(made: Callable[..., Any], module: fx.GraphModule, names: Names) -> Callable[..., Any]:
    """``made``, set to mark the outputs of its graph where dynamo decides by itself which sizes are open."""
    config = torch._dynamo.config
    if not (config.assume_static_by_default and config.automatic_dynamic_shapes and isinstance(made, CompiledGraph)):
        return made
    if (found := _places(module, names)) and (mark := getattr(torch._dynamo, "maybe_mark_dynamic", None)) is not None:
        made.after = _marking(found, mark)
    return made


def _marking(places: Sequence[tuple[int, int]], mark: Callable[..., Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def after(outputs: Sequence[Any]) -> Sequence[Any]:
        found = list(outputs)
        for output, axis in places:
            if isinstance(found[output], torch.Tensor):
                # The next graph extends it by a cat, whose result is contiguous: so is what it starts from.
                found[output] = found[output].contiguous()
                mark(found[output], axis)
        return found

    return after


def _places(module: fx.GraphModule, names: Names) -> list[tuple[int, int]]:
    """Output and axis of each size that is also a size of whole numbers that come in; none where a size is open."""
    sizes: set[int] = set()
    returned: Any = ()
    arguments = iter(arguments_of(module))
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if node.op == "output":
            returned = node.args[0]
        elif node.op == "placeholder" and next(arguments) not in names.held and isinstance(val, torch.Tensor):
            sizes.update(() if val.is_floating_point() else sizes_of(val))
        if any(True for _ in symbolic(val)):
            return []
    found: list[tuple[int, int]] = []
    for i, node in enumerate(returned):
        val = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(val, torch.Tensor):
            found += [(i, axis) for axis, d in enumerate(val.shape) if type(d) is int and d in sizes]
    return found
