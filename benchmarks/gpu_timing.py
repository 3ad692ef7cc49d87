"""Timing on a GPU: CUDA graphs over rotated buffers, interleaved rounds, and the ceilings of the chip.

On a CPU the same code runs with the wall clock, without graphs: that is for trying the script out, not for numbers.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
L2_TIMES = 4
"""Rotated weights take so many times the bytes of the L2 cache, so that no call finds its weights there."""
COPIES = 64
"""At most so many copies of a layer are rotated."""


@dataclass
class Region:
    """``calls`` made one after another by :attr:`run`, timed as a whole; ``kept`` is what a graph writes to."""

    run: Call
    calls: int
    kept: Sequence[Any] = ()


def l2_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU; 64 MiB where it is not told."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def copies_needed(layer_bytes: int, device: torch.device) -> int:
    """Copies of a layer that together leave the L2 cache behind; two on a CPU, where nothing is measured."""
    if device.type != "cuda":
        return 2
    return max(2, min(COPIES, -(-L2_TIMES * l2_bytes(device) // max(layer_bytes, 1))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def region(calls: Sequence[Call], device: torch.device) -> Region:
    """``calls`` as one CUDA graph, warmed up before (compilation, handles); on a CPU just in order."""
    for call in calls:
        call()
    synchronize(device)
    if device.type != "cuda":
        return Region(lambda: [call() for call in calls], len(calls))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return Region(graph.replay, len(calls), kept)


def seconds(one: Region, device: torch.device) -> float:
    """Seconds of one call: the region is run once, between two events."""
    if device.type != "cuda":
        begin = time.perf_counter()
        one.run()
        return (time.perf_counter() - begin) / one.calls
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    one.run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / one.calls


def interleaved(
    regions: Mapping[str, Region], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds a call for each name and round; within a round the order is drawn anew."""
    order, found = list(regions), {name: [] for name in regions}
    draw = random.Random(seed)
    for name in order:
        seconds(regions[name], device)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            found[name].append(seconds(regions[name], device))
    return found


def ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast ``other`` is as ``base``: the median of the ratios within the rounds."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def spread(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The quartiles of the same ratios."""
    found = sorted(b / o for b, o in zip(base, other, strict=True))
    return found[len(found) // 4], found[-1 - len(found) // 4]


def ceilings(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """What the chip does at best: bytes/s of a copy (read and written) and of a read, multiply-add rates of cuBLAS.

    The read is a sum over 1 GiB. An empty launch, inside a graph of 100, is the least that any kernel takes.
    """
    size = (1 << 22) if small else (1 << 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    rounds = 3 if small else 10

    def best(calls: Sequence[Call]) -> float:
        one = region(calls, device)
        return statistics.median(seconds(one, device) for _ in range(rounds))

    copy = best([lambda: target.copy_(source)] * 4)
    read = best([source.sum] * 4)
    n = 256 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = best([lambda: a @ b] * 4)
    one = torch.zeros(1, device=device)
    empty = best([lambda: one.add_(1)] * 100)
    return {
        "copy_bytes_per_s": 2 * size / copy,
        "read_bytes_per_s": size / read,
        "bf16_flop_per_s": 2 * n**3 / product,
        "empty_launch_s": empty,
    }
