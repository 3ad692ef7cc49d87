"""The torch backend: targets torch-cpu and torch-cuda, artifacts are .pt2 files of torch.export."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qcompiler.backends.base import Backend, Captured, Judged, Pair, Progress, Timed, Written
from qcompiler.backends.torch import kernels
from qcompiler.dtypes import Array
from qcompiler.fileio import sha256_of
from qcompiler.ir import Graph, Op
from qcompiler.report.model import Quality
from qcompiler.sites import Site
from qcompiler.subgraph import Run
from qcompiler.target import Phase, Target
from qcompiler.verify.evidence import EvidenceResult
from qcompiler.verify.findings import Finding

NVIDIA = Path("/proc/driver/nvidia/version")
"""There where an NVIDIA driver is loaded."""


def gpu_here(version: str) -> tuple[bool, str]:
    """Whether artifacts for torch-cuda run here, with torch ``version``, and a remark. Imports no runtime."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False, "triton is not installed: artifacts are compiled and judged here, and run by slow references"
    if not NVIDIA.exists():
        return False, "no NVIDIA driver: artifacts are compiled and judged here, and run by slow references"
    return True, f"torch {version}, triton {triton}"


class TorchBackend(Backend):
    """Captures to aten graphs, lowers to torch's low-bit ops, shows evidence from the profiler."""

    suffix = ".pt2"
    emission = ("aot",)
    opened = "module"

    def target(self, spec: str) -> Target:
        return kernels.target(spec)

    def chips(self, name: str) -> tuple[str, ...]:
        return kernels.chips(name)

    def available(self, name: str) -> tuple[bool, str]:
        try:
            version = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            return False, "torch is not installed"
        return gpu_here(version) if name == "torch-cuda" else (True, f"torch {version}")

    def digest(self, path: Path) -> str:
        return sha256_of(path)

    def capture(self, source: Any, args: Any, dynamic_shapes: Any, progress: Progress) -> Captured:
        from qcompiler.backends.torch.program import captured_from

        return captured_from(source, args, dynamic_shapes, progress)

    def judge(self, graph: Graph, target: Target, phases: Sequence[Phase]) -> list[Finding]:
        from qcompiler.backends.torch.judge import judge_graph

        return judge_graph(graph, target, phases)

    def stored(self, graph: Graph) -> dict[str, dict[str, int]]:
        from qcompiler.backends.torch.judge import sites_of

        return {site.name: site.bytes for site in sites_of(graph)}

    def annotate(self, graph: Graph, metadata: Mapping[str, str]) -> None:
        notes = dict(graph.meta.get("metadata", ()))
        graph.meta["metadata"] = tuple((notes | dict(metadata)).items())

    def emit(self, graph: Graph, path: Path, options: Mapping[str, Any], progress: Progress) -> Written:
        from qcompiler.backends.torch.program import write

        return write(graph, path, options, progress)

    def evidence(self, path: Path, target: Target, phases: Sequence[Phase], sites: Sequence[Site]) -> EvidenceResult:
        from qcompiler.backends.torch.evidence import TorchEvidence

        return TorchEvidence(target, phases).collect(path)

    def verify(self, path: Path, target: Target, phases: Sequence[Phase], *, run: bool) -> Judged:
        from qcompiler.backends.torch.evidence import verify_file

        return verify_file(path, target, phases, run)

    def quality(self, reference: Path, artifact: Path, data: Any) -> Quality | Finding | str:
        from qcompiler.backends.torch.quality import compare

        return compare(reference, artifact, data)

    def runner(self, graph: Graph, taps: Sequence[str]) -> AbstractContextManager[Run]:
        from qcompiler.backends.torch.running import runnable

        return runnable(graph, taps)

    def made_up(self, graph: Graph, seed: int) -> Iterator[Mapping[str, Array]]:
        from qcompiler.backends.torch.workload import guesses

        return guesses(graph, seed)

    def kernel_error(self, op: Op, operands: Sequence[Array | None]) -> Array | float:
        from qcompiler.backends.torch.kernel_error import error_of

        return error_of(op, operands)

    def versions(self) -> dict[str, str]:
        found = {}
        for name in ("qcompiler", "torch", "numpy"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def timed(self, path: Path, threads: int, dims: Mapping[str, int], folder: Path) -> Timed:
        from qcompiler.backends.torch.timing import TorchTimed

        return TorchTimed(path, threads, dims, folder)

    def paired(self, reference: Path, artifact: Path, *, per_site: bool) -> Pair:
        from qcompiler.backends.torch.pairing import TorchPair

        return TorchPair(reference, artifact, per_site=per_site)

    def open(self, path: Path, target: Target) -> Any:
        from qcompiler.backends.torch.program import open_module

        return open_module(path)

    def call(self, session: Any, inputs: Sequence[Any]) -> list[Any]:
        from qcompiler.backends.torch.program import call_module

        return call_module(session, inputs)
