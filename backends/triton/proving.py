"""Proofs without a GPU: every kernel that a launcher would launch is compiled ahead of time, and what came out is
judged.

The launcher runs on fake tensors (:mod:`claims`) under a driver that only names the architecture, so tiles, types,
alignment and specialisation are those of a real call. A proof fails when registers spill, when shared memory is over
the architecture's limit, when the tensor-core instructions claimed are absent, when the assembler serializes
``wgmma``, when a kernel stores to an argument that is not an output or stores elements of the weights that no product
has summed, or when weights are loaded fewer than 16 bytes at a time.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompiler.backends.triton.architectures import Architecture, architecture
from qcompiler.backends.triton.claims import Claim, fake_mode
from qcompiler.backends.triton.disassembly import SERIALIZED, Disassembly, assembler_log, disassemble
from qcompiler.backends.triton.launching import Launch, Recorder, recording
from qcompiler.backends.triton.tracing import Load, Store, argument_names, pointer_name, read_loads, read_stores
from qcompiler.errors import Error, InputError


@dataclass(frozen=True)
class KernelFigures:
    """One compiled kernel. ``shared`` bytes of a block, ``stack`` bytes of a thread, ``spills`` loads and stores of
    spilled registers, ``matrix`` tensor-core instructions in the code, ``narrowest`` bytes of the narrowest load of an
    argument that must be wide (0: it loads none), ``loop`` instructions of the main loop, ``per_weight`` of them per
    weight of a thread (0: not known), ``seconds`` it took to compile, or to find in triton's cache."""

    name: str
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: str
    matrix_count: int
    narrowest: int
    loop: int
    per_weight: float
    warps: int
    seconds: float


@dataclass(frozen=True)
class Proof:
    """Of one claim for one architecture; it holds where ``faults`` is empty."""

    row: str
    case: str
    sm: int
    kernels: tuple[KernelFigures, ...]
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Pointer:
    """Stands for a fake tensor where triton asks for its type and its alignment."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.dtype.itemsize

    def data_ptr(self) -> int:
        return self._offset


def _storage(tensor: torch.Tensor) -> int:
    """The same number for all views of one memory."""
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Notes what a launcher has torch compute, by the memory it reads and writes; views and allocations do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed: list[tuple[str, set[int]]] = []
        self.wide: dict[int, str] = {}
        self.kept: list[Any] = []  # a memory that was freed would give its number to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = {_storage(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.kept += [read, out]
        memory = {_storage(t) for t in read}
        if memory and made - memory and "empty" not in str(func):
            self.computed.append((str(func), memory | made))
        return out

    def launched(self, kernel: Any, args: tuple[Any, ...], wide: frozenset[str]) -> None:
        """Remember the memory of arguments that are loaded wide."""
        for name, given in zip(map(pointer_name, kernel.arg_names), args, strict=False):
            value = getattr(given, "base", given)  # of a tensor descriptor
            if name in wide and isinstance(value, torch.Tensor):
                self.wide[_storage(value)] = name

    def faults(self) -> Iterator[str]:
        for function, memory in self.computed:
            for number in memory & self.wide.keys():
                yield f"the launcher has torch compute {self.wide[number]}, or from it, by {function} at each call"


@contextlib.contextmanager
def _driven(target: Any) -> Iterator[None]:
    from triton.runtime import driver as config

    before = config._active
    config.set_active(_Driver(target))
    try:
        yield
    finally:
        config._active = before


def gpu_target(kind: str, arch: int | str) -> Any:
    """triton's name of an architecture: ``("cuda", 90)`` or ``("hip", "gfx942")``."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(kind, arch, 64 if kind == "hip" and str(arch).startswith("gfx9") else 32)


def compile_kernel(
    kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], options: dict[str, Any], target: Any
) -> Any:
    """What ``kernel[grid](*args, **options)`` would run on ``target``, compiled; tensors among ``args`` may be fake."""
    held = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
    options = {k: _Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    caches = kernel.device_caches
    kernel.device_caches = defaultdict(kernel.create_binder)
    try:
        with _driven(target), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*(TRITON_DEFAULT_FP_FUSION|data pointer of FakeTensor).*")
            return kernel.warmup(*held, grid=grid, **options)
    finally:
        kernel.device_caches = caches


def needs_triton() -> None:
    """Raise InputError where triton is absent, or runs as an interpreter."""
    try:
        import triton
    except ImportError as e:
        raise InputError(
            "proofs of the torch-cuda kernels compile them with triton, which is not installed; no GPU is needed:"
            " pip install 'triton>=3.6' (Linux)"
        ) from e
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it to prove kernels")


def _faults_of_code(name: str, code: Disassembly, shared: int, ptx: str, found: Architecture) -> Iterator[str]:
    if code.stack or code.spills:
        yield (
            f"{name} spills registers: {code.stack} bytes of stack a thread, {code.spills} spill loads and stores;"
            " take a smaller tile or more warps"
        )
    if shared > found.shared:
        yield (
            f"{name} asks for {shared} bytes of shared memory, over the {found.shared} of sm_{found.sm};"
            " take fewer stages or a smaller tile"
        )
    if any(i.startswith(("HGMMA", "IGMMA", "QGMMA")) for i in code.instructions):
        said = SERIALIZED.search(assembler_log(ptx, found.sm))
        if said is not None:
            yield f"{name} waits after each wgmma, the assembler serialized them: {said[0].strip()}"


def _faults_of_stores(name: str, claim: Claim, stores: tuple[Store, ...], unknown: tuple[str, ...]) -> Iterator[str]:
    for operation in sorted(set(unknown)):
        yield f"{name} writes by {operation}, which no rule here follows"
    for store in stores:
        wrong = sorted(store.targets - claim.outputs)
        if wrong or not store.targets:
            place = ", ".join(wrong) or "an address that comes from no argument"
            allowed = ", ".join(sorted(claim.outputs))
            yield f"{name} stores a tile {store.tile} to {place}; its outputs are {allowed}"
        raw = sorted(store.holds & claim.wide)
        if claim.products is not None and raw:
            yield (
                f"{name} stores a tile {store.tile} to {', '.join(sorted(store.targets))} that holds elements of"
                f" {', '.join(raw)} which no product has summed: dequantized weights go to global memory"
            )


def _faults_of_loads(name: str, claim: Claim, loads: tuple[Load, ...]) -> Iterator[str]:
    for argument in sorted(claim.wide):
        widths = [load.bytes for load in loads if argument in load.sources]
        if widths and min(widths) < claim.load_bytes:
            yield f"{name} loads {argument} by {min(widths)} bytes a thread, not {claim.load_bytes}"


def _figures(launch: Launch, claim: Claim, code: Disassembly, loads: tuple[Load, ...], seconds: float) -> KernelFigures:
    metadata = launch.compiled.metadata
    widths = [load.bytes for load in loads if load.sources & claim.wide]
    kinds: defaultdict[str, int] = defaultdict(int)
    for instruction in code.matrix:
        kinds[instruction.partition(".")[0]] += 1
    turn = claim.loop_weights * code.unrolled
    main = bool(code.matrix) or claim.products is None
    return KernelFigures(
        name=str(metadata.name),
        registers=code.registers,
        shared=int(metadata.shared),
        stack=code.stack,
        spills=code.spills,
        matrix="+".join(sorted(kinds)),
        matrix_count=sum(kinds.values()),
        narrowest=min(widths, default=0),
        loop=len(code.loop),
        per_weight=len(code.loop) * 32 * int(metadata.num_warps) / turn if turn and main else 0.0,
        warps=int(metadata.num_warps),
        seconds=seconds,
    )


@functools.lru_cache(maxsize=256)
def _read(
    cubin: bytes, ptx: str, ttir: str, llir: str
) -> tuple[Disassembly, tuple[Store, ...], tuple[str, ...], tuple[Load, ...]]:
    """What a kernel's code says of it; claims that differ in shape alone often share a kernel."""
    stores, unknown = read_stores(ttir)
    return disassemble(cubin, ptx), stores, unknown, read_loads(llir, argument_names(ttir))


def judge(claim: Claim, sm: int, launches: Iterable[tuple[Launch, float]], faults: list[str]) -> Proof:
    """Judge what a claim's launcher compiled; ``launches`` come with the seconds that compiling took, ``faults`` are
    those of the launcher itself."""
    found = architecture(sm)
    kernels: list[KernelFigures] = []
    read: set[str] = set()
    for launch, seconds in launches:
        asm, name = launch.compiled.asm, str(launch.compiled.metadata.name)
        code, stores, unknown, loads = _read(asm["cubin"], asm["ptx"], asm["ttir"], asm["llir"])
        kernels.append(_figures(launch, claim, code, loads, seconds))
        read |= {argument for load in loads for argument in load.sources}
        faults += _faults_of_code(name, code, int(launch.compiled.metadata.shared), asm["ptx"], found)
        faults += _faults_of_stores(name, claim, stores, unknown)
        faults += _faults_of_loads(name, claim, loads)
    faults += _faults_of_the_whole(claim, found, kernels, read)
    return Proof(claim.row, claim.case, sm, tuple(kernels), tuple(dict.fromkeys(faults)))


def _faults_of_the_whole(
    claim: Claim, found: Architecture, kernels: list[KernelFigures], read: set[str]
) -> Iterator[str]:
    if not kernels:
        yield "the launcher launched no kernel"
        return
    for argument in sorted(claim.wide - read):
        yield f"no kernel loads {argument}, which the claim says is loaded wide"
    if claim.products is not None:
        wanted = found.matrix.get(claim.products, ())
        held = {word for k in kernels for word in k.matrix.split("+")}
        if not held & set(wanted):
            names = ", ".join(k.name for k in kernels)
            has = ", ".join(sorted(filter(None, held))) or "none"
            need = " or ".join(wanted) or f"of a unit for {claim.products} that sm_{found.sm} does not have"
            yield f"{names}: products run outside the tensor cores: no instruction {need} in the code (found: {has})"


def prove_claim(claim: Claim, sm: int) -> Proof:
    """Compile and judge one claim. What does not compile is a fault of the proof, not an error."""
    target = gpu_target("cuda", sm)
    seconds: list[float] = []
    watch = _Watch()

    def compile_it(kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], options: dict[str, Any]) -> Any:
        start = time.perf_counter()
        compiled = compile_kernel(kernel, args, grid, options, target)
        seconds.append(time.perf_counter() - start)
        watch.launched(kernel, args, claim.wide)
        return compiled

    recorder = Recorder(sm, compile_it)
    try:
        with recording(recorder), fake_mode(), watch:
            claim.run()
    except Error as e:
        return Proof(claim.row, claim.case, sm, (), (str(e),))
    except Exception as e:  # triton raises errors of its own and of MLIR, without a common class
        said = " ".join(str(e).split())[:300]
        return Proof(claim.row, claim.case, sm, (), (f"does not compile for sm_{sm}: {type(e).__name__}: {said}",))
    return judge(claim, sm, zip(recorder.launches, seconds, strict=True), list(watch.faults()))


def prove(claims: Iterable[Claim], sm: int) -> list[Proof]:
    """Prove the claims that hold from ``sm`` on, in order; raises InputError where triton is absent."""
    needs_triton()
    return [prove_claim(claim, sm) for claim in claims if claim.least_sm <= sm]
