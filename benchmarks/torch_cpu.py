"""Torch on this processor: linear layers, and decoding and prefill of a 1B llama, ours against float and torchao.

    python benchmarks/torch_cpu.py [--part linear model] [--rounds 9] [--only "w4a16 of fp32"] [--tiny] [--dry]

Linear layers: each variant owns enough copies of its layer (over 200 MB of weights) that none stays in the caches; one
call runs all of them, each on input of its own. Model: each variant lives in a process of its own, and its peak memory
with it; as many as fit into memory are resident at a time, beside the floats that others are held to. In both parts
the variants take turns in random order, round by round; a ratio is the median over rounds of the ratio within a round.
What the processor can do at best (bytes read and multiply-adds a second) is measured first.
Weights are random, so the quality column says how far the arithmetic is from fp32's, not how well a model speaks.
torchao takes part where it is installed. The results go to ``benchmarks/results/torch_cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances
from torch import Tensor, nn
from torch_llama import TINY, Size, job, linear_weights
from torch_tables import markdown
from torch_variants import BASES, Variant, released, variants

RESULTS = Path(__file__).parent / "results" / "torch_cpu"
SHAPES = ((2048, 8192), (4096, 4096))
"""K, N."""
ROWS = (1, 4, 16, 128, 512)
ROTATED = 200 << 20
FEW = 4
"""Layers that are run from 128 rows on: inputs and results are in the caches' way as much as weights are."""
STEPS = 8
"""Tokens of one turn of decoding."""
SPARE = 3 << 30
"""Memory that is left to others."""
OVERHEAD = 600 << 20
"""Of a process with torch, dynamo and inductor loaded."""

Rounds = dict[str, list[float]]


# -- what the processor can do ---------------------------------------------------------------------------------


def limits(tiny: bool) -> dict[str, float]:
    """Bytes a second that all threads read together from memory, and multiply-adds a second in a large product."""
    big = torch.ones((8 if tiny else 1024) << 18)
    size = 256 if tiny else 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    c, d = a.bfloat16(), b.bfloat16()
    reading = best(lambda: big.sum(), 7)
    out = {"read_bytes_per_s": big.nbytes / reading}
    for name, x, y in (("f32", a, b), ("bf16", c, d)):
        out[f"{name}_multiply_adds_per_s"] = size**3 / best(lambda x=x, y=y: x @ y, 5)  # type: ignore[misc]
    return out


def best(call: Callable[[], Any], count: int) -> float:
    """Seconds of the quickest of ``count`` calls."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# -- linear layers ---------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Layers of one shape, each applied to an input of its own."""

    def __init__(self, weights: Sequence[Tensor], count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(count):
            n, k = weights[0].shape
            layer = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = nn.Parameter(weights[i % len(weights)].to(dtype, copy=True), requires_grad=False)
            self.layers.append(layer)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=False)]


def stack_class() -> type[Stack]:
    """A class whose forward is code of its own: dynamo counts the compilations of a code object, and stops at some."""
    known = Stack.forward
    copied = types.FunctionType(known.__code__.replace(), known.__globals__, known.__name__)
    return type("Stack", (Stack,), {"forward": copied})


class Linear:
    """One variant of a stack."""

    def __init__(self, variant: Variant, weights: Sequence[Tensor], rotated: float) -> None:
        n, k = weights[0].shape
        self.variant, self.k = variant, k
        self.count = max(2, -(-int(rotated) // int(variant.weight_bytes(n * k))))
        self.call = variant.made(stack_class()(weights, self.count, variant.dtype).eval())
        released()

    def inputs(self, m: int, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        count = self.count if m < 128 else min(FEW, self.count)
        return [torch.randn(m, self.k, generator=generator).to(self.variant.dtype) for _ in range(count)]

    def timed(self, xs: list[Tensor], untimed: int = 1, count: int = 2) -> float:
        """Seconds of one layer: the median of ``count`` calls."""
        found = []
        for i in range(-untimed, count):
            begin = time.perf_counter()
            self.call(xs)
            if i >= 0:
                found.append((time.perf_counter() - begin) / len(xs))
        return statistics.median(found)


def linear_part(
    shown: list[Variant], rounds: int, tiny: bool, shapes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """A record for every shape, number of rows and variant."""
    out = []
    for k, n in ((64, 128),) if tiny else shapes:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, k, generator=generator) / k**0.5 for _ in range(4)]
        stacks: dict[str, Linear] = {}
        failed: dict[str, str] = {}
        for m in (1, 4) if tiny else ROWS:
            feeds: dict[str, list[Tensor]] = {}
            quality: dict[str, float] = {}
            for v in (v for v in shown if v.name not in failed):
                told(f"linear {k}x{n}, M={m}: {v.name}")
                try:
                    if v.name not in stacks:
                        stacks[v.name] = Linear(v, weights, 1 << 16 if tiny else ROTATED)
                    feeds[v.name] = stacks[v.name].inputs(m)
                    with torch.no_grad(), v.patched():
                        first = stacks[v.name].call(feeds[v.name])[0]
                    quality[v.name] = sqnr(feeds[v.name][0].float() @ weights[0].T, first.float())
                except Exception as e:  # whatever a variant cannot do is a line of the table
                    failed[v.name] = f"{type(e).__name__}: {e}"[:300]
            seconds: Rounds = {name: [] for name in feeds}
            order = random.Random(m)
            with torch.no_grad():
                for _ in range(rounds):
                    for name in order.sample(sorted(feeds), len(feeds)):
                        seconds[name].append(stacks[name].timed(feeds[name]))
            for v in shown:
                record = {"k": k, "n": n, "m": m, "variant": v.name, "kernel": v.kernel}
                if v.name in failed:
                    out.append(record | {"failed": failed[v.name]})
                else:
                    took = v.weight_bytes(n * k)
                    record |= figures(seconds, v.name) | {"sqnr_db": round(quality[v.name], 1)}
                    out.append(record | {"weight_bytes": took, "bytes_per_s": took / record["s"]})
        del stacks
        released()
    return out


def sqnr(want: Tensor, got: Tensor) -> float:
    """Decibels; 200 where there is no error."""
    noise = float((want - got).double().square().sum())
    return 200.0 if noise == 0 else float(10 * torch.log10(want.double().square().sum() / noise))


def figures(seconds: Rounds, name: str) -> dict[str, Any]:
    """Median, rounds, and how many times as fast as each base, round by round."""
    own = seconds[name]
    faster = {
        base: statistics.median(a / b for a, b in zip(seconds[base], own, strict=True))
        for base in BASES
        if seconds.get(base)
    }
    return {"s": statistics.median(own), "rounds_s": [round(s, 8) for s in own], "faster": faster}


# -- the model -------------------------------------------------------------------------------------------------


class Process:
    """One variant of the model in a process of its own, ready when this is made."""

    def __init__(self, variant: Variant, size: Size, threads: int, logits: Path) -> None:
        script = str(Path(__file__).with_name("torch_llama.py"))
        command = [sys.executable, script, variant.name, job(size, threads, str(logits))]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        found = self._answer()
        self.variant, self.failed = variant, str(found.get("failed", ""))
        self.told: dict[str, Any] = found.get("ready", {})
        self.logits = None if self.failed else torch.load(logits)

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return {"failed": f"the process ended with {self.child.wait()}: {said[-1][:200] if said else ''}"}

    def ask(self, line: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self.log.close()


def model_part(shown: list[Variant], size: Size, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A record for every variant: decoding, prefill, memory. The bases stay open and are timed beside all others."""
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as kept:
        bases = opened([v for v in shown if v.name in BASES], size, threads, Path(scratch), kept, out)
        waiting = groups([v for v in shown if v.name not in BASES], size)
        for group in waiting or [[]]:
            with ExitStack() as stack:
                racing = bases + opened(group, size, threads, Path(scratch), stack, out)
                for record in race(racing, size, rounds):
                    out.setdefault(record["variant"], record)
    return [out[v.name] for v in shown]


def opened(
    group: list[Variant], size: Size, threads: int, folder: Path, stack: ExitStack, out: dict[str, dict[str, Any]]
) -> list[Process]:
    """Processes of the variants, opened one after the other; one that fails leaves a record in ``out``."""
    found = []
    for v in group:
        told(f"model: {v.name}")
        process = Process(v, size, threads, folder / f"{v.name}.pt")
        stack.callback(process.close)
        if process.failed:
            out[v.name] = {"variant": v.name, "kernel": v.kernel, "failed": process.failed}
        else:
            found.append(process)
    return found


def race(racing: list[Process], size: Size, rounds: int) -> list[dict[str, Any]]:
    """Turns of every process, in random order; a record each."""
    decode: Rounds = {p.variant.name: [] for p in racing}
    prefill: Rounds = {p.variant.name: [] for p in racing}
    order = random.Random(0)
    for number in range(rounds):
        told(f"model: round {number + 1} of {rounds}")
        for process in order.sample(racing, len(racing)):
            decode[process.variant.name].append(statistics.median(process.ask(f"decode {STEPS}")["seconds"]))
            prefill[process.variant.name].append(process.ask("prefill")["seconds"][0])
    want = next((p.logits for p in racing if p.variant.name == BASES[0]), None)
    out = []
    for process in racing:
        name, took = process.variant.name, process.variant.weight_bytes(linear_weights(size))
        record: dict[str, Any] = {"variant": name, "kernel": process.variant.kernel, "weight_bytes": took}
        record |= process.told | process.ask("memory")
        record["sqnr_db"] = None if want is None else round(sqnr(want, process.logits), 1)
        record["decode"], record["prefill"] = figures(decode, name), figures(prefill, name)
        record["bytes_per_s"] = took / record["decode"]["s"]
        out.append(record)
    return out


def groups(rest: list[Variant], size: Size) -> list[list[Variant]]:
    """The variants in groups that fit into memory together, beside the float model that the last one is built of."""
    weights = linear_weights(size) + size.vocab * size.hidden
    left = available() - SPARE - 4 * weights
    out: list[list[Variant]] = []
    used = 0.0
    for v in rest:
        need = OVERHEAD + (2 if v.frozen else 1) * v.weight_bytes(weights)
        if not out or used + need > left:
            out.append([])
            used = 0.0
        out[-1].append(v)
        used += need
    return out


def available() -> int:
    """Bytes that the system could give to programs."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


# -- all of it -------------------------------------------------------------------------------------------------


def told(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def processor() -> dict[str, Any]:
    """The chip's name, and which of the instructions that matter it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "avx_vnni")
    flags = facts.get("flags", "").split()
    return {"model": facts.get("model name", "?"), "has": [f for f in wanted if f in flags]}


def merge(found: dict[str, Any], old: dict[str, Any]) -> None:
    """Put the parts of ``old`` that were not run into ``found``, with the command and commit that made them."""
    for part, more in {"linear": [], "model": ["size"]}.items():
        if part in old and part not in found:
            found |= {key: old[key] for key in (part, *more)}
            found["kept"] = {"part": part} | {key: old[key] for key in ("command", "commit", "limits")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--part", nargs="*", choices=("linear", "model"), default=["linear", "model"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", help="names of variants; the bases always take part")
    parser.add_argument("--layers", type=int, help="of the llama; 22 by default, which makes 1.12e9 weights")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes of linear layers")
    parser.add_argument("--merge", action="store_true", help="keep the part of the stored results that is not run")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shown = [v for v in variants() if not args.only or v.name in args.only or v.name in BASES]
    size = TINY if args.tiny else Size()
    size = replace(size, layers=args.layers) if args.layers else size
    packages = ["torch", "numpy", *(["torchao"] if importlib.util.find_spec("torchao") else [])]
    about = circumstances("benchmarks/torch_cpu.py", *packages, threads=args.threads, rounds=args.rounds)
    found: dict[str, Any] = about | {"chip": processor(), "limits": limits(args.tiny)}
    if "linear" in args.part:
        found["linear"] = linear_part(shown, args.rounds, args.tiny, SHAPES[: args.shapes])
    if "model" in args.part:
        found["size"] = vars(size) | {"linear_weights": linear_weights(size)}
        found["model"] = model_part(shown, size, args.rounds, args.threads)
    if args.merge:
        merge(found, json.loads(RESULTS.with_suffix(".json").read_text("utf-8")))
    text = markdown(found)
    print(text)
    if not args.dry and not args.tiny:
        RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
