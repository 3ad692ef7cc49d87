"""What torch shows of a ``.pt2`` file: does it load, what ran in each low-bit call, what that allocated, which numbers.

The program is run in a child process, op by op under the profiler, with inputs that are made up for each phase. What is
measured overrules what the kernel rows promise; a call that was never seen is judged by its row alone.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler.backends.base import Judged
from qcompiler.backends.chips import detect_features
from qcompiler.backends.onnx.probe import write_arrays
from qcompiler.backends.onnx.promised import check_promised
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.conditions import WIDTH
from qcompiler.backends.torch.generated import code_in, inductor_expands, judge_code, judge_package
from qcompiler.backends.torch.judge import Judgement, NodeVerdict, examine, metadata_of, said
from qcompiler.backends.torch.reference import WRONG
from qcompiler.backends.torch.sizing import constant_bytes, phase_feeds
from qcompiler.backends.torch.stored import check_stored
from qcompiler.backends.triton.rows import sm_features
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.sites import Site
from qcompiler.target import PHASES, Phase, Target
from qcompiler.verify.evidence import EvidenceCollector, EvidenceResult, NodeEvidence, Verdict
from qcompiler.verify.findings import Finding

__all__ = ["NOTHING", "Inspection", "TorchEvidence", "inductor_expands", "verify_file"]

MODULE = "qcompiler.backends.torch.probe"
MAX_BYTES = 8 << 30
"""Bytes of constants above which a program is not run."""
SCRATCH = 96 << 10
"""Bytes that a kernel may take besides copies of activations and results: oneDNN's scratchpad is 65 KiB."""
NOTHING = "the program holds nothing quantized: there is nothing to judge"
_CODES: dict[Verdict, str] = {"dequant": "QC104", "wrong": "QC303", "error": "QC902"}


@dataclass
class Inspection:
    """Everything that is known about one file."""

    judged: Judgement
    result: EvidenceResult

    @property
    def sites(self) -> list[Site]:
        """The sites, marked with how they were seen."""
        out = self.judged.sites
        for site in out:
            seen = self.result.of(site.name)
            if any("m" in n.facts for n in seen) and self.result.kind == "measured":
                site.evidence = "measured"
        return out


class TorchEvidence(EvidenceCollector):
    """Evidence from torch on this machine's CPU, for ``torch-cuda`` on its GPU. ``worker``: a probe process; by default
    the one of this process.

    For ``torch-cuda`` where there is no GPU, and for programs of more than ``max_bytes``, nothing is run: the evidence
    is static and says so.
    """

    def __init__(
        self,
        target: Target,
        phases: Sequence[Phase] = PHASES,
        *,
        max_bytes: int = MAX_BYTES,
        worker: Worker | None = None,
    ) -> None:
        super().__init__(target, phases)
        self.max_bytes, self.worker = max_bytes, worker

    def collect(self, path: Path) -> EvidenceResult:
        return self.inspect(Path(path)).result

    def inspect(self, path: Path, *, run: bool = True) -> Inspection:
        """The file at ``path``, judged and (``run``) run; raises InputError when it is no program at all."""
        graph = load(path)
        judged = examine(graph, self.target, self.phases)
        out = Inspection(judged, EvidenceResult("static", notes=[]))
        why = self._why_not_run(graph, run)
        if not judged.nodes and not judged.findings:
            out.result.notes.append(NOTHING)
        elif why:
            out.result.notes.append(why)
        else:
            with tempfile.TemporaryDirectory(prefix="qcompiler.evidence.") as folder:
                self._run(out, path, Path(folder))
        _read(out, self.phases)
        code = code_in(path)
        if code is not None:
            beside = judge_code(code)
            out.result.notes += beside.evidence.notes
            out.result.findings += beside.findings
        out.result.findings = list(dict.fromkeys([*judged.findings, *out.result.findings, *check_stored(judged)]))
        return out

    @property
    def _cuda(self) -> bool:
        return self.target.name == "torch-cuda"

    def _why_not_run(self, graph: Graph, run: bool) -> str:
        if not run:
            return "nothing was run: the verdict rests on kernel rows and on what is known of torch's operators"
        if self._cuda and not torch.cuda.is_available():
            return f"{self.target} is not here: the verdict rests on its kernel rows"
        size = constant_bytes(graph)
        if size > self.max_bytes:
            return f"not run: {size / 2**30:.1f} GiB of weights are over the limit; the verdict rests on kernel rows"
        width, here = metadata_of(graph).get(WIDTH, ""), _width_here()
        if self._cuda:
            return ""
        if width and width != here and not (width == "avx2" and here == "avx512"):
            return f"not run: its weights are packed for {width}, and this machine runs torch's {here} code"
        return ""

    def _run(self, out: Inspection, path: Path, folder: Path) -> None:
        """Run each phase and let what it shows overrule the rows."""
        graph, result = out.judged.graph, out.result
        width = "" if self._cuda else metadata_of(graph).get(WIDTH, "")
        at = folder / "at"
        job: dict[str, Any] = {"path": str(path.absolute()), "at": str(at), "device": "cuda" if self._cuda else ""}
        job["capability"] = width if width and width != _width_here() else ""
        worker = self.worker or shared_worker(job["capability"])
        answers: dict[str, Any] = {}
        for attempt, feeds in enumerate(phase_feeds(graph, self.phases)):
            phases = []
            for name, feed in feeds.items():
                arrays = folder / f"{attempt}.{name}.npz"
                write_arrays(str(arrays), list(feed.values()))
                phases.append({"name": name, "feed": {"names": list(feed), "arrays": str(arrays)}})
            try:
                answer = worker.ask(job | {"phases": phases})
            except ProbeDied as e:
                _died(out, path, str(e), at)
                return
            if not answer["loaded"]:
                _not_loaded(out, path, answer["error"])
                return
            answers = {run["phase"]: run for run in answer["runs"]}
            if any(run["ok"] for run in answers.values()):
                break
        if not answers:
            result.notes.append("not run: no inputs could be made up for the program; the verdict rests on kernel rows")
            return
        errors = list(dict.fromkeys(run["error"] for run in answers.values() if not run["ok"]))
        if all(not run["ok"] for run in answers.values()):
            result.notes.append(f"not run: the program refuses the inputs that were made up for it ({errors[0]})")
            return
        result.kind = "measured"
        if errors:
            result.notes.append(f"not every phase could be run with made-up inputs: {errors[0]}")
        self._weigh(out, answers)
        if self.target.arch and self.target.features != (_gpu_here() if self._cuda else detect_features()):
            result.kind = "static"
            result.notes.append(f"measured on another chip than {self.target}: that can only add to what its rows say")

    def _weigh(self, out: Inspection, answers: Mapping[str, Any]) -> None:
        """Measurements against the static verdict of each call: the worse one counts, except that a call of which
        nothing was known is cleared by what was seen."""
        peaks = {name: run["peak"] for name, run in answers.items() if run["ok"]}
        nodes = {v.node.codes: v for v in reversed(out.judged.nodes) if v.node is not None}
        packed = sum(sum(v.bytes.values()) for v in nodes.values())
        told = ", ".join(f"{name} {peak}" for name, peak in peaks.items())
        out.result.notes.append(f"bytes of activations and temporaries at once: {told}; packed weights: {packed}")
        for verdict in out.judged.nodes:
            if verdict.node is None:
                continue
            measured = [(p, facts) for p in self.phases if (facts := _facts(answers, p, verdict))]
            worst = next((v for _, f in measured if (v := _verdict_of(verdict, f)) != "fused"), None)
            for phase, facts in measured:
                self._record(out, verdict, phase, facts)
            if worst is not None and verdict.verdict in ("fused", "slow"):
                bad = next(f for _, f in measured if _verdict_of(verdict, f) == worst)
                found = _measured_finding(verdict, worst, bad)
                verdict.verdict, verdict.kernels = worst, {}
                verdict.findings = [found, *verdict.findings]
                out.judged.findings.append(found)
            elif worst is None and measured and not verdict.node.known and verdict.verdict == "dequant":
                _clear(out, verdict, [p.name for p, _ in measured], self.target)

    def _record(self, out: Inspection, verdict: NodeVerdict, phase: Phase, facts: dict[str, Any]) -> None:
        seen = _verdict_of(verdict, facts)
        # What was not measured (speed, a missing row) stays the static verdict.
        told = verdict.verdict if seen == "fused" and (verdict.node is None or verdict.node.known) else seen
        kernel = verdict.kernels.get(phase.name, "") if told == "fused" else ""
        out.result.nodes.append(NodeEvidence(verdict.name, verdict.op_type, told, kernel, phase.name, facts))


_WORKERS: dict[str, Worker] = {}


def shared_worker(capability: str = "") -> Worker:
    """The probe process of this process: importing torch takes it seconds. ``capability``: the vector width that torch
    is held down to, which it reads once."""
    if capability not in _WORKERS:
        _WORKERS[capability] = Worker(module=MODULE)
        atexit.register(_WORKERS[capability].close)
    return _WORKERS[capability]


def _gpu_here() -> frozenset[str]:
    """What the GPU of this machine offers."""
    major, minor = torch.cuda.get_device_capability()
    return sm_features(10 * major + minor)


def _width_here() -> str:
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def _facts(answers: Mapping[str, Any], phase: Phase, verdict: NodeVerdict) -> dict[str, Any]:
    run = answers.get(phase.name)
    found: dict[str, Any] = dict(run["ops"].get(verdict.op.label, {})) if run and run["ok"] else {}
    if not found or verdict.node is None:
        return {}
    facts = {"m": found["m"], "ran": found.get("ran", []), "temp_bytes": found.get("temp", 0)}
    # Copies of the activation and of the result: floats, and sums in 32 bits.
    facts["allowed_bytes"] = SCRATCH + 8 * found["elements"]
    facts["expanded_bytes"] = 2 * verdict.node.rows * verdict.node.columns
    return facts | ({} if found["off"] is None else {"relative_error": round(found["off"], 6)})


def _verdict_of(verdict: NodeVerdict, facts: Mapping[str, Any]) -> Verdict:
    """What the measurements alone say: temporaries of the size of the expanded weight, and numbers."""
    node = verdict.node
    if facts.get("relative_error", 0.0) > WRONG:
        return "wrong"
    if node is None or node.kind == "matmul":
        return "fused"
    whole, temp = facts["expanded_bytes"], facts["temp_bytes"]
    return "dequant" if whole and temp >= whole and temp > facts["allowed_bytes"] else "fused"


def _measured_finding(verdict: NodeVerdict, bad: Verdict, facts: Mapping[str, Any]) -> Finding:
    told = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "ran")
    ran = ", ".join(facts.get("ran", [])[:4])
    fix = "see 'qcompiler plan' for a kernel that stays fused"
    return Finding(_CODES[bad], verdict.name, said(verdict, bad), f"measured: {told}; it ran {ran}", fix)


def _clear(out: Inspection, verdict: NodeVerdict, phases: Sequence[str], target: Target) -> None:
    doubts = [f for f in verdict.findings if f.code == "QC104"]
    out.judged.findings = [f for f in out.judged.findings if f not in doubts]
    verdict.findings = [f for f in verdict.findings if f not in doubts]
    verdict.verdict = "fused"
    verdict.kernels = dict.fromkeys(phases, f"{target.name}/{verdict.op.name}")
    out.result.notes.append(f"'{verdict.name}': no kernel row serves it, and yet it ran without expanding its weight")


def _read(out: Inspection, phases: Sequence[Phase]) -> None:
    """Calls and phases that were not run: what the rows say of them."""
    for verdict in out.judged.nodes:
        seen = {n.phase for n in out.result.of(verdict.name)}
        if out.result.kind == "measured" and verdict.node is not None and not seen:
            continue  # the run did not come by it
        for phase in phases:
            if phase.name not in seen:
                kernel = verdict.kernels.get(phase.name, "")
                out.result.nodes.append(
                    NodeEvidence(verdict.name, verdict.op_type, verdict.verdict, kernel, phase.name)
                )


def _died(out: Inspection, path: Path, words: str, at: Path) -> None:
    """The process ended: the op that ran then, and the static finding that says why where there is one."""
    label = at.read_bytes().decode(errors="replace").strip() if at.exists() else ""
    out.result.notes.append(f"the process that ran the program ended: {words}")
    if not any(f.op == label and f.severity == "error" for f in out.judged.findings):
        where = f"in '{label}'" if label else "while it opened the program"
        message = f"torch ends the process {where}"
        fix = "leave this call out, or repair what it is given"
        out.result.findings.append(Finding("QC902", label or path.name, message, words, fix))
    for verdict in out.judged.nodes:
        if verdict.op.label == label:
            verdict.verdict, verdict.kernels = "error", {}


def _not_loaded(out: Inspection, path: Path, words: str) -> None:
    out.result.findings.append(
        Finding("QC902", path.name, "torch does not load the program", words, "repair what torch names")
    )
    for verdict in out.judged.nodes:
        verdict.verdict, verdict.kernels = "error", {}


def verify_file(path: Path, target: Target, phases: Sequence[Phase] = PHASES, run: bool = True) -> Judged:
    """Judge any ``.pt2`` file: its quantized sites, everything that was found, and the evidence.

    ``run=False`` runs nothing. A package of AOTInductor is judged by the code in it. Raises InputError for a file that
    is neither.
    """
    path = Path(path)
    package = judge_package(path)
    if package is not None:
        return package
    try:
        seen = TorchEvidence(target, phases).inspect(path, run=run)
    except InputError as e:
        from qcompiler.backends.torch.unreadable import judge_unreadable

        found = judge_unreadable(path, e)
        if found is None:
            raise
        return found
    sites = seen.sites
    seen.result.findings += check_promised(path, seen.judged.graph, {s.name for s in sites})
    seen.result.findings = list(dict.fromkeys(seen.result.findings))
    return Judged(sites, list(seen.result.findings), seen.result)
