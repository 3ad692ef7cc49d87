"""A program whose int4 weights were packed for another chip, made to run on this one."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from qcompiler.backends.torch import canary
from qcompiler.backends.torch.conditions import WIDTH
from qcompiler.backends.torch.held import INT4
from qcompiler.backends.torch.layouts import ROWS, repacked
from qcompiler.errors import InputError
from qcompiler.ir import Graph


def width_here() -> str:
    """The vector width of the code that torch runs in this process: ``avx512``, ``avx2`` or ``default``."""
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def refuse_other_width(graph: Graph, name: str) -> None:
    """InputError where the int4 weights of ``graph`` are packed for another width, whose bytes mean other numbers."""
    have, here = dict(graph.meta.get("metadata", ())).get(WIDTH, ""), width_here()
    if have and have != here:
        raise InputError(
            f"QC206: the int4 weights of {name} are packed for {have}, and torch runs its {here} code here, which "
            f"reads other numbers from them; compile for torch-cpu on this machine"
        )


def fit_to_chip(program: ExportedProgram, graph: Graph, name: str) -> None:
    """Pack the int4 weights of ``program``, whose graph is ``graph``, for the width that torch uses here.

    Nothing is done where they are. Raises InputError where torch has no int4 kernel of its own.
    """
    have, here = dict(graph.meta.get("metadata", ())).get(WIDTH, ""), width_here()
    if not have or have == here:
        return
    if have not in ROWS or here not in ROWS:
        refuse_other_width(graph, name)
    weights = {op.operand(1) for op in graph.walk() if op.name.rpartition(".")[0] == INT4}
    for value in weights:
        if value is None or not value.is_const:
            continue
        target = str(value.meta.get("target", value.name))
        made = torch.from_numpy(repacked(program.state_dict[target].detach().numpy(), have, here))
        for alias in (target, *map(str, value.meta.get("aliases", ()))):
            program.state_dict[alias] = made
    canary.refit(program, have, here)
