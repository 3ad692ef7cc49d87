"""What every backend gives the driver: capture, lower, write, show evidence. One subclass a runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, Value
from qcompiler.report.model import Quality
from qcompiler.sites import Site
from qcompiler.subgraph import Run
from qcompiler.target import Phase, Target
from qcompiler.verify.evidence import EvidenceResult
from qcompiler.verify.findings import Finding

COMPARE_LIMIT = 512 << 20
"""Bytes of float weights above which the float model is not run beside the artifact."""


class Progress(Protocol):
    """Who listens to long work: a new stage, then how far it is."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, unit: str) -> None: ...


class Silent:
    """A progress listener that does nothing."""

    def stage(self, text: str) -> None:
        """Ignore it."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Ignore it."""


@dataclass
class Captured:
    """A model as a graph, where it came from, and the float model in the runtime's own form to compare with."""

    graph: Graph
    kind: str
    path: str = ""
    sha256: str = ""
    reference: Path | None = None
    cleanup: list[Callable[[], None]] = field(default_factory=list)
    write_reference: Callable[[], Path | None] | None = None
    """Writes the float model into a temporary file, where there is none yet."""

    def float_file(self) -> Path | None:
        """The file of the float model, written when it is first asked for; None where there is none to compare with."""
        if self.reference is None and self.write_reference is not None:
            self.reference, self.write_reference = self.write_reference(), None
        return self.reference

    def close(self) -> None:
        """Remove temporary files."""
        while self.cleanup:
            self.cleanup.pop()()


@dataclass(frozen=True)
class Written:
    """What was written: the files by name, their bytes together."""

    files: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Judged:
    """A verdict on a file: its quantized sites, what was found, and the evidence."""

    sites: list[Site]
    findings: list[Finding]
    evidence: EvidenceResult


@dataclass(frozen=True)
class Case:
    """One size that a model is timed at: sequences of ``m`` rows (None: it has no open sequence axis) in a ``batch``,
    ``past`` tokens in its caches (None: it has none). One run handles ``count`` things called ``unit``."""

    phase: str | None
    m: int | None
    batch: int
    past: int | None
    unit: str
    count: int

    @property
    def text(self) -> str:
        """``decode M=1, batch 8, 128 tokens past``."""
        phase = [] if self.m is None else [f"{self.phase} M={self.m}"]
        past = [] if self.past is None else [f"{self.past} tokens past"]
        return ", ".join([*phase, f"batch {self.batch}", *past])


class Timed(ABC):
    """A model opened in a process of its own, to be timed while nothing else runs."""

    path: Path
    file_bytes: int
    weight_bytes: int
    """Bytes of the weights that one run reads."""
    load_s: float
    before_bytes: int
    """Peak resident bytes before the model was opened: interpreter and runtime."""
    cases: Mapping[Case, str]
    first_s: Mapping[Case, float]
    """Seconds of the first run at each size."""
    left_out: list[str]
    """What was asked for and does not apply, with the reason."""

    @abstractmethod
    def prepare(self, phases: Sequence[Phase], batches: Sequence[int], past: int) -> None:
        """Make inputs for each size that the model can run, and run each once; raises InputError when none is left."""

    @abstractmethod
    def turn(self, case: Case, untimed: int, count: int) -> list[float]:
        """Seconds of ``count`` runs after ``untimed`` ones; the process is idle again when this returns."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak resident bytes of the process so far."""

    @abstractmethod
    def close(self) -> None:
        """End the process."""


@dataclass(frozen=True)
class Output:
    """A float output of a model: its name, its rank and the size of its last axis where they are known."""

    name: str
    rank: int | None
    last: int | None


class PairSite(Protocol):
    """A site of the compiled model and the tensor of the reference that it computes, or why there is none."""

    name: str
    op: str
    reason: str

    @property
    def tensor(self) -> str: ...


class Pair(ABC):
    """A float model and a compiled one, open in their runtime, to be run on the same inputs."""

    inputs: Sequence[Value]
    """Those of the reference."""
    outputs: Sequence[Output]
    """The float outputs that both have, under the reference's names."""
    left_out: Sequence[str]
    """Outputs that are no floats."""
    ids: Value | None
    """The input of token ids, where there is one; ``vocabulary`` is how many rows the table has that it looks into."""
    vocabulary: int
    sites: Sequence[PairSite]
    notes: list[str]

    @abstractmethod
    def run(self, feed: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Outputs of the reference and of the compiled model by name, alike in shape; raises InputError."""

    @abstractmethod
    def run_reference(self, feed: Mapping[str, Array], output: str) -> Array:
        """One output of the reference."""

    @abstractmethod
    def run_sites(self, feed: Mapping[str, Array]) -> Iterator[tuple[int, Array, Array]]:
        """Index of a site, what the reference computes there, what the compiled model does, in floats."""

    @abstractmethod
    def close(self) -> None:
        """Let go of both models."""


class Backend(ABC):
    """A runtime that a target belongs to."""

    suffix: str
    emission: tuple[str, ...]
    """The options that :meth:`emit` takes."""
    opened: str
    """What an opened artifact is called: the attribute of :class:`qcompiler.Artifact` that holds it."""

    @abstractmethod
    def target(self, spec: str) -> Target:
        """The target ``name[:arch]``; raises InputError for an unknown chip."""

    @abstractmethod
    def chips(self, name: str) -> tuple[str, ...]:
        """The chips that may follow the target's name after a colon."""

    @abstractmethod
    def available(self, name: str) -> tuple[bool, str]:
        """Whether the target's runtime and device are here, and a remark."""

    @abstractmethod
    def digest(self, path: Path) -> str:
        """SHA-256 of a file, hex."""

    @abstractmethod
    def capture(self, source: Any, args: Any, dynamic_shapes: Any, progress: Progress) -> Captured:
        """``source`` as a graph of this backend's dialect; raises InputError with the cause in one sentence."""

    @abstractmethod
    def judge(self, graph: Graph, target: Target, phases: Sequence[Phase]) -> list[Finding]:
        """The static verdict on a lowered graph."""

    @abstractmethod
    def stored(self, graph: Graph) -> dict[str, dict[str, int]]:
        """Node name -> bytes of codes, scales and zeros that a lowered site stores."""

    @abstractmethod
    def annotate(self, graph: Graph, metadata: Mapping[str, str]) -> None:
        """Make ``metadata`` part of the graph, so that it travels inside the artifact and the verdict can read it."""

    @abstractmethod
    def emit(self, graph: Graph, path: Path, options: Mapping[str, Any], progress: Progress) -> Written:
        """Write the artifact at ``path``, streaming; whatever lies beside it belongs to it.

        ``options``: ``external`` puts the weights into a file beside it, or forbids that; by size when absent. ``aot``
        adds what AOTInductor compiles.
        """

    @abstractmethod
    def evidence(self, path: Path, target: Target, phases: Sequence[Phase], sites: Sequence[Site]) -> EvidenceResult:
        """Open the artifact in its runtime and see which kernel ran."""

    @abstractmethod
    def verify(self, path: Path, target: Target, phases: Sequence[Phase], *, run: bool) -> Judged:
        """Judge any file of this backend's format, made by us or not."""

    @abstractmethod
    def quality(self, reference: Path, artifact: Path, data: Any) -> Quality | Finding | str:
        """Float against compiled on the same inputs; the reason why they were not compared; or what went wrong.

        ``data`` is a :class:`qcompiler.calibrate.data.Data`, or None for made-up inputs.
        """

    @abstractmethod
    def runner(self, graph: Graph, taps: Sequence[str]) -> AbstractContextManager[Run]:
        """``graph`` as a function, for as long as the context lasts: inputs by name -> outputs and taps by name.

        Any graph of this backend's dialect runs, as it stands: ``q.*`` ops by their reference semantics. ``taps`` name
        inputs, constants or results at the top of the graph, and change nothing. Raises InputError.
        """

    def raised(self, graph: Graph, opset: int, why: str) -> Graph:
        """``graph`` in ONNX opset ``opset`` or later, values under their names; raises InputError beginning ``why``."""
        raise InputError(f"{why} asks for ONNX; a {graph.dialect} graph is written in its own dialect")

    def made_up(self, graph: Graph, seed: int) -> Iterator[Mapping[str, Array]]:
        """Candidate inputs for a graph that nobody gave data for, the likeliest first."""
        raise InputError(f"no inputs are made up for {graph.dialect} graphs; give --calibration DATA")

    def kernel_error(self, op: Op, operands: Sequence[Array | None]) -> Array | float:
        """How far the kernel behind a lowered op may be from the reference: steps for codes, else absolute."""
        return 0.0

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Package name -> version, for the report."""

    def timed(self, path: Path, threads: int, dims: Mapping[str, int], folder: Path) -> Timed:
        """The file opened in its own process; ``dims`` fixes open dimensions by name, ``folder`` is for scratch."""
        raise InputError(f"no runtime here times a {self.suffix} file; give an .onnx or a .pt2 file")

    def paired(self, reference: Path, artifact: Path, *, per_site: bool) -> Pair:
        """Both files opened to be compared, ``per_site`` inside too. Raises InputError where they do not match."""
        raise InputError(f"no runtime here compares {self.suffix} files; give .onnx or .pt2 files")

    @abstractmethod
    def open(self, path: Path, target: Target) -> Any:
        """The artifact opened in its runtime, callable through :meth:`call`."""

    @abstractmethod
    def call(self, session: Any, inputs: Sequence[Any]) -> list[Any]:
        """Run an opened artifact on positional inputs."""
