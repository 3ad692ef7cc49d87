"""One graph of torch.compile on its way: recipe, verdict, packed weights, and what runs at each call."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qcompiler import driver
from qcompiler.backends.base import Captured
from qcompiler.backends.torch import jit_cache, jit_release, jit_reports
from qcompiler.backends.torch.jit_capture import CapturedGraph, capture_graph
from qcompiler.backends.torch.jit_inner import Runner, default_inner, inner_compile
from qcompiler.backends.torch.jit_lift import Lifted, examples_for, lift
from qcompiler.backends.torch.jit_names import Names
from qcompiler.backends.torch.jit_options import Options
from qcompiler.calibrate.data import open_data
from qcompiler.driver import Job
from qcompiler.errors import BadWeights, InputError, RecipeError, RejectedError
from qcompiler.payload import Payload
from qcompiler.report.model import Report

KIND = "torch.compile"


@dataclass
class Prepared:
    """A graph after the passes: the job that has its sites, and the module to run where it was not rejected."""

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

    def prepare(self, tensors: Mapping[int, torch.Tensor] | None = None) -> Prepared:
        """Run the recipe on the graph, with the parameters as they are now."""
        captured = capture_graph(self.module, self.names, tensors)
        source = Captured(captured.graph, KIND)
        job = driver.start(self.target, self.options.recipe, self.options.phases, None)
        job.ctx.partial = self._partial(captured)
        if self.options.calibration is not None:
            driver.calibrate_with(job, open_data(self.options.calibration))
        driver.run_recipe(job, captured.graph)
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
                        some = ", ".join(n.removesuffix(".weight") for n in everywhere[:6])
                        raise RecipeError(
                            f"QC402: {item.name}.{key} = {glob!r} matches no weight; there are {some}, ..."
                        )
        return True


# -- running -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CompiledGraph:
    """What AOTAutograd calls: one list of arguments in, the outputs out.

    Before each call it compares the parameters that were packed with those it is given: another tensor, or one that was
    written to in place, is packed anew.
    """

    order: Order
    lifted: Lifted
    runner: Runner
    constants: list[torch.Tensor] = field(default_factory=list)
    watched: list[tuple[int, weakref.ref[torch.Tensor], int | None]] = field(default_factory=list)
    after: Callable[[Sequence[Any]], None] | None = None
    _boxed_call = True

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        for place, packed, version in self.watched:
            now = args[place]
            if now is not packed() or (version is not None and now._version != version):  # type: ignore[union-attr]
                self._pack_again(args)
                break
        inputs = [args[place] for place in self.lifted.read]
        inputs += self.constants
        args.clear()
        out = self.runner(inputs)
        if self.after is not None:
            self.after(out)
        return out

    def reads(self, tensor: torch.Tensor) -> bool:
        """True when this graph needs the values of ``tensor`` at each call."""
        return any(ref() is tensor for ref in self.floats)

    floats: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def watch(self, weights: Mapping[Any, int]) -> None:
        """Remember the parameters ``weights`` (payloads by place) as they are now."""
        self.watched, self.floats = [], []
        for payload, place in weights.items():
            tensor = payload.tensor
            if place in self.lifted.read:
                self.floats.append(weakref.ref(tensor))
            elif jit_cache.is_released(tensor) or tensor.is_inference():
                self.watched.append((place, weakref.ref(tensor), None))
            else:
                self.watched.append((place, weakref.ref(tensor), payload.version))

    def _pack_again(self, args: Sequence[Any]) -> None:
        tensors = {i: a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
        with real_tensors(), jit_release.unveiled():
            prepared = self.order.prepare(tensors)
            if prepared.lifted is None or not prepared.report().accepted:
                final = prepared.report()
                raise RejectedError(driver.rejection(final), final)
            if prepared.lifted.module.code != self.lifted.module.code:
                raise InputError(
                    "a parameter was changed after torch.compile packed it, and its new values need another graph; "
                    "call torch.compiler.reset() before you go on"
                )
            self.lifted = prepared.lifted
            self.constants = [jit_cache.packed(p) for p in prepared.lifted.constants]
            self.watch(prepared.captured.weights)


_live: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


@contextmanager
def real_tensors() -> Iterator[None]:
    """Nothing inside is traced: tensors have values, no gradients, and a version."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        yield


# -- compiling -----------------------------------------------------------------------------------------------


def compile_graph(order: Order, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """The compiled form of ``order``, or of the graph as it was, where it was rejected and ``on_reject`` is float.

    ``examples`` are the fake arguments of the graph. Raises RejectedError with the report, or what a pass raises.
    """
    options = order.options
    with real_tensors():
        prepared = order.prepare()
        final = prepared.report()
    note = _inner(options)
    if note[1]:
        prepared.job.notes.append(note[1])
    if prepared.lifted is None or not final.accepted:
        return _rejected(order, final, examples, note[0])
    lifted = prepared.lifted
    runner = inner_compile(lifted.module, examples_for(lifted, examples), note[0])
    made = CompiledGraph(order, lifted, runner)
    with real_tensors():
        try:
            made.constants = _pack(prepared, lifted, options, made)
        except BadWeights as e:
            driver.refuse_weights(prepared.job, e)
            return _rejected(order, prepared.report(), examples, note[0])
        driver.grade(prepared.job)
        made.watch(prepared.captured.weights)
    _live.add(made)
    _deliver(options, prepared.report())
    return made


def compile_untouched(order: Order, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """The graph as it is, run by what is underneath."""
    runner = inner_compile(order.module, examples, _inner(order.options)[0])

    def run(args: list[Any]) -> Sequence[Any]:
        return runner(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _inner(options: Options) -> tuple[str, str]:
    return (options.inner, "") if options.inner is not None else default_inner()


def _deliver(options: Options, report: Report) -> None:
    jit_reports.keep(report)
    options.deliver(report)


def _rejected(order: Order, final: Report, examples: Sequence[Any], inner: str) -> Callable[[list[Any]], Sequence[Any]]:
    _deliver(order.options, final)
    if order.options.on_reject == "error":
        raise RejectedError(driver.rejection(final), final)
    sites = [s.name for s in final.sites if s.status == "unfused"] or [f.op for f in final.findings]
    _warn_once(tuple(sites), driver.rejection(final))
    return compile_untouched(order, examples)


_warned: set[tuple[str, ...]] = set()


def _warn_once(sites: tuple[str, ...], why: str) -> None:
    import warnings

    if sites not in _warned:
        _warned.add(sites)
        names = ", ".join(sites[:8]) + (f" and {len(sites) - 8} more" if len(sites) > 8 else "")
        warnings.warn(f"torch.compile: the graph runs in float, because of {names}: {why}", stacklevel=2)


def _pack(prepared: Prepared, lifted: Lifted, options: Options, made: CompiledGraph) -> list[torch.Tensor]:
    """The values of the constants, each weight's together; with ``release_weights`` it is freed right after."""
    sources = {id(p): {id(w): w for w in jit_cache.weights_behind(p)} for p in lifted.constants}
    left: dict[int, int] = {}
    for behind in sources.values():
        for w in behind:
            left[w] = left.get(w, 0) + 1
    freeable = _freeable(prepared, lifted, sources) if options.release_weights else set()
    out: dict[int, torch.Tensor] = {}
    for payload in sorted(lifted.constants, key=lambda p: _first(p, prepared.captured)):
        if id(payload) in out:
            continue
        out[id(payload)] = jit_cache.packed(payload)
        for key, weight in sources[id(payload)].items():
            left[key] -= 1
            if left[key] == 0:
                payload.release()
                if key in freeable:
                    jit_release.release(weight.tensor, weight.name)
    return [out[id(p)] for p in lifted.constants]


def _first(payload: Payload, captured: CapturedGraph) -> int:
    return min((captured.weights.get(w, 0) for w in jit_cache.weights_behind(payload)), default=-1)


def _freeable(prepared: Prepared, lifted: Lifted, sources: Mapping[int, Mapping[int, Any]]) -> set[int]:
    """The weights whose packed form is all that any graph needs; none when one of them cannot be packed."""
    packed = {key: w for behind in sources.values() for key, w in behind.items()}
    found: set[int] = set()
    for key, weight in packed.items():
        tensor = weight.tensor
        if jit_cache.is_released(tensor):
            continue
        if not all(torch.isfinite(v).item() for v in torch.aminmax(tensor.detach())):
            return set()
        read = prepared.captured.weights[weight] in lifted.read or any(g.reads(tensor) for g in _live)
        if not read and type(tensor) is nn.Parameter:
            found.add(key)
    return found
