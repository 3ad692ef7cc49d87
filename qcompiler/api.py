"""The public functions: compile, verify, plan, inspect; and what the command line lists."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler import driver
from qcompiler import recipe as recipes
from qcompiler.backends import BACKENDS, backend_of
from qcompiler.backends.base import Progress, Silent
from qcompiler.calibrate.calibrator import Planned
from qcompiler.calibrate.data import open_data
from qcompiler.calibrate.tokens import encoder_beside
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.memory import bound
from qcompiler.pipeline import Context, run
from qcompiler.planning import Plan, make_plan
from qcompiler.reader import parse
from qcompiler.recipe import Recipe
from qcompiler.report.model import Report, Source
from qcompiler.target import PHASES, KernelRow, Phase, Target
from qcompiler.text import show


@dataclass
class Artifact:
    """A compiled model: its files, its report, and a way to run it."""

    path: Path
    report: Report
    target: Target
    _open: Any = field(default=None, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def session(self) -> Any:
        """The artifact of an ORT target opened in its runtime (an onnxruntime.InferenceSession), at first use."""
        return self._opened("session")

    @property
    def module(self) -> Any:
        """The artifact of a torch target as a module to be called like the model, loaded at first use."""
        return self._opened("module")

    def _opened(self, name: str | None = None) -> Any:
        backend = backend_of(self.target.name)
        if name not in (None, backend.opened):
            raise InputError(f"an artifact for {self.target} has no .{name}; what opens it is .{backend.opened}")
        if self._open is None:
            self._open = backend.open(self.path, self.target)
        return self._open

    def __call__(self, *inputs: Any) -> list[Any]:
        """Outputs for positional ``inputs`` (arrays or tensors), in the order of the model's inputs: arrays from ORT,
        tensors from torch."""
        return backend_of(self.target.name).call(self._opened(), inputs)

    def save(self, path: str | Path) -> Path:
        """Copy the artifact, what lies beside it and its report to ``path``."""
        path = Path(path)
        for suffix in (".data", ".report.json", ""):
            source = self.path.with_name(self.path.name + suffix)
            if source.is_file():
                if suffix == ".data" and path.name != self.path.name:
                    raise InputError(
                        f"the weights of this artifact lie in {source.name}, which the model names; "
                        f"save it under the name {self.path.name} in another folder"
                    )
                shutil.copyfile(source, path.with_name(path.name + suffix))
        return path


def compile(
    source: Any,
    *,
    target: str = "ort-cpu",
    recipe: str | Path | Recipe = "w4a16",
    args: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    phases: Sequence[Phase] | None = None,
    max_ram: int | None = None,
    check: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compile ``source`` for ``target`` by ``recipe``; the artifact goes to ``out``, or to a folder that dies with it.

    ``calibration`` is the data that recipes measure activations on: the path of an .npz, .npy, .jsonl or .txt file,
    ``package.module:function``, a mapping of arrays by input (first axis = samples), an iterable of input dicts, or a
    function that returns either.
    ``settings`` maps ``pass.key`` to a value (``emit.external`` = true puts the weights beside an ONNX model,
    ``emit.format`` = qdq writes QuantizeLinear and DequantizeLinear in the place of fused nodes, ``emit.aot`` = true
    adds AOTInductor's code to a .pt2 file), ``skip`` adds site globs, ``max_ram`` bounds private memory in bytes.
    ``check`` runs the graph before and after each pass, on the calibration data or on made-up inputs, and rejects with
    QC303 at the first pass that breaks its promise.
    Raises InputError, RecipeError or CalibrationError for a request that cannot be met and RejectedError, which carries
    the report, when the verifier refuses the result.
    """
    data = None if calibration is None else open_data(calibration, encode=lambda: encoder_beside(source))
    passes, emission = driver.split_settings(settings or {})
    chosen = driver.for_format(recipes.adjusted(recipes.load(recipe), passes, skip), emission)
    job = driver.start(target, chosen, phases, progress)
    driver.refuse_emission(job.backend, emission)
    job.emission, job.check = emission, check
    folder = None if out is not None else tempfile.TemporaryDirectory(prefix="qcompiler-")
    path = Path(out) if out is not None else Path(folder.name) / f"model{job.backend.suffix}"  # type: ignore[union-attr]
    if path.suffix != job.backend.suffix:
        raise InputError(f"artifacts for {target} are {job.backend.suffix} files, not {path.name!r}")
    captured = driver.capture(job, source, args, dynamic_shapes)
    try:
        if max_ram is not None:
            bound(captured.graph, max_ram)
        if data is not None:
            driver.calibrate_with(job, data)
        report = driver.compile_to(job, captured, path, force=force)
    finally:
        captured.close()
    return Artifact(path, report, job.target, _folder=folder)


def verify(
    source: Any,
    *,
    target: str = "ort-cpu",
    phases: Sequence[Phase] | None = None,
    run: bool = True,
    args: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Report:
    """Judge any graph for ``target``, ours or not; ``run=False`` reads rows only. Never changes the file.

    ``source`` is what :func:`compile` takes; a torch module comes with ``args`` and ``dynamic_shapes``.
    """
    backend = backend_of(target)
    progress = progress or Silent()
    chosen, seen = backend.target(target), tuple(phases or PHASES)
    path = Path(source) if isinstance(source, str | Path) else None
    kind, digest = backend.suffix[1:], ""
    with ExitStack() as cleanup:
        if path is None or path.suffix != backend.suffix:
            captured = backend.capture(source, args, dynamic_shapes, progress)
            cleanup.callback(captured.close)
            kind = captured.kind
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-"))
            path = Path(folder) / f"model{backend.suffix}"
            backend.emit(captured.graph, path, {}, progress)
        elif not path.is_file():
            raise InputError(f"there is no file {path}")
        else:
            digest = backend.digest(path)
        progress.stage("judge")
        judged = backend.verify(path, chosen, seen, run=run)
    return Report(
        target=str(chosen),
        source=Source(kind, str(source) if isinstance(source, str | Path) else "", digest),
        findings=tuple(judged.findings),
        sites=tuple(judged.sites),
        phases={p.name: p.m for p in seen},
        versions=backend.versions(),
        notes=tuple(judged.evidence.notes),
        peak_rss_bytes=driver.peak_rss(),
    )


def plan(
    source: Any,
    *,
    target: str = "ort-cpu",
    recipe: str | Path | Recipe = "w4a16",
    tp: int | None = None,
    phases: Sequence[Phase] | None = None,
    skip: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    args: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """What compiling would do to each site, without reading a weight."""
    if tp not in (None, 1):
        raise InputError("planning for tensor-parallel shards is not there yet; leave --tp out")
    passes, emission = driver.split_settings(settings or {})
    if emission.get("format") == "qdq":
        raise InputError(
            "a plan names the kernels that we choose, and with emit.format=qdq the runtime chooses them; compile, and "
            "read the verdict"
        )
    job = driver.start(target, recipes.adjusted(recipes.load(recipe), passes, skip), phases, progress)
    driver.refuse_emission(job.backend, emission)
    job.ctx.calibration = Planned()
    captured = driver.capture(job, source, args, dynamic_shapes)
    try:
        return make_plan(job, captured)
    finally:
        captured.close()


@dataclass(frozen=True)
class Inspection:
    """A file as a graph, with the verdict that rows alone give."""

    graph: Graph
    report: Report

    def text(self) -> str:
        """The IR as text."""
        return show(self.graph)

    def to_json(self) -> dict[str, Any]:
        return {"ops": sum(1 for _ in self.graph.walk()), "report": self.report.to_json()}


def inspect(path: str | Path, *, target: str | None = None) -> Inspection:
    """The graph of a file, its sites, sizes and kernels; nothing is run.

    ``target``: by default what the file says it was compiled for where that is no CPU, else the CPU of such files.
    """
    path, given = Path(path), target
    target = target or ("torch-cpu" if path.suffix == ".pt2" else "ort-cpu")
    if path.suffix == ".qir":
        return Inspection(read_qir(path), Report(target=target, source=Source("qir", str(path))))
    captured = backend_of(target).capture(path, None, None, Silent())
    try:
        told = str(dict(captured.graph.meta.get("metadata", ())).get("qcompiler.target", target))
        if given is None and told.partition(":")[0] in BACKENDS and told.partition(":")[0] != target:
            target = told
        return Inspection(captured.graph, verify(path, target=target, run=False))
    finally:
        captured.close()


def read_qir(path: Path) -> Graph:
    """The graph in a file of IR text; raises InputError."""
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read: {e}") from None


def run_passes(qir_text: str, recipe_text: str, target: str | None = None) -> str:
    """Passes over textual IR: the graph after ``recipe_text``, as text."""
    graph = parse(qir_text)
    ctx = Context(None if target is None else backend_of(target).target(target))
    run(graph, recipes.load(recipe_text).passes, ctx)
    return show(graph)


@dataclass(frozen=True)
class TargetInfo:
    """A target that can be named: examples of its chips, whether its runtime is installed, a remark."""

    name: str
    arch: tuple[str, ...]
    available: bool
    note: str


def targets() -> list[TargetInfo]:
    """Every target there is."""
    out = []
    for name in BACKENDS:
        backend = backend_of(name)
        available, note = backend.available(name)
        out.append(TargetInfo(name, backend.chips(name), available, note))
    return out


def kernels(target: str = "ort-cpu") -> list[KernelRow]:
    """The kernel rows of ``target`` in order of op and rank."""
    found = backend_of(target).target(target)
    return sorted(found.rows, key=lambda r: (r.op, r.rank))
