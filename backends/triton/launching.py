"""The one door through which kernels are launched: on a GPU, in Triton's interpreter, or recorded for a proof.

A proof runs the very launchers that a GPU would, on tensors without memory: while :func:`recording` is in force,
:func:`launch` compiles the kernel for the architecture asked for and notes it, and nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompiler.backends.triton.architectures import architecture


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: the ``triton.jit`` function, what compiling it gave, grid and options."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    options: dict[str, Any]


@dataclass
class Recorder:
    """What is compiled while it is in force, for compute capability ``sm``."""

    sm: int
    compile: Callable[[Any, tuple[Any, ...], tuple[int, ...], dict[str, Any]], Any]
    launches: list[Launch] = field(default_factory=list)


_RECORDER: ContextVar[Recorder | None] = ContextVar("qcompiler_triton_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Have every launch inside compiled by ``recorder.compile(kernel, args, grid, options)`` and not run."""
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``; ``options`` are constexpr arguments, ``num_warps``, ``num_stages`` ...

    Tensors among ``args`` lie on one device, which becomes the current one for the launch.
    """
    sizes = tuple(int(g) for g in grid)
    recorder = _RECORDER.get()
    if recorder is not None:
        compiled = recorder.compile(kernel, args, sizes, options)
        recorder.launches.append(Launch(kernel, compiled, sizes, dict(options)))
        return
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            kernel[sizes](*args, **options)
    else:  # the interpreter
        kernel[sizes](*args, **options)


def sm_of(device: torch.device) -> int:
    """The compute capability to choose tiles for: of the proof, of the GPU, 90 in the interpreter."""
    recorder = _RECORDER.get()
    if recorder is not None:
        return recorder.sm
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    return 90


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors, likewise."""
    if _RECORDER.get() is None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return architecture(sm_of(device)).processors
