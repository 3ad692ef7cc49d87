"""Looking inside a compilation: a dump after each pass, and a file that reproduces a failure."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import gettempdir

from qcompiler.ir import Graph
from qcompiler.pipeline import Context, Pass
from qcompiler.scheme import Alternatives
from qcompiler.text import show, show_attrs

DUMP_VARIABLE = "QCOMPILER_DUMP"


@dataclass
class DumpHook:
    """Writes the graph before the first pass and after each one: ``00-input.qir``, ``01-normalise.qir`` ..."""

    folder: Path

    def before(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        if number == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "00-input.qir").write_text(show(graph), "utf-8")

    def after(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        (self.folder / f"{number + 1:02}-{item.name}.qir").write_text(show(graph), "utf-8")


@dataclass
class LastGood:
    """Remembers the text of the graph before the pass that is running, for a repro file."""

    text: str = ""
    item: Pass | None = None

    def before(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        self.item = item
        self.text = show(graph, digests=False) if len(graph) <= 5000 else ""

    def after(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None:
        self.text = ""


def hooks_from_environment() -> list[DumpHook]:
    """A dump hook when the environment variable QCOMPILER_DUMP names a folder."""
    folder = os.environ.get(DUMP_VARIABLE)
    return [DumpHook(Path(folder))] if folder else []


def step_text(item: Pass) -> str:
    """The pass as recipes write it, with every option that has a place in the text."""
    given = {f.name: getattr(item, f.name) for f in fields(item)}  # type: ignore[arg-type]  # every pass is a dataclass
    given = {name: value.text if isinstance(value, Alternatives) else value for name, value in given.items()}
    return f"{item.name}{show_attrs(given)}" if given else item.name


def write_repro(error: BaseException, graph_text: str = "", step: str = "", folder: Path | None = None) -> Path:
    """Write what is needed to see ``error`` again: the graph before the failing pass, the pass, the traceback.

    The file is IR text with the rest in comments: ``qcompiler run FILE 'STEP'`` runs the failing pass on it.
    """
    home = folder if folder is not None else Path(gettempdir())
    path = home / f"qcompiler-repro-{os.getpid()}.qir"
    story = "".join(traceback.format_exception(error)).splitlines()
    head = [f"qcompiler run {path.name} {step!r}" if step else "no pass was running", *story]
    path.write_text("".join(f"# {line}\n" for line in head) + graph_text, "utf-8")
    return path
