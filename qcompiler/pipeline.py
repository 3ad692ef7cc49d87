"""Passes, and the loop that runs them: a pass is a frozen dataclass whose fields are its options."""

from __future__ import annotations

import contextlib
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from qcompiler.errors import CalibrationError, Error, StructureError
from qcompiler.ir import Graph
from qcompiler.rewrite import Refusal
from qcompiler.sites import Ledger
from qcompiler.spec import check
from qcompiler.target import PHASES, Phase, Target
from qcompiler.verify.findings import Finding


class Calibration(Protocol):
    """Calibration data at hand: a :class:`qcompiler.calibrate.calibrator.Calibrator`."""

    measured: bool
    """False while planning: the observers are told that values lie in -1..1, and nothing is run."""

    def observe(self, graph: Graph, wanted: Mapping[str, Sequence[Any]]) -> None:
        """Show the observers of each named value all that it takes while the data runs through ``graph`` as it is."""

    def outputs(self, graph: Graph, names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """The named values of ``graph`` as it is on the first ``count`` samples, one batch at a time."""


@dataclass
class Context:
    """What passes share: the target they compile for, the sites and findings so far, and why rules did not fire.

    ``notes`` are lines for the report that are no findings. ``partial``: the graph is a part of a model, so a glob that
    matches nothing in it, or nothing to quantize, is no error of the recipe.
    """

    target: Target | None = None
    phases: Sequence[Phase] = PHASES
    ledger: Ledger = field(default_factory=Ledger)
    findings: list[Finding] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    passes_s: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda text: None
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)
    partial: bool = False

    def need_target(self, who: str) -> Target:
        """The target; raises Error when a pass that must know it runs without one."""
        if self.target is None:
            raise Error(f"{who} needs a target: it asks the kernel table; run it with --target")
        return self.target

    def need_calibration(self, who: str) -> Calibration:
        """The calibration data; raises CalibrationError when ``who`` (a pass) must run the model and has none."""
        if self.calibration is None:
            raise CalibrationError(
                f"{who} measures activations and needs --calibration DATA: an .npz, .npy, .jsonl or .txt file, or "
                "package.module:function"
            )
        return self.calibration


class Pass(ABC):
    """One rewrite of a graph, in place. Subclasses are frozen dataclasses; ``name`` is what recipes call it.

    ``kind`` says what the pass promises: *exact* passes keep the graph's outputs up to float rounding, *lossy* ones
    change weights within the bound of their scheme, *layout* ones change bytes but not values.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "exact"

    @abstractmethod
    def run(self, graph: Graph, ctx: Context) -> None:
        """Rewrite ``graph``; raise RecipeError for an option that cannot be met, never leave it half done."""


class Hook(Protocol):
    """Called around every pass, with its number in the recipe."""

    def before(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None: ...

    def after(self, number: int, item: Pass, graph: Graph, ctx: Context) -> None: ...


class PassFailed(StructureError):
    """A pass raised or broke the graph: ``number`` and ``item`` say which, ``__cause__`` why, ``repro`` is a file."""

    repro: Path | None = None

    def __init__(self, number: int, item: Pass, message: str) -> None:
        super().__init__(f"pass {number} ({item.name}): {message}")
        self.number, self.item = number, item


def run(graph: Graph, passes: Iterable[Pass], ctx: Context, hooks: Sequence[Hook] = ()) -> Graph:
    """Run ``passes`` over ``graph`` in place; structure, types and specs are checked after each one (law L1).

    Raises whatever a pass raises of :class:`qcompiler.errors.Error`; anything else becomes :class:`PassFailed`.
    """
    with _no_collection():
        _run(graph, passes, ctx, hooks)
    return graph


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    # A graph is a web of cycles: each collection walks all of it, which made passes superlinear (2.3x at 32k nodes).
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _interface(graph: Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of inputs and outputs, which users call the model by."""
    return tuple(v.name for v in graph.inputs), tuple(v.name for v in graph.outputs)


def _run(graph: Graph, passes: Iterable[Pass], ctx: Context, hooks: Sequence[Hook]) -> None:
    check(graph)
    interface = _interface(graph)
    for number, item in enumerate(passes):
        ctx.progress(item.name)
        for hook in hooks:
            hook.before(number, item, graph, ctx)
        start = time.perf_counter()
        try:
            item.run(graph, ctx)
            check(graph)
            if (now := _interface(graph)) != interface:
                raise StructureError(f"the inputs and outputs were {interface}, and the pass made them {now}")
        except StructureError as e:
            raise PassFailed(number, item, str(e)) from e
        except Error:
            raise
        except Exception as e:
            raise PassFailed(number, item, f"{type(e).__name__}: {e}") from e
        ctx.passes_s[item.name] = ctx.passes_s.get(item.name, 0.0) + time.perf_counter() - start
        for hook in reversed(hooks):
            hook.after(number, item, graph, ctx)
