"""Caches that grow: what a graph returns is marked, so that the next graph takes its length as open from the start.

Dynamo takes every size of a tensor that it sees for the first time as fixed, and compiles again when that size is
another. A cache that one graph made and another extends at each token would cost a compilation for nothing. The sizes
of an output that are those of the sequence or the batch of the inputs are therefore marked with
``torch._dynamo.maybe_mark_dynamic``, which promises nothing: where a size turns out to be fixed, it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.backends.torch.jit_capture import arguments_of, sizes_of
from qcompiler.backends.torch.jit_compile import CompiledGraph
from qcompiler.backends.torch.jit_names import Names


def marked(made: Callable[..., Any], module: fx.GraphModule, names: Names) -> Callable[..., Any]:
    """``made``, set to mark the outputs of its graph where dynamo decides by itself which sizes are open."""
    config = torch._dynamo.config
    if not (config.assume_static_by_default and config.automatic_dynamic_shapes and isinstance(made, CompiledGraph)):
        return made
    if (found := _places(module, names)) and (mark := getattr(torch._dynamo, "maybe_mark_dynamic", None)) is not None:
        made.after = _marking(found, mark)
    return made


def _marking(places: Sequence[tuple[int, int]], mark: Callable[..., Any]) -> Callable[[Sequence[Any]], None]:
    def after(outputs: Sequence[Any]) -> None:
        for output, axis in places:
            if isinstance(outputs[output], torch.Tensor):
                mark(outputs[output], axis)

    return after


def _places(module: fx.GraphModule, names: Names) -> list[tuple[int, int]]:
    """Output and axis of each fixed size that is also a size of an input, other than its last where it is of floats."""
    sizes: set[int] = set()
    returned: Any = ()
    arguments = iter(arguments_of(module))
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if node.op == "output":
            returned = node.args[0]
        elif node.op == "placeholder" and next(arguments) not in names.held and isinstance(val, torch.Tensor):
            floats = val.is_floating_point()
            sizes.update(sizes_of(val[..., 0] if floats and val.ndim else val))
    found: list[tuple[int, int]] = []
    for i, node in enumerate(returned):
        val = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(val, torch.Tensor):
            found += [(i, axis) for axis, d in enumerate(val.shape) if type(d) is int and d in sizes]
    return found
