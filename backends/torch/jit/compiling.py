"""One graph of torch.compile on its way: recipe, verdict, packed weights."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from qcompiler import driver
from qcompiler.backends.base import Captured
from qcompiler.backends.torch.generated import inductor_expands
from qcompiler.backends.torch.jit import cache, releasing, reports
from qcompiler.backends.torch.jit.calibration import SizingBackend, data_of
from qcompiler.backends.torch.jit.capture import CapturedGraph, arguments_of, capture_graph
from qcompiler.backends.torch.jit.inner import Runner, default_inner, inner_compile
from qcompiler.backends.torch.jit.lifting import Lifted, examples_for, lift
from qcompiler.backends.torch.jit.names import Names
from qcompiler.backends.torch.jit.options import Options
from qcompiler.driver import Job
from qcompiler.errors import BadWeights, RecipeError, RejectedError
from qcompiler.memory import give_back
from qcompiler.payload import Payload
from qcompiler.report.model import Report
from qcompiler.verify.findings import Finding

KIND = "torch.compile"


@dataclass
class Prepared:
    """A graph after the passes: the job that has its sites, and the module to run where every site has a kernel."""

    job: Job
    source: Captured
    captured: CapturedGraph
    lifted: Lifted | None

    def report(self) -> Report:
        return driver.report(self.job, self.source)


@dataclass
class Order:
    """What is to be compiled: AOT's graph, the names of dynamo's placeholders, the options."""

    module: fx.GraphModule
    names: Names
    options: Options
    target: str

    def prepare(self) -> Prepared:
        """Run the recipe on the graph, with the parameters as they are now."""
        captured = capture_graph(self.module, self.names)
        source = Captured(captured.graph, KIND)
        job = driver.start(self.target, self.options.recipe, self.options.phases, None)
        job.ctx.partial = self._partial(captured)
        if self.options.calibration is not None:
            job.backend = SizingBackend()
            driver.calibrate_with(job, data_of(self.options.calibration))
        try:
            driver.run_recipe(job, captured.graph)
        except BadWeights as e:
            driver.refuse_weights(job, e)
        driver.settle(job, captured.graph)
        if any(op.name.startswith("q.") for op in captured.graph.walk()):
            return Prepared(job, source, captured, None)
        driver.account(job, captured.graph)
        job.backend.annotate(captured.graph, driver.metadata(job, source))
        job.ctx.findings.extend(job.backend.judge(captured.graph, job.target, job.phases))
        return Prepared(job, source, captured, lift(captured))

    def _partial(self, captured: CapturedGraph) -> bool:
        """Whether the model has weights that this graph does not read; then globs are held against all its names."""
        module = self.names.module
        if module is None:
            return False
        here = {p.name for p in captured.weights}
        everywhere = [n for n, p in module.named_parameters() if p.ndim > 1]
        if all(n in here for n in everywhere):
            return False
        sites = [n.removesuffix(".weight") for n, _ in module.named_parameters(remove_duplicate=False)]
        for item in self.options.recipe.passes:
            for key in ("match", "skip"):
                for glob in getattr(item, key, ()):
                    if not fnmatch.filter(sites, glob):
                        has = ", ".join(n.removesuffix(".weight") for n in everywhere[:6])
                        raise RecipeError(f"QC402: {item.name}.{key} = {glob!r} matched nothing; sites are: {has}, ...")
        return True

    def rebound(self, args: Sequence[Any]) -> Order:
        """The same graph for the parameters in ``args``: another module that runs the same code."""
        sources = enumerate(arguments_of(self.module))
        tensors = {s: args[place] for place, s in sources if s is not None and s in self.names.held}
        return replace(self, names=self.names.rebound(tensors))

    def inner(self) -> tuple[str, str]:
        """What runs the graph, and a remark."""
        return (self.options.inner, "") if self.options.inner is not None else default_inner()


@dataclass(eq=False)
class Variant:
    """A graph for one set of weights. ``key`` says what the runner was compiled for, the values of weights apart.

    ``watched`` are the parameters that decide: place, the tensor as it was, its version where its values were packed.
    ``floats`` are the parameters whose values it reads at each call.
    """

    read: tuple[int, ...]
    runner: Runner
    key: str
    constants: list[torch.Tensor] = field(default_factory=list)
    watched: list[tuple[int, weakref.ref[torch.Tensor], int | None]] = field(default_factory=list)
    floats: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def fits(self, args: Sequence[Any]) -> bool:
        """True when the parameters are those that were packed, and nobody has written to them since."""
        for place, packed, version in self.watched:
            now = args[place]
            if now is not packed() or (version is not None and now._version != version):  # type: ignore[union-attr]
                return False
        return True

    def alive(self) -> bool:
        """False when a parameter of it is gone."""
        return all(ref() is not None for _, ref, _ in self.watched)

    def watch(self, captured: CapturedGraph) -> None:
        """Remember the parameters of ``captured`` as they are now."""
        for payload, place in captured.weights.items():
            tensor, ref = payload.tensor, weakref.ref(payload.tensor)
            if place in self.read:
                self.floats.append(ref)
            if len(payload.shape) < 2 and place in self.read:
                continue
            held = place in self.read or cache.is_released(tensor) or tensor.is_inference()
            self.watched.append((place, ref, None if held else payload.version))


_live: weakref.WeakSet[Variant] = weakref.WeakSet()
"""Variants that may be called again: what they read in float is not freed."""


@contextmanager
def real_tensors() -> Iterator[None]:
    """Nothing inside is traced: tensors have values, no gradients, and a version."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        yield


def make_variant(order: Order, examples: Sequence[Any], known: Mapping[str, Runner]) -> Variant:
    """The compiled form of ``order``; of the graph as it was where it is rejected and ``on_reject`` is float.

    ``examples`` are the fake arguments of the graph, ``known`` what was compiled for other weights. Raises
    RejectedError with the report, or what a pass raises.
    """
    with real_tensors():
        prepared = order.prepare()
        final = prepared.report()
    inner, remark = order.inner()
    if remark:
        prepared.job.notes.append(remark)
    if prepared.lifted is None or not final.accepted:
        return _rejected(order, prepared, final, examples)
    lifted = prepared.lifted
    key = _key(lifted)
    runner = known.get(key) or inner_compile(lifted.module, examples_for(lifted, examples), inner, order.module)
    if _refuse_expanded(prepared.job, runner):
        return _rejected(order, prepared, prepared.report(), examples)
    made = Variant(lifted.read, runner, key)
    with real_tensors():
        try:
            made.constants = _pack(prepared, lifted, order.options)
        except BadWeights as e:
            driver.refuse_weights(prepared.job, e)
            return _rejected(order, prepared, prepared.report(), examples)
        driver.grade(prepared.job)
        made.watch(prepared.captured)
    _live.add(made)
    _deliver(order.options, prepared.report())
    return made


def _refuse_expanded(job: Job, runner: Runner) -> bool:
    """True when the code that inductor generated holds a weight in floats; the sites that it may be are unfused."""
    sites = [s for s in job.ctx.ledger if s.status == "fused" and s.op == "linear"]
    found = inductor_expands(runner.source, [(s.n, s.k) for s in sites])
    for expanded in found:
        message = f"inductor's code fills {expanded.buffer} {list(expanded.shape)} in {expanded.dtype} from codes"
        reason = f"line {expanded.line}; it holds the expanded weight on each call"
        fix = "give the option inner='eager'"
        for site in [s for s in sites if not expanded.weight or (s.n, s.k) == expanded.weight]:
            site.status, site.reason = "unfused", message
            job.ctx.findings.append(Finding("QC104", site.name, message, reason, fix))
    return bool(found)


def _key(lifted: Lifted) -> str:
    constants = [f"{p.dtype}{list(p.shape)}" for p in lifted.constants]
    return f"{lifted.module.code}\n{lifted.read}\n{constants}"


def compile_untouched(order: Order, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """The graph as it is, run by what is underneath."""
    runner = inner_compile(order.module, examples, order.inner()[0], order.module)

    def run(args: list[Any]) -> Sequence[Any]:
        return runner(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _deliver(options: Options, report: Report) -> None:
    reports.keep(report)
    options.deliver(report)


def _rejected(order: Order, prepared: Prepared, final: Report, examples: Sequence[Any]) -> Variant:
    _deliver(order.options, final)
    if order.options.on_reject == "error":
        raise RejectedError(driver.rejection(final), final)
    sites = [s.name for s in final.sites if s.status == "unfused"] or [f.op for f in final.findings]
    _warn_once(tuple(sites), driver.rejection(final))
    runner = inner_compile(order.module, examples, order.inner()[0], order.module)
    made = Variant(tuple(range(len(examples))), runner, "as it was")
    with real_tensors():
        made.watch(prepared.captured)
    _live.add(made)
    return made


_warned: set[tuple[str, ...]] = set()


def _warn_once(sites: tuple[str, ...], why: str) -> None:
    if sites not in _warned:
        _warned.add(sites)
        names = ", ".join(sites[:8]) + (f" and {len(sites) - 8} more" if len(sites) > 8 else "")
        warnings.warn(f"torch.compile: the graph runs in float because of {names}: {why}", stacklevel=2)


# -- packing -------------------------------------------------------------------------------------------------


def _pack(prepared: Prepared, lifted: Lifted, options: Options) -> list[torch.Tensor]:
    """The values of the constants, each weight's together; with ``release_weights`` it is freed right after."""
    sources = {id(p): {id(w): w for w in cache.weights_behind(p)} for p in lifted.constants}
    left: dict[int, int] = {}
    for behind in sources.values():
        for w in behind:
            left[w] = left.get(w, 0) + 1
    freeable = _freeable(prepared, lifted, sources) if options.release_weights else set()
    out: dict[int, torch.Tensor] = {}
    for payload in sorted(lifted.constants, key=lambda p: _first(p, prepared.captured)):
        if id(payload) in out:
            continue
        out[id(payload)] = cache.packed(payload)
        for key, weight in sources[id(payload)].items():
            left[key] -= 1
            if left[key] == 0:
                payload.release()
                if key in freeable:
                    releasing.release(weight.tensor, weight.name)
    if freeable:
        give_back()
    device = next((w.tensor.device for w in prepared.captured.weights), None)
    return [out[id(p)] if device is None else out[id(p)].to(device) for p in lifted.constants]


def _first(payload: Payload, captured: CapturedGraph) -> int:
    return min((captured.weights.get(w, 0) for w in cache.weights_behind(payload)), default=-1)


def _freeable(prepared: Prepared, lifted: Lifted, sources: Mapping[int, Mapping[int, Any]]) -> set[int]:
    """The weights whose packed form is all that any graph needs; none when one of them cannot be packed."""
    found: set[int] = set()
    for key, weight in {k: w for behind in sources.values() for k, w in behind.items()}.items():
        tensor = weight.tensor
        if cache.is_released(tensor):
            continue
        if not all(torch.isfinite(v).item() for v in torch.aminmax(tensor.detach())):
            return set()
        read = prepared.captured.weights[weight] in lifted.read
        read = read or any(ref() is tensor for variant in _live for ref in variant.floats)
        if not read and type(tensor) is nn.Parameter:
            found.add(key)
    return found
