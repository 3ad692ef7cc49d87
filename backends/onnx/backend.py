"""The ONNX Runtime backend: targets ort-cpu and ort-cuda, artifacts are .onnx files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qcompiler.backends.base import Backend, Captured, Judged, Pair, Progress, Timed, Written
from qcompiler.backends.onnx import capture as capturing
from qcompiler.backends.onnx import kernels
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.runtime_types import MEASURED_ON, installed_version, why_not_installed
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.fileio import sha256_of
from qcompiler.ir import Graph, Op
from qcompiler.report.model import Quality
from qcompiler.sites import Site
from qcompiler.subgraph import Run
from qcompiler.target import Phase, Target
from qcompiler.verify.evidence import EvidenceResult
from qcompiler.verify.findings import Finding, Severity

MADE_UP_ROWS = 5
"""Rows of made-up inputs: more than one, and no power of two, so that a wrong reshape shows."""


def _runtime() -> bool:
    return installed_version() is not None


def _other_version(target: Target) -> list[Finding]:
    """A runtime on which the rows were not measured: an error where it lacks a kernel, else a warning."""
    version = installed_version()
    if target.name != "ort-cpu" or version is None or version.rpartition(".")[0] in MEASURED_ON:
        return []
    found = []
    for name, reasons in why_not_installed(target.rows).items():
        for reason in reasons:
            lacks = "measured on" not in reason.message
            severity: Severity = "error" if lacks else "warning"
            found.append(Finding("QC207", name, reason.message, "", reason.fix, severity))
    return found


class OrtBackend(Backend):
    """Captures to ONNX graphs, lowers to contrib ops, shows evidence from ONNX Runtime's CPU provider."""

    suffix = ".onnx"
    emission = ("external", "format")
    opened = "session"

    def target(self, spec: str) -> Target:
        return kernels.target(spec)

    def chips(self, name: str) -> tuple[str, ...]:
        return kernels.chips(name)

    def available(self, name: str) -> tuple[bool, str]:
        try:
            version = importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            return False, "onnxruntime is not installed; pip install 'qcompiler[cpu]'"
        if name == "ort-cuda":
            return False, "planned and compiled for without a device; evidence is static"
        return True, f"onnxruntime {version}"

    def digest(self, path: Path) -> str:
        return sha256_of(path)

    def capture(self, source: Any, args: Any, dynamic_shapes: Any, progress: Progress) -> Captured:
        return capturing.captured_from(source, args, dynamic_shapes, progress)

    def judge(self, graph: Graph, target: Target, phases: Sequence[Phase]) -> list[Finding]:
        from qcompiler.backends.onnx.judge import judge_graph

        return judge_graph(graph, target, phases) + _other_version(target)

    def stored(self, graph: Graph) -> dict[str, dict[str, int]]:
        from qcompiler.backends.onnx.judge import sites_of

        return {site.name: site.bytes for site in sites_of(graph)}

    def annotate(self, graph: Graph, metadata: Mapping[str, str]) -> None:
        notes = dict(graph.meta.get("model_metadata_props", ()))
        graph.meta["model_metadata_props"] = tuple((notes | dict(metadata)).items())

    def emit(self, graph: Graph, path: Path, options: Mapping[str, Any], progress: Progress) -> Written:
        def told(done: int, total: int) -> None:
            progress.advance(done, total, "bytes")

        info = emit_onnx(graph, path, external=options.get("external"), told=told)
        names = (path.name,) + ((info.data_path.name,) if info.data_path is not None else ())
        return Written(names, info.nbytes + info.data_nbytes)

    def evidence(self, path: Path, target: Target, phases: Sequence[Phase], sites: Sequence[Site]) -> EvidenceResult:
        if not _runtime():
            return EvidenceResult("static", notes=["onnxruntime is not installed: the verdict rests on kernel rows"])
        from qcompiler.backends.onnx.evidence import OrtEvidence

        return OrtEvidence(target, phases).collect(path)

    def verify(self, path: Path, target: Target, phases: Sequence[Phase], *, run: bool) -> Judged:
        from qcompiler.backends.onnx.evidence import verify_file

        sites, findings, evidence = verify_file(path, target, phases, run)
        return Judged(sites, findings, evidence)

    def quality(self, reference: Path, artifact: Path, data: Any) -> Quality | Finding | str:
        if not _runtime():
            return "not compared: onnxruntime is not installed"
        from qcompiler.backends.onnx.quality import compare

        return compare(reference, artifact, data)

    def runner(self, graph: Graph, taps: Sequence[str]) -> AbstractContextManager[Run]:
        if not _runtime():
            raise InputError("running a model needs onnxruntime, which is not installed: pip install 'qcompiler[cpu]'")
        from qcompiler.backends.onnx.running import runnable

        return runnable(graph, taps)

    def raised(self, graph: Graph, opset: int, why: str) -> Graph:
        from qcompiler.backends.onnx.opsets import raised

        return raised(graph, opset, why)

    def made_up(self, graph: Graph, seed: int) -> Iterator[Mapping[str, Array]]:
        from qcompiler.backends.onnx.feeds import made_up

        return made_up(graph, MADE_UP_ROWS, seed)

    def kernel_error(self, op: Op, operands: Sequence[Array | None]) -> Array | float:
        from qcompiler.backends.onnx.kernel_error import error_of

        return error_of(op, operands)

    def versions(self) -> dict[str, str]:
        found = {}
        for name in ("qcompiler", "onnx", "onnxruntime", "numpy", "torch"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def timed(self, path: Path, threads: int, dims: Mapping[str, int], folder: Path) -> Timed:
        from qcompiler.backends.onnx.timing import OrtTimed

        return OrtTimed(path, threads, dims, folder)

    def paired(self, reference: Path, artifact: Path, *, per_site: bool) -> Pair:
        from qcompiler.backends.onnx.pairing import OrtPair

        return OrtPair(reference, artifact, per_site=per_site)

    def open(self, path: Path, target: Target) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = session.get_modelmeta().custom_metadata_map.get("qcompiler.session", "")
        if target.name == "ort-cuda" or wanted:
            raise InputError(f"an artifact for {target} runs on its device; open {path.name} in a session of your own")
        return session

    def call(self, session: Any, inputs: Sequence[Any]) -> list[Any]:
        names = [i.name for i in session.get_inputs()]
        if len(inputs) != len(names):
            raise InputError(f"the model takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
        arrays = [v.detach().cpu().numpy() if hasattr(v, "detach") else v for v in inputs]
        found: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return found
