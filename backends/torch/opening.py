"""Open a ``.pt2`` file to run it, with what is known of its inputs and results beside it."""

from __future__ import annotations

from pathlib import Path

from qcompiler.backends.torch import aot
from qcompiler.backends.torch.archive import holds_code, open_program
from qcompiler.backends.torch.calling import Opened
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.fitting import fit_to_chip, refuse_other_width
from qcompiler.backends.torch.notes import Notes
from qcompiler.backends.torch.quiet import one_sentence


def opened(path: Path) -> Opened:
    """The program in the file at ``path``, its weights in memory; AOTInductor's code of it where the file holds that.

    Raises InputError. A program is read once: its graph and its module share the weights.
    """
    if holds_code(path):
        graph = load(path)
        refuse_other_width(graph, path.name)
        return Opened(graph, aot.opened(path))
    program = open_program(path)
    graph = load(program, Notes.inside(path))
    fit_to_chip(program, graph, path.name)
    with one_sentence(f"cannot make a module of {path.name}"):
        return Opened(graph, program.module())
