"""One compilation from source to artifact: capture, passes, verdict, emission, evidence, report."""

from __future__ import annotations

import itertools
import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler import checking, debug
from qcompiler import recipe as recipes
from qcompiler.backends import backend_of
from qcompiler.backends.base import COMPARE_LIMIT, Backend, Captured, Progress, Silent
from qcompiler.calibrate.cache import Cache
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import Data
from qcompiler.checking import CheckedPass, CheckFailed, CheckHook
from qcompiler.comparing import Feed
from qcompiler.errors import BadWeights, InputError, RecipeError, RejectedError
from qcompiler.fileio import Staged
from qcompiler.ir import Graph
from qcompiler.passes.lower_qdq import FORETOLD
from qcompiler.pipeline import Context, Hook, Pass, PassFailed, run
from qcompiler.recipe import Recipe
from qcompiler.report.model import ArtifactInfo, Quality, RecipeInfo, Report, Source, Timing
from qcompiler.scheme import Scheme
from qcompiler.speeds import slower_notes
from qcompiler.target import PHASES, Phase, Target
from qcompiler.verify.evidence import EvidenceResult
from qcompiler.verify.findings import Finding

FORMATS = ("fused", "qdq")
EMISSION = ("external", "format", "aot")
"""Options of the emission: weights in a file beside the artifact; standard ONNX; AOTInductor's code inside."""
FUSING = frozenset({"fuse-embedding", "fuse-integer", "fuse-linear", "choose-layout"})
"""The passes that choose a kernel; in standard ONNX the runtime does that."""


@dataclass
class Job:
    """A compilation in progress and what it has found so far."""

    recipe: Recipe
    target: Target
    backend: Backend
    phases: Sequence[Phase] = PHASES
    progress: Progress = field(default_factory=Silent)
    ctx: Context = field(init=False)
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    quality: Quality | None = None
    artifact: ArtifactInfo | None = None
    emission: Mapping[str, Any] = field(default_factory=dict)
    calibrator: Calibrator | None = None
    check: bool = False
    checks: list[CheckedPass] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ctx = Context(self.target, self.phases, progress=lambda name: self.progress.stage(f"pass {name}"))

    def timed(self, key: str, start: float) -> None:
        self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start


def start(target: str, recipe: Recipe, phases: Sequence[Phase] | None, progress: Progress | None) -> Job:
    """A job for ``target``; raises InputError for an unknown one."""
    backend = backend_of(target)
    return Job(recipe, backend.target(target), backend, tuple(phases or PHASES), progress or Silent())


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of passes, and of the emission (:data:`EMISSION`); raises RecipeError for others."""
    passes: dict[str, Any] = {}
    emission: dict[str, Any] = {}
    for path, value in settings.items():
        head, _, key = path.partition(".")
        if head != "emit":
            passes[path] = value
        elif key == "format":
            if value not in FORMATS:
                raise RecipeError(f"emit.format is {' or '.join(FORMATS)}, not {value!r}")
            emission[key] = value
        elif key not in EMISSION:
            raise RecipeError(f"the emission has no option {key!r}; it takes {', '.join(EMISSION)}")
        elif value not in (True, False, "true", "false"):
            raise RecipeError(f"emit.{key} is true or false, not {value!r}")
        else:
            emission[key] = value in (True, "true")
    return passes, emission


def refuse_emission(backend: Backend, emission: Mapping[str, Any]) -> None:
    """InputError for an option of the emission that artifacts of this kind do not have."""
    for key in emission:
        if key not in backend.emission:
            has = ", ".join(f"emit.{k}" for k in backend.emission)
            raise InputError(f"emit.{key} is not for {backend.suffix} artifacts; they take {has}")


def for_format(recipe: Recipe, emission: Mapping[str, Any]) -> Recipe:
    """``recipe`` for ``emit.format``: with ``qdq``, lower-qdq stands in the place of the passes that fuse and lower."""
    if emission.get("format", "fused") == "fused":
        return recipe
    at = next((i for i, p in enumerate(recipe.passes) if p.name in FUSING), len(recipe.passes))
    passes = [p for p in recipe.passes if p.name not in FUSING]
    passes.insert(at, recipes.make_pass("lower-qdq", {}))
    return Recipe(f"{recipe.name} (qdq)", tuple(passes), recipe.description)


def capture(job: Job, source: Any, args: Any = None, dynamic_shapes: Any = None) -> Captured:
    """The source as a graph; its time goes to the report."""
    begin = time.perf_counter()
    job.progress.stage("capture")
    captured = job.backend.capture(source, args, dynamic_shapes, job.progress)
    if job.emission.get("format") == "qdq":
        narrow = any(v.bits < 4 for p in job.recipe.passes for v in vars(p).values() if isinstance(v, Scheme))
        captured.graph = job.backend.raised(captured.graph, 25 if narrow else 21, "emit.format=qdq")
    job.timed("capture", begin)
    return captured


def run_recipe(job: Job, graph: Graph, passes: Sequence[Pass] | None = None) -> None:
    """Run the recipe (or ``passes``), each checked where the job says so.

    An internal failure, or a pass that breaks its promise, leaves a repro file, named by the PassFailed or CheckFailed.
    """
    last = debug.LastGood()
    hooks: list[Hook] = [*debug.hooks_from_environment(), last]
    if job.check:
        hooks.append(checker(job, graph))
    try:
        run(graph, job.recipe.passes if passes is None else passes, job.ctx, hooks)
    except (PassFailed, CheckFailed) as e:
        e.repro = debug.write_repro(e, last.text, debug.step_text(e.item))
        raise


def checker(job: Job, graph: Graph) -> CheckHook:
    """The hook behind ``--check``: on the first batches of the calibration data, else on made-up inputs."""
    backend, data = job.backend, None if job.calibrator is None else job.calibrator.data
    job.progress.stage("check: samples")
    if data is not None:
        given = list(itertools.islice(data.batches(graph.inputs), checking.SAMPLES + 1))
        complete, feeds = len(given) <= checking.SAMPLES, list[Feed](given[: checking.SAMPLES])
    else:
        complete, feeds = False, checking.running_feeds(backend.runner, graph, backend.made_up)
        job.notes.append("check: made-up inputs; give --calibration DATA to check on your own")
    return CheckHook(backend.runner, feeds, backend.kernel_error, complete, job.checks)


def stop(job: Job, error: CheckFailed) -> None:
    """A pass broke its promise: what it made goes nowhere, and no site is fused."""
    job.ctx.findings.append(error.finding)
    job.notes.append(f"check: what is needed to see it again is in {error.repro}")
    for site in job.ctx.ledger:
        if site.status in ("pending", "fused"):
            site.status, site.kernel = "unfused", {}
            site.reason = f"the compilation stopped: {error.item.name} changed what the model computes"


def calibrate_with(job: Job, data: Data) -> None:
    """Let the passes of ``job`` measure activations on ``data``; what was measured before comes from the cache."""
    job.calibrator = Calibrator(
        data,
        job.backend.runner,
        cache=Cache.from_environment(),
        told=job.progress.advance,
        findings=job.ctx.findings,
    )
    job.ctx.calibration = job.calibrator


def settle(job: Job, graph: Graph | None = None) -> None:
    """Every site that is still pending was not fused: say so, with the reason its rule gave (law L2).

    ``graph``: the lowered graph, in which no ``q.*`` op may be left that no site accounts for.
    """
    reasons = {r.site: r.reason for r in job.ctx.refusals if r.site and r.rule.startswith("fuse_dequant")}
    for site in job.ctx.ledger:
        if site.status != "pending":
            continue
        reason = reasons.get(site.name)
        site.status = "unfused"
        site.reason = reason.message if reason else "no fused kernel was found for it"
        code, fix = (reason.code, reason.fix) if reason else ("", "")
        message = f"{site.op} {site.n}x{site.k} <{site.scheme}> is left unfused"
        job.ctx.findings.append(Finding(code or "QC101", site.name, message, site.reason, fix))
    if graph is not None and not any(f.severity == "error" for f in job.ctx.findings):
        for op in graph.walk():
            if op.name.startswith("q."):
                message = f"{op.name} is left, and no site accounts for it"
                job.ctx.findings.append(Finding("QC101", op.label, message, "no kernel of the target took it"))


def account(job: Job, graph: Graph) -> None:
    """Fill each site's stored bytes from the lowered graph; tied sites show the bytes they share."""
    stored = job.backend.stored(graph)
    for site in job.ctx.ledger:
        sizes = stored.get(site.name) or stored.get(site.tied_to or "")
        if sizes:
            site.bytes = dict(sizes)


def grade(job: Job) -> None:
    """Signal-to-noise of each quantized weight, from the sums noted when its codes were computed."""
    for site in job.ctx.ledger:
        signal, noise = site.stats.get("sum_sq"), site.stats.get("sum_sq_error")
        if signal is None or noise is None or site.status == "skipped":
            continue
        site.sqnr_db = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else None
        if site.stats.get("all_scales_equal") and site.bytes.get("scales", 0) > 64:
            message = f"all scales of {site.n}x{site.k} <{site.scheme}> are the same number"
            fix = "check that these are trained weights"
            job.ctx.findings.append(Finding("QC304", site.name, message, "", fix, severity="warning"))


def weigh(job: Job, result: EvidenceResult) -> None:
    """Let what the runtime did overrule what was planned: a site is fused only if every phase saw it fused.

    A site that a measured run does not show (the runtime dropped a dead branch, say) keeps static evidence, and a
    warning says so.
    """
    job.ctx.findings.extend(result.findings)
    job.notes.extend(result.notes)
    by_node: dict[str, list[Any]] = {}
    for node in result.nodes:
        by_node.setdefault(node.node, []).append(node)
    for site in job.ctx.ledger:
        if site.status != "fused":
            continue
        seen = [n for label in site.stats.get(FORETOLD, (site.name,)) for n in by_node.get(label, [])]
        if seen and result.kind == "measured":
            site.evidence = "measured"
        elif result.kind == "measured" and site.kernel:
            message = "the runtime ran the artifact, and no node of it stands for this site"
            fix = "see whether the runtime can reach the node; 'qcompiler inspect' shows the graph"
            job.ctx.findings.append(Finding("QC106", site.name, message, "", fix, severity="warning"))
        if site.stats.get(FORETOLD):
            site.kernel = {n.phase: n.kernel for n in seen if n.kernel and n.phase}
            if not seen:
                site.status, site.reason = "unfused", "no kernel is known that reads its codes"
        bad = [n for n in seen if n.verdict != "fused"]
        if bad:
            site.status = "unfused"
            site.reason = f"the runtime shows {bad[0].verdict} for {bad[0].op_type} in phase {bad[0].phase or 'any'}"


def peak_rss() -> int:
    """Peak resident bytes of this process so far, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(job: Job, captured: Captured) -> Report:
    """The report as things stand."""
    slow = slower_notes(job.ctx.ledger, job.target, job.phases)
    notes = (*job.notes, *job.ctx.notes, *slow, *checking.told(job.checks))
    return Report(
        target=str(job.target),
        source=Source(captured.kind, captured.path, captured.sha256),
        recipe=RecipeInfo(job.recipe.name, job.recipe.text, job.recipe.hash),
        findings=tuple(dict.fromkeys(job.ctx.findings)),
        sites=tuple(job.ctx.ledger),
        timing=Timing(
            capture_s=job.times.get("capture", 0.0),
            passes_s=dict(job.ctx.passes_s),
            emit_s=job.times.get("emit", 0.0),
            evidence_s=job.times.get("evidence", 0.0),
        ),
        peak_rss_bytes=peak_rss(),
        phases={p.name: p.m for p in job.phases},
        quality=job.quality,
        artifact=job.artifact,
        versions=job.backend.versions(),
        notes=notes,
        checks=tuple(job.checks),
    )


def metadata(job: Job, captured: Captured) -> dict[str, str]:
    """What travels inside the artifact: which recipe, which target, made from what."""
    out = {
        "qcompiler.version": qcompiler.__version__,
        "qcompiler.target": str(job.target),
        "qcompiler.recipe": job.recipe.text,
        "qcompiler.recipe_hash": job.recipe.hash,
    }
    rows = {job.target.row(name) for site in job.ctx.ledger for name in site.kernel.values()}
    if keys := sorted({pair for row in rows for pair in row.session}):
        out["qcompiler.session"] = ";".join(f"{k}={v}" for k, v in keys)
        job.notes.append(f"the runtime needs session keys for these kernels: {out['qcompiler.session']}")
    if allowed := {s.name: s.reason for s in job.ctx.ledger if s.reason and s.status in ("fused", "skipped")}:
        out["qcompiler.allowed"] = json.dumps(allowed, sort_keys=True)
    return out | ({"qcompiler.source_sha256": captured.sha256} if captured.sha256 else {})


def compile_to(job: Job, captured: Captured, out: Path, *, force: bool = False, data: Any = None) -> Report:
    """Write the artifact of a captured model at ``out`` and ``out.report.json`` beside it; all of it or nothing.

    Raises RejectedError, with the report written and the artifact not, when the verifier refuses. ``force`` writes the
    artifact all the same where there is one: a site that no kernel took cannot be written.
    """
    graph = captured.graph
    with Staged(out) as staged:
        kept = _run_checked(job, graph)
        if job.calibrator is not None:
            job.notes.append(job.calibrator.summary())
        settle(job, graph if kept else None)
        writable = kept and not any(op.name.startswith("q.") for op in graph.walk())
        if writable:
            staged.beside(".data")
            writable = _write(job, captured, staged.main, data)
        final = report(job, captured)
        if final.accepted or (force and writable):
            final.save(staged.beside(".report.json"))
            staged.commit()
        else:
            final = replace(final, artifact=None)
            final.save(out.with_name(f"{out.name}.report.json"))
    if not final.accepted:
        raise RejectedError(rejection(final), final)
    return final


def _run_checked(job: Job, graph: Graph) -> bool:
    """Run the recipe; False where a pass broke its promise, which is a rejection."""
    try:
        run_recipe(job, graph)
    except CheckFailed as e:
        stop(job, e)
        return False
    return True


def _write(job: Job, captured: Captured, path: Path, data: Any) -> bool:
    """Emit into the staging folder and collect evidence there; False when the weights cannot be quantized."""
    graph, backend = captured.graph, job.backend
    account(job, graph)
    backend.annotate(graph, metadata(job, captured))
    job.ctx.findings.extend(backend.judge(graph, job.target, job.phases))
    begin = time.perf_counter()
    job.progress.stage("quantize and write")
    try:
        written = backend.emit(graph, path, job.emission, job.progress)
    except BadWeights as e:
        refuse_weights(job, e)
        return False
    job.timed("emit", begin)
    grade(job)
    job.artifact = ArtifactInfo(path.name, written.bytes, written.files)
    begin = time.perf_counter()
    job.progress.stage("evidence from the runtime")
    weigh(job, backend.evidence(path, job.target, job.phases, list(job.ctx.ledger)))
    job.timed("evidence", begin)
    _compare(job, captured, path, data)
    return True


def refuse_weights(job: Job, error: BadWeights) -> None:
    """A weight that holds NaN or infinity: its sites are unfused, the others were never reached."""
    bad = [s for s in job.ctx.ledger if s.status == "fused" and s.stats.get("bad")]
    for site in bad:
        site.status, site.reason = "unfused", str(error)
    fix = "repair the checkpoint, or leave the site in float with --skip"
    for name in [s.name for s in bad] or ["?"]:
        job.ctx.findings.append(Finding("QC301", name, str(error), "", fix))


def _compare(job: Job, captured: Captured, path: Path, data: Any) -> None:
    floats = sum(s.before for s in job.ctx.ledger)
    if floats > COMPARE_LIMIT:
        job.notes.append(f"quality: not compared, {floats / 2**30:.1f} GiB of float weights are over the limit")
        return
    reference = captured.float_file()
    if reference is None:
        job.notes.append("quality: there is no float model in the runtime's form to compare with")
        return
    if data is None and job.calibrator is not None:
        data = job.calibrator.data
    job.progress.stage("float against compiled")
    found = job.backend.quality(reference, path, data)
    if isinstance(found, Finding):
        job.ctx.findings.append(found)
    elif isinstance(found, str):
        job.notes.append(f"quality: {found}")
    else:
        job.quality = found


def rejection(final: Report) -> str:
    """One sentence for a rejected report."""
    errors = [f for f in final.findings if f.severity == "error"]
    first = f": {errors[0]}" if errors else ""
    more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
    return f"rejected for {final.target}{first}{more}"
