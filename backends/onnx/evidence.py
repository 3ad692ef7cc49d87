"""What ONNX Runtime shows of an artifact: does it load, which graph does it run, which kernels, with which numbers.

The artifact is opened in a child process with default options. The runtime's own optimized graph is judged by the rules
of :mod:`.judge`; every distinct low-bit node of it is then run alone and held against a float64 reference; where the
optimizer rewrote quantized ops, its result is compared with that of the unoptimized graph. What is measured overrules
what the kernel rows promise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcompiler.backends.chips import detect_features
from qcompiler.backends.onnx.alone import Measured, Prober, probed_rows
from qcompiler.backends.onnx.bias import check_bias
from qcompiler.backends.onnx.differs import compare
from qcompiler.backends.onnx.folded import check_folded
from qcompiler.backends.onnx.judge import Judgement, NodeVerdict, allowed_of, examine, session_of
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.nodes import low_bit
from qcompiler.backends.onnx.opening import Names, Opened, constant_bytes, open_big, open_small
from qcompiler.backends.onnx.pointwise import FUNCTIONS, PointwiseProber
from qcompiler.backends.onnx.promised import check_promised
from qcompiler.backends.onnx.values import check_values
from qcompiler.backends.onnx.worker import Worker
from qcompiler.ir import Graph
from qcompiler.sites import Site
from qcompiler.target import PHASES, Phase, Target
from qcompiler.verify.evidence import EvidenceCollector, EvidenceResult, NodeEvidence
from qcompiler.verify.findings import Finding
from qcompiler.verify.static import find_unfused

MAX_BYTES = 256 << 20
"""Bytes of constants above which an artifact is not opened whole."""
COMPARE_BYTES = 64 << 20
"""Bytes of constants above which the optimizer's work is not compared with the unoptimized graph."""

NOTHING = "the model holds nothing quantized: there is nothing to judge"


def _holds_nothing(source: Graph, static: Judgement) -> bool:
    return not static.nodes and not static.findings and not any(op.name in FUNCTIONS for op in source.walk())


@dataclass
class Inspection:
    """Everything that is known about one artifact."""

    source: Graph
    static: Judgement
    final: Judgement
    result: EvidenceResult
    measured: dict[str, list[Measured]] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """The sites of the graph that runs, marked with how they were seen."""
        out = self.final.sites
        for site in out:
            seen = self.result.of(site.name)
            if seen and self.result.kind == "measured":
                site.evidence = "measured"
            bad = next((n for n in seen if n.verdict != "fused"), None)
            if bad is not None and site.status == "fused":
                site.status, site.kernel = "unfused", {}
                site.reason = f"the runtime shows {bad.verdict} in phase {bad.phase or 'any'}"
        return out


class OrtEvidence(EvidenceCollector):
    """Evidence from ONNX Runtime's CPU provider. ``worker``: a probe process to share; by default one a call.

    For ``ort-cuda`` nothing is run: the evidence is static, and says so.
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

    def inspect(self, path: Path) -> Inspection:
        """The artifact at ``path``, opened and judged; raises InputError when it is no ONNX model at all."""
        source = load_onnx(path)
        static = examine(source, self.target, self.phases)
        out = Inspection(source, static, static, EvidenceResult("static"))
        if self.target.name != "ort-cpu":
            _read_only(out, f"{self.target} is not here: the verdict rests on its kernel rows")
            return out
        if _holds_nothing(source, static):
            out.result.notes.append(NOTHING)
        with tempfile.TemporaryDirectory(prefix="qcompiler.evidence.") as folder:
            if self.worker is not None:
                self._run(out, path, self.worker, Path(folder))
            else:
                with Worker() as worker:
                    self._run(out, path, worker, Path(folder))
        return out

    def _run(self, out: Inspection, path: Path, worker: Worker, folder: Path) -> None:
        session, size = session_of(out.source), constant_bytes(out.source)
        if size > self.max_bytes:
            opened = open_big(path, out.source, worker, folder, session)
        else:
            opened = open_small(path, out.source, self.phases, worker, folder, session)
        result = out.result
        result.notes += opened.notes
        result.findings += check_values(out.source)
        if not opened.loaded:
            _not_loaded(out, opened, path)
            return
        result.kind = "measured"
        names = Names(out.source)
        if opened.graph is not None:
            allowed = names.allowed(opened.graph, allowed_of(out.source))
            out.final = examine(opened.graph, self.target, self.phases, final=True, allowed=allowed)
            _rename(out.final, names)
            _tell_as_written(out)
            result.findings += check_folded(out.source, opened.graph) + check_bias(out.source, opened.graph, names)
            result.findings += _replaced(out, names)
        self._chip(out)
        self._probe(out, Prober(worker, folder, session))
        ran = out.final.graph
        seen, wrong = PointwiseProber(worker, folder).check(ran, {op: names.of(op) for op in ran.walk()})
        result.nodes += seen
        result.findings += wrong
        _whole_run(out, opened)
        if size <= COMPARE_BYTES and not any(f.severity == "error" for f in out.final.findings + result.findings):
            result.findings += compare(path, out.source, opened, worker, folder)
        result.findings = list(dict.fromkeys(out.final.findings + result.findings))

    def _chip(self, out: Inspection) -> None:
        here = detect_features()
        if self.target.features != here and self.target.arch:
            out.result.kind = "static"
            out.result.notes.append(
                f"measured on another chip than {self.target}: what was measured can only add to what its rows say"
            )

    def _probe(self, out: Inspection, prober: Prober) -> None:
        """Run each distinct node alone, and let what it does overrule what its rows say."""
        for verdict in out.final.nodes:
            node = low_bit(verdict.op)
            if node is None:
                _read_verdict(out, verdict, self.phases)
                continue
            measured: list[Measured] = []
            for phase in self.phases:
                found = prober.measure(node, probed_rows(phase.m))
                if found is not None:
                    measured.append(found)
                    _record(out, verdict, phase, found)
                else:
                    _read_verdict(out, verdict, (phase,))
            _weigh(out, verdict, measured)


def _read_only(out: Inspection, note: str) -> None:
    """Evidence from rows alone."""
    out.result.notes.append(note)
    out.result.findings = list(out.static.findings)
    for verdict in out.static.nodes:
        _read_verdict(out, verdict, ())


def _read_verdict(out: Inspection, verdict: NodeVerdict, phases: Sequence[Phase]) -> None:
    """A node that was not run alone: what the rows say of it."""
    for name in [p.name for p in phases] or list(verdict.kernels) or [""]:
        out.result.nodes.append(
            NodeEvidence(verdict.name, verdict.op_type, verdict.verdict, verdict.kernels.get(name, ""), name)
        )


def _record(out: Inspection, verdict: NodeVerdict, phase: Phase, found: Measured) -> None:
    kernel = verdict.kernels.get(phase.name, "") if found.verdict == "fused" else ""
    facts = dict(found.facts) | ({"error": found.error} if found.error else {})
    out.result.nodes.append(NodeEvidence(verdict.name, verdict.op_type, found.verdict, kernel, phase.name, facts))
    out.measured.setdefault(verdict.name, []).append(found)


_LEFT_OVER = frozenset({"QC101", "QC102"})
_CODES = {"dequant": "QC104", "wrong": "QC303", "error": "QC902"}
_SAYS = {
    "dequant": "expands the whole weight to float",
    "wrong": "computes wrong numbers",
    "error": "does not run",
}


def _weigh(out: Inspection, verdict: NodeVerdict, measured: Sequence[Measured]) -> None:
    """Measurements against the static verdict of one node: the worse one counts, except that a measured fused kernel
    clears a node that the rows only do not know (QC104)."""
    bad = next((m for m in measured if m.verdict != "fused"), None)
    if bad is not None:
        if verdict.verdict != bad.verdict and not (verdict.verdict in ("wrong", "error") and bad.verdict != "wrong"):
            out.final.findings.append(_measured_finding(verdict, bad))
            verdict.verdict, verdict.kernels = bad.verdict, {}
            verdict.findings = [*verdict.findings, out.final.findings[-1]]
        return
    doubts = [f for f in verdict.findings if f.code == "QC104"]
    if measured and doubts and verdict.verdict == "dequant" and out.result.kind == "measured":
        out.final.findings = [f for f in out.final.findings if f not in doubts]
        verdict.verdict, verdict.findings = "fused", [f for f in verdict.findings if f not in doubts]
        verdict.kernels = {n.phase: f"ort-cpu/{verdict.op_type}" for n in out.result.of(verdict.name)}
        out.result.notes.append(f"'{verdict.name}': no kernel row serves it, and yet it ran fused ({doubts[0].reason})")


def _measured_finding(verdict: NodeVerdict, bad: Measured) -> Finding:
    message = f"{verdict.op_type} {verdict.n}x{verdict.k} <{verdict.scheme}> {_SAYS[bad.verdict]}"
    facts = ", ".join(f"{k} {v}" for k, v in bad.facts.items())
    reason = f"measured: {facts}" + (f"; {bad.error[:300]}" if bad.error else "")
    return Finding(
        _CODES[bad.verdict], verdict.name, message, reason, "see 'qcompiler plan' for a kernel that stays fused"
    )


def _rename(final: Judgement, names: Names) -> None:
    """Call the ops of the optimized graph what the artifact calls them."""
    known: dict[str, str] = {}
    for verdict in final.nodes:
        known[verdict.op.label] = verdict.name = names.of(verdict.op)
    for op in final.graph.walk():
        known.setdefault(op.label, names.of(op))

    def renamed(f: Finding) -> Finding:
        return Finding(f.code, known.get(f.op, f.op), f.message, f.reason, f.fix, f.severity)

    final.findings = [renamed(f) for f in final.findings]
    for verdict in final.nodes:
        verdict.findings = [renamed(f) for f in verdict.findings]


def _tell_as_written(out: Inspection) -> None:
    """Describe a dequantize that is left over as the artifact has it: the runtime may have joined its neighbours."""
    written: dict[str, Finding] = {}
    for found in [*out.static.findings, *find_unfused(out.source)]:
        if found.code in _LEFT_OVER:
            written.setdefault(found.op, found)
    swap = {f: written.get(f.op, f) for f in out.final.findings if f.code in _LEFT_OVER}
    out.final.findings = [swap.get(f, f) for f in out.final.findings]
    for verdict in out.final.nodes:
        verdict.findings = [swap.get(f, f) for f in verdict.findings]


def _replaced(out: Inspection, names: Names) -> list[Finding]:
    """QC106: low-bit nodes of the artifact that the runtime's graph no longer has."""
    kept = {v.name for v in out.final.nodes} | {v.op.label for v in out.final.nodes}
    codes = {
        value.name
        for v in out.final.nodes
        for value in v.op.operands
        if value is not None and value.is_const and value.tensor.dtype is not None and not value.tensor.dtype.is_float
    }
    found = []
    for verdict in out.static.nodes:
        node = None if verdict.foretold else low_bit(verdict.op)
        if node is None or verdict.name in kept or (node.codes is not None and node.codes.name in codes):
            continue
        message = f"{verdict.op_type} {verdict.n}x{verdict.k} is not in the graph that the runtime runs"
        fix = "report it with the artifact: the runtime must keep this node"
        found.append(Finding("QC106", verdict.name, message, "its optimizer split or replaced the node", fix))
    return found


def _whole_run(out: Inspection, opened: Opened) -> None:
    """Fallbacks of the whole model that no node alone showed."""
    if not opened.runs or not opened.runs[0]["ok"]:
        return
    memory = opened.runs[0]["memory"]
    for verdict in out.final.nodes:
        temp = int(memory.get(verdict.op.label, 0))
        whole = 4 * verdict.n * verdict.k
        if verdict.verdict != "fused" or not opened.runs[0]["unpacked"] or not whole or temp < whole:
            continue
        if verdict.op_type == "MatMulNBits":
            facts = {"temp_bytes": temp, "expanded_bytes": whole, "fallback_lines": opened.runs[0]["unpacked"]}
            out.final.findings.append(_measured_finding(verdict, Measured("dequant", facts)))
            verdict.verdict, verdict.kernels = "dequant", {}
            out.result.nodes.append(NodeEvidence(verdict.name, verdict.op_type, "dequant", "", "", facts))


def _not_loaded(out: Inspection, opened: Opened, path: Path) -> None:
    """A model that does not load: the static finding that says why, else QC902 with the runtime's words."""
    errors = [f for v in out.static.nodes if v.verdict == "error" for f in v.findings]
    errors += [f for f in out.static.findings if f.code == "QC201"]
    out.result.findings += [f for f in out.static.findings if f.severity == "error"]
    words = " ".join(opened.error.split())[:400]
    out.result.notes.append(f"the runtime does not load the model: {words}")
    if not errors:
        op = opened.blamed(out.source) or path.name
        message = "ONNX Runtime crashes on the model" if opened.crashed else "ONNX Runtime does not load the model"
        out.result.findings.append(Finding("QC902", op, message, words, "repair what the runtime names"))
    out.result.findings = list(dict.fromkeys(out.result.findings))
    for verdict in out.static.nodes:
        out.result.nodes.append(NodeEvidence(verdict.name, verdict.op_type, "error", "", "", {"error": words}))


def verify_file(
    path: Path, target: Target, phases: Sequence[Phase] = PHASES, run: bool = True, *, worker: Worker | None = None
) -> tuple[list[Site], list[Finding], EvidenceResult]:
    """Judge any ONNX file: its quantized sites, everything that was found, and the evidence.

    ``run=False`` opens nothing: what the runtime would fuse is foretold, and in doubt the answer is a rejection. Raises
    InputError for a file that is no ONNX model.
    """
    path = Path(path)
    collector = OrtEvidence(target, phases, worker=worker)
    if run:
        seen = collector.inspect(path)
    else:
        source = load_onnx(path)
        static = examine(source, target, phases)
        seen = Inspection(source, static, static, EvidenceResult("static"))
        _read_only(seen, "nothing was run: the verdict rests on kernel rows and foretold fusions")
        seen.result.findings += check_values(source) + check_folded(source, source)
        if _holds_nothing(source, static):
            seen.result.notes.append(NOTHING)
    sites = seen.sites
    seen.result.findings += check_promised(path, seen.source, {s.name for s in sites})
    seen.result.findings = list(dict.fromkeys(seen.result.findings))
    return sites, list(seen.result.findings), seen.result
