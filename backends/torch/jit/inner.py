"""What runs a graph after its weights were packed: inductor, or torch's own operators one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.errors import InputError


@dataclass(frozen=True)
class Runner:
    """A compiled graph: takes its inputs as one list, which it may empty, and returns its outputs.

    ``source`` is the code that inductor generated for it, empty where none was.
    """

    run: Callable[[list[Any]], Sequence[Any]]
    source: str = ""

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        return self.run(inputs)


@functools.cache
def default_inner() -> tuple[str, str]:
    """``inductor`` where a C++ compiler works, else ``eager``, and a remark about that."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as e:
        line = (str(e).splitlines() or [type(e).__name__])[0]
        return "eager", f"torch.compile: no C++ compiler for inductor ({line}), so the graph runs operator by operator"
    return "inductor", ""


def inner_compile(module: fx.GraphModule, examples: Sequence[Any], inner: str, captured: fx.GraphModule) -> Runner:
    """``module`` as something that runs; ``examples`` are its inputs, fake tensors and symbolic sizes.

    ``captured`` is the graph that it was made of, whose outputs tell their layout in memory.
    """
    return _inductor(module, examples, captured) if inner == "inductor" else _eager(module)


def _eager(module: fx.GraphModule) -> Runner:
    forward = module.forward

    def run(inputs: list[Any]) -> Sequence[Any]:
        return forward(*inputs)  # type: ignore[no-any-return]

    return Runner(run)


def _keep_strides(module: fx.GraphModule, captured: fx.GraphModule) -> None:
    """Outputs are laid out in memory as eager torch would: a cache in another layout would be compiled for again."""
    output, original = (next(n for n in reversed(m.graph.nodes) if n.op == "output") for m in (module, captured))
    returned = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in original.args[0]]
    output.meta["user_visible_output_idxs"] = list(range(len(returned)))
    output.meta["original_output_strides"] = [v.stride() if isinstance(v, torch.Tensor) else None for v in returned]


def _keep_copies(module: fx.GraphModule) -> None:
    """Copies before kernels that load aligned vectors stay copies: inductor leaves ``clone`` out where nothing is
    written to, and the kernel then crashes on an activation that begins at an odd address."""
    kernel, clone = torch.ops.aten._weight_int8pack_mm.default, torch.ops.aten.clone.default
    for node in module.graph.find_nodes(op="call_function", target=clone):
        if any(user.target is kernel for user in node.users):
            node.target, node.kwargs = torch.ops.qcompiler.copied.default, {}
    module.recompile()


def _inductor(module: fx.GraphModule, examples: Sequence[Any], captured: fx.GraphModule) -> Runner:
    """Inductor takes a graph of the operators that it lowers, so that what it decomposes is traced into those."""
    try:
        from torch._dispatch.python import enable_python_dispatcher
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes
        from torch.fx.experimental.proxy_tensor import make_fx
    except ImportError as e:
        raise InputError(
            f"this torch has another inductor than is known here ({e}); give the option inner='eager'"
        ) from None

    _keep_copies(module)

    def flat(*inputs: Any) -> list[Any]:
        return list(module(*inputs))

    with torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(flat, decomposition_table=select_decomp_table())(*examples)
        _keep_strides(traced, captured)
        joint_graph_passes(traced)
        compiled = compile_fx_inner(traced, list(examples), is_inference=True)

    def run(inputs: list[Any]) -> Sequence[Any]:
        return compiled(inputs)  # type: ignore[no-any-return]

    return Runner(run, getattr(compiled, "source_code", ""))
