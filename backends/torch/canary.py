"""A check inside a ``.pt2`` file that its int4 weights are packed for the kernels that torch runs.

torch chooses its int4 kernel when it starts, by the chip and by ``ATEN_CPU_CAPABILITY``, and a kernel of another vector
width computes nonsense without an error. So each program with int4 weights first runs a product of constants whose
result is known: where it differs, torch raises the sentence of :func:`sentence`. Only torch's own operators are called,
so the check works without this package. It costs four small calls, 9 microseconds together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from qcompiler.backends.torch import layouts
from qcompiler.backends.torch.conditions import WIDTH
from qcompiler.backends.torch.held import INT4
from qcompiler.backends.torch.nodes import CANARY
from qcompiler.ir import Graph, Op

LABEL = "qcompiler.int4_canary"
"""The name of the calls of the check."""
ROWS, COLUMNS, BLOCK = 64, 32, 32
"""Sizes of its product. 64 rows: with fewer the packings for AVX-512 and for no vectors at all are the same."""


def sentence(width: str) -> str:
    """What is said where torch runs kernels of another vector width than ``width``."""
    other = " or ".join(f"torch-cpu:{w}" for w in layouts.ROWS if w != width)
    return (
        f"the int4 weights of this program are packed for {width}, and torch runs other kernels here (this chip's, or "
        "those of ATEN_CPU_CAPABILITY), which read other numbers from them; open the file with "
        "qcompiler.backends.torch.program.open_module, which packs them anew, or compile the model with --target "
        f"{other}"
    )


def tensors(width: str) -> dict[str, torch.Tensor]:
    """The constants of the check: ``x`` bf16 [1, 32], ``weight`` packed for ``width``, ``scales`` of 1 and offsets of
    0, and the ``result`` bf16 [1, 64], whole numbers below 256 that bf16 holds exactly."""
    n, k = np.arange(ROWS)[:, None], np.arange(COLUMNS)
    codes = ((7 * n + 3 * k + n // 16) % 16).astype(np.uint8)
    x = k % 3 - 1
    scales = torch.zeros(COLUMNS // BLOCK, ROWS, 2, dtype=torch.bfloat16)
    scales[..., 0] = 1
    return {
        "x": torch.from_numpy(x[None]).to(torch.bfloat16),
        "weight": torch.from_numpy(layouts.int4pack(codes, width)),
        "scales": scales,
        "result": torch.from_numpy((codes.astype(np.int64) - layouts.MIDDLE) @ x)[None].to(torch.bfloat16),
    }


def plant(module: fx.GraphModule, graph: Graph, custom: str) -> None:
    """Put the check at the begin of ``module``, which was made of ``graph``, where that has int4 weights packed for a
    known width. ``custom``: the key in a node's ``custom`` metadata that holds its name."""
    width = dict(graph.meta.get("metadata", ())).get(WIDTH, "")
    if width not in layouts.ROWS or not any(op.name == f"{INT4}.default" for op in graph.walk()):
        return
    home = nn.Module()
    for name, tensor in tensors(width).items():
        home.register_buffer(name, tensor, persistent=False)
    module.add_module(CANARY, home)
    first = next(n for n in module.graph.nodes if n.op != "placeholder")
    with module.graph.inserting_before(first):
        read = {name: module.graph.get_attr(f"{CANARY}.{name}") for name in home._buffers}
        call, aten = module.graph.call_function, torch.ops.aten
        y = call(aten._weight_int4pack_mm_for_cpu.default, (read["x"], read["weight"], BLOCK, read["scales"]))
        same = call(aten.eq.Tensor, (y, read["result"]))
        every = call(aten.all.default, (same,))
        check = call(aten._assert_async.msg, (every, sentence(width)))
    for node in (y, same, every, check):
        node.meta["custom"] = {custom: [LABEL, ""]}
    module.recompile()


def uproot(graph: Graph) -> None:
    """Take the check out of a graph that was captured; it is no part of the model, and is planted anew when the graph
    is written. Left alone where something else depends on it."""
    constants = [v for v in graph.consts.values() if v.name.startswith(f"{CANARY}.")]
    known, calls = set(constants), list[Op]()
    for op in graph:
        if any(v in known for v in op.operands):
            calls.append(op)
            known.update(op.results)
    alone = all(v is None or v in known for op in calls for v in op.operands)
    if not alone or any(v.is_output for v in known) or any(op.regions for op in calls):
        return
    for op in reversed(calls):
        op.erase()
    for value in constants:
        graph.remove_const(value)


def refit(program: ExportedProgram, have: str, want: str) -> None:
    """Pack the weight of the check in ``program`` anew, as all its int4 weights are."""
    name = f"{CANARY}.weight"
    if (weight := program.constants.get(name)) is not None:
        program.constants[name] = torch.from_numpy(layouts.repacked(weight.numpy(), have, want))
