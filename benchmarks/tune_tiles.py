"""Choose the tiles that ship in ``backends/triton/tables``: by proofs without a GPU, by the clock where there is one.

    python benchmarks/tune_tiles.py prove --proofs proofs.json [--sm 80 89 90 100] [--kernels wn.gemv.int4 ...]
    python benchmarks/tune_tiles.py choose --proofs proofs.json [--sm 90 ...]
    python benchmarks/tune_tiles.py measure [--kernels ...] [--n 4096 --k 4096] [--cache]

``prove`` compiles every candidate ahead of time (0.3 to 1.5 s each) and notes what it found; run it once under each
Triton that is to be served, with the same file. ``choose`` takes, for each size of problem, the candidate that is clean
in every Triton of the file (no spill, no serialized wgmma, shared memory within the limit, wide loads, tensor cores)
and that a small model of the chip expects to be fastest. The model: a tile's main loop costs its instructions at one a
clock and scheduler; blocks run in waves of what registers and shared memory let reside; bytes come at the chip's
bandwidth as far as enough of them are in flight, and through L2 once a block; products at the rate of the tensor
cores; a split of K adds its partial sums and a launch. It orders candidates; it does not predict times.

``measure`` needs a GPU: it times the candidates that the model likes best, weights rotated past L2, in a CUDA graph,
and writes the winner into the shipped table, or, with ``--cache``, for just that N and K into the user's cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler.backends.triton.architectures import architecture
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.layouts import fragment_shape, padded, scale_rows
from qcompiler.backends.triton.tiles import Entry, Table, Tile, cache_path, read_table, write_table

TABLES = Path(__file__).parents[1] / "backends" / "triton" / "tables"
GROUPS = {"int2": 64, "uint2": 64, "nf4": 64, "f4e2m1": 64, "mxfp4": 32, "nvfp4": 16, "int4": 128, "uint4": 128}
"""Groups that candidates are judged with; 8-bit forms have one scale a row."""
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096), (28672, 8192))
"""N, K of the entries of a table."""
ROWS = {"gemv": (1, 16), "gemm": (32, 64, 256, 4096), "a8": (16, 64, 256, 4096)}
CHIPS = {
    80: (1.41e9, 2.0e12, 4.0e12, 312e12),
    89: (2.5e9, 1.0e12, 4.0e12, 330e12),
    90: (1.98e9, 4.3e12, 5.5e12, 800e12),
    100: (1.9e9, 7e12, 10e12, 1800e12),
}
"""Clock (1/s), bytes/s of memory, of L2, bf16 FLOP/s of A100, L40S, H200, B200: data sheets and published
measurements; the memory and FLOP/s of the H200 as measured."""
IN_FLIGHT = 23 << 10
"""Bytes a multiprocessor must have asked for to draw full bandwidth: 4.3 TB/s times 0.7 us over 132."""
LAUNCH = 2e-6


# -- problems ------------------------------------------------------------------------------------------------------

Maker = Callable[[tuple[int, ...], torch.dtype], Any]


def kernels() -> list[str]:
    """Every kernel whose tiles this script chooses."""
    forms = [f"wn.{how}.{form}" for form in FORMS for how in ("gemv", "gemm")]
    return [*forms, "a8.gemm.int8", "a8.gemm.f8", "a8.gemm.w4"]


def problem(kernel: str, m: int, n: int, k: int, make: Maker) -> Callable[[Tile], Any]:
    """The launcher of ``kernel`` on tensors of ``make``, as a function of the tile."""
    from qcompiler.backends.triton import scaled, weight_only

    family, _, form = kernel.split(".")
    if family == "wn":
        group = GROUPS.get(form, 0)
        kind = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(form, torch.bfloat16)
        laid = (scale_rows(k, group), padded(n, 64))
        x, codes, scales = (
            make((m, k), torch.bfloat16),
            make(fragment_shape(n, k, form), torch.int32),
            make(laid, kind),
        )
        zeros = make(laid, torch.int16) if FORMS[form].kind == "integer" and FORMS[form].bits < 8 else None
        outer = make((1,), torch.float32) if form == "nvfp4" else None
        return lambda tile: weight_only.linear_cuda(
            x, codes, scales, zeros, outer, None, None, None, n, group, form, "none", tile
        )
    if form == "w4":
        codes, scales = (
            make(fragment_shape(n, k, "int4"), torch.int32),
            make((scale_rows(k, 128), padded(n, 64)), torch.bfloat16),
        )
        rest, kind = (n, 128, 0, "int4"), torch.int8
    else:
        kind = torch.int8 if form == "int8" else torch.float8_e4m3fn
        codes, scales = make((n, k), kind), make((n,), torch.float32)
        rest = (n, 0, 0, "int8" if form == "int8" else "f8e4m3")
    x, x_scale = make((m, k), kind), make((m, 1), torch.float32)
    return lambda tile: scaled.linear_cuda(
        x, x_scale, codes, scales, None, None, None, None, *rest, "none", torch.bfloat16, tile
    )


def candidates(kernel: str) -> Iterator[Tile]:
    """Every tile that is tried, unsplit: K is split where a shape has too few blocks."""
    family, how, _ = kernel.split(".")
    if family == "a8":
        for bm, bn, warps in (
            (16, 64, 4),
            (16, 128, 4),
            (32, 128, 4),
            (64, 64, 4),
            (64, 128, 4),
            (128, 128, 4),
            (128, 128, 8),
            (128, 256, 8),
        ):
            for stages in (2, 3, 4):
                yield Tile(bm, bn, 128, warps, stages)
    elif how == "gemv":
        for bn, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4)):
            for stages in (1, 2, 4):
                yield Tile(16, bn, 128, warps, stages)
    else:
        for bm, bn, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8), (256, 128, 8)):
            for stages in (2, 3, 4):
                yield Tile(bm, bn, 128, warps, stages)


def products_of(kernel: str) -> Any:
    return {"a8.gemm.int8": "i8", "a8.gemm.w4": "i8", "a8.gemm.f8": "f8"}.get(kernel, "f16")


# -- proofs --------------------------------------------------------------------------------------------------------


def prove_all(path: Path, chips: Sequence[int], names: Sequence[str]) -> None:
    """Add to ``path`` what this Triton makes of every candidate that the file does not have yet."""
    import triton

    from qcompiler.backends.triton.claims import Claim, fake, fake_mode
    from qcompiler.backends.triton.proving import prove_claim

    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for sm in chips:
        for kernel in names:
            if products_of(kernel) not in architecture(sm).matrix:
                continue
            for tile in candidates(kernel):
                key = " ".join([triton.__version__, str(sm), kernel, json.dumps(asdict(tile))])
                if key in found:
                    continue
                with fake_mode():
                    run = problem(kernel, tile.bm, 4096, 4096, fake)
                claim = Claim(
                    f"torch-cuda/{kernel}",
                    str(tile),
                    lambda run=run, tile=tile: run(tile),
                    products_of(kernel),
                    wide=frozenset({"codes_ptr"}),
                    loop_weights=tile.bn * tile.bk,
                )
                proof = prove_claim(claim, sm)
                best = proof.kernels[0] if proof.kernels else None
                found[key] = {"faults": list(proof.faults), "figures": None if best is None else asdict(best)}
            path.write_text(json.dumps(found))
            print(f"triton {triton.__version__} sm_{sm} {kernel}", flush=True)


@dataclass(frozen=True)
class Proven:
    """A clean tile with the worst figures of all Tritons."""

    tile: Tile
    registers: int
    shared: int
    loop: int
    per_weight: float


@functools.cache
def records_of(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


def proven(path: Path, sm: int, kernel: str) -> list[Proven]:
    """The tiles of ``kernel`` that every Triton in the file found clean."""
    seen: dict[Tile, list[dict[str, Any]]] = {}
    versions = set()
    for key, record in records_of(path).items():
        version, chip, name, tile = key.split(" ", 3)
        versions.add(version)
        if (int(chip), name) == (sm, kernel):
            seen.setdefault(Tile(**json.loads(tile)), []).append(record)
    out = []
    for tile, records in seen.items():
        if len(records) == len(versions) and not any(r["faults"] or r["figures"] is None for r in records):
            worst = {w: max(r["figures"][w] for r in records) for w in ("registers", "shared", "loop", "per_weight")}
            out.append(Proven(tile, **worst))
    return out


# -- the model -----------------------------------------------------------------------------------------------------


def split_of(tile: Tile, m: int, n: int, k: int, resident: int, processors: int) -> int:
    """Blocks along K, a power of two: as many as the chip can hold at once, each of four k-tiles at least."""
    blocks = -(-m // tile.bm) * -(-n // tile.bn)
    most = max(1, k // tile.bk // 4)
    wanted = max(1, resident * processors // blocks)
    return 1 << int(math.log2(max(1, min(most, wanted, 16))))


def expected(p: Proven, kernel: str, sm: int, m: int, n: int, k: int) -> tuple[float, Tile]:
    """Seconds that the model gives the candidate, and its tile with the split that was taken."""
    clock, bandwidth, cache, rate = CHIPS[sm]
    chip, tile = architecture(sm), p.tile
    rate *= 2 if kernel.startswith("a8") else 1
    threads = 32 * tile.warps
    resident = min(65536 // max(p.registers * threads, 1), chip.shared // max(p.shared, 1), 2048 // threads, 32)
    resident = max(1, resident)
    split = split_of(tile, m, n, k, resident, chip.processors) if m <= 64 else 1
    blocks = -(-m // tile.bm) * -(-n // tile.bn) * split
    waves = math.ceil(blocks / (chip.processors * resident))
    turns = math.ceil(k / tile.bk / split)
    issued = waves * resident * turns * p.loop * tile.warps / 4 / clock
    bits = 4.25 if kernel.endswith("w4") else 8 if kernel.startswith("a8") else FORMS[kernel.rpartition(".")[2]].bits
    weights = n * k * bits / 8
    held = resident * min(tile.stages, max(turns, 1)) * tile.bn * tile.bk * bits / 8
    moved = weights / bandwidth / min(1.0, held / IN_FLIGHT) * waves * chip.processors * resident / blocks
    height = -(-m // tile.bm) * tile.bm
    multiplied = 2 * height * n * k / rate * waves * chip.processors * resident / blocks
    read = blocks * (tile.bm * 2 + tile.bn * bits / 8) * (k / split) / cache
    extra = 0.0 if split == 1 else LAUNCH + 8 * split * m * n / bandwidth
    fields = asdict(tile) | {"split": split}
    return max(issued, moved, read, multiplied) + extra, Tile(**fields)


def ranked(path: Path, sm: int, kernel: str, m: int, n: int, k: int) -> list[tuple[float, Tile]]:
    """Expected seconds and tile of every clean candidate, best first."""
    fits = [p for p in proven(path, sm, kernel) if p.tile.bm <= max(16, 2 * m)]
    return sorted(expected(p, kernel, sm, m, n, k) for p in fits)


def choose_all(path: Path, chips: Sequence[int], names: Sequence[str]) -> None:
    """Write the model's choices into the shipped tables; entries of other kernels stay."""
    about = "benchmarks/tune_tiles.py choose: clean ahead of time in every Triton, ranked by its model; not timed"
    for sm in chips:
        table = table_of(sm)
        for kernel in names:
            rows = ROWS["a8" if kernel.startswith("a8") else kernel.split(".")[1]]
            entries = []
            for m in rows:
                for n, k in SHAPES:
                    best = ranked(path, sm, kernel, m, n, k)
                    if best:
                        entries.append(Entry(m, n, k, best[0][1]))
            if entries:
                table[kernel] = tuple(entries)
            print(f"sm_{sm} {kernel}: {len(entries)} entries", flush=True)
        (TABLES / f"sm_{sm}.json").write_text(write_table(table, about))


def table_of(sm: int) -> Table:
    path = TABLES / f"sm_{sm}.json"
    return read_table(path.read_text()) if path.is_file() else {}


# -- the clock -----------------------------------------------------------------------------------------------------


def random_tensor(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    """Random contents of any type on the GPU: floats near 0, codes over their whole range."""
    if kind == torch.int32:
        return torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).to(kind)
    if kind in (torch.int8, torch.uint8):
        low = -127 if kind == torch.int8 else 0
        return torch.randint(low, 128, shape, device="cuda", dtype=torch.int64).to(kind)
    return (torch.randn(shape, device="cuda") * 0.02).to(kind)


def measure_all(args: argparse.Namespace) -> None:
    """Time candidates and write the winners; N, K, and M from the arguments or as the tables have them."""
    from gpu_timing import copies_needed, interleaved, region

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    sm = major * 10 + minor
    shapes = [(args.n, args.k)] if args.n and args.k else SHAPES
    table = table_of(sm)
    cache = cache_path(sm) if args.cache else None
    if cache is not None:
        table = read_table(cache.read_text()) if cache.is_file() else {}
    for kernel in args.kernels:
        entries = {(e.m, e.n, e.k): e for e in table.get(kernel, ())}
        for m in ROWS["a8" if kernel.startswith("a8") else kernel.split(".")[1]]:
            for n, k in shapes:
                regions = {}
                tiles = [t for _, t in ranked(args.proofs, sm, kernel, m, n, k)][: args.top]
                count = copies_needed(n * k // 2, device)
                sets = [problem(kernel, m, n, k, random_tensor) for _ in range(count)]
                for tile in dict.fromkeys([*tiles, *variants_of(tiles)]):
                    regions[str(tile)] = region([lambda s=s, t=tile: s(t) for s in sets], device)
                times = interleaved(regions, args.rounds, device)
                medians = {name: statistics.median(t) for name, t in times.items()}
                best = min(medians, key=lambda name: medians[name])
                chosen = next(t for t in [*tiles, *variants_of(tiles)] if str(t) == best)
                entries[m, n, k] = Entry(m, n, k, chosen)
                print(f"sm_{sm} {kernel} M={m} {n}x{k}: {medians[best] * 1e6:.1f} us {chosen}", flush=True)
        table[kernel] = tuple(entries.values())
    about = f"benchmarks/tune_tiles.py measure on {torch.cuda.get_device_name(device)}"
    path = cache or TABLES / f"sm_{sm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_table(table, about))
    print(f"wrote {path}")


def variants_of(tiles: Sequence[Tile]) -> list[Tile]:
    """The same tiles with half and twice the split."""
    out = []
    for tile in tiles:
        for split in {max(1, tile.split // 2), min(32, tile.split * 2)}:
            out.append(Tile(**(asdict(tile) | {"split": split})))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prove", "choose", "measure"))
    parser.add_argument("--proofs", type=Path, default=Path("tile-proofs.json"))
    parser.add_argument("--sm", nargs="+", type=int, default=list(CHIPS))
    parser.add_argument("--kernels", nargs="+", default=kernels())
    parser.add_argument("--n", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--top", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cache", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.kernels) - set(kernels()):
        raise SystemExit(f"no kernel is called {', '.join(sorted(unknown))}; known: {', '.join(kernels())}")
    if args.what == "prove":
        prove_all(args.proofs, args.sm, args.kernels)
    elif args.what == "choose":
        choose_all(args.proofs, args.sm, args.kernels)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
