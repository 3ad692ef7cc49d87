"""Everything that is measured on an NVIDIA GPU, by one command: correctness, linear layers, whole decoders.

    python benchmarks/gpu.py [--part check layers decoder] [--models Llama-3-8B ...] [--rows 1 16 ...]
                             [--variants "w4a16 g128" ...] [--rounds 20] [--merge] [--seconds 540]

First every kernel of ours is compared with its reference on the CPU, from fresh random inputs; a wrong one is
listed and not timed. Then the layers: each variant owns so many copies of its weights that none is found in L2, one
CUDA graph calls them all, the variants take turns in random order, and a ratio is the median over rounds of the ratio
within a round. Then decoders of random weights under torch.compile, a step a CUDA graph. Ceilings (copy, read, cuBLAS
bf16, an empty launch) are measured in the same run. gemlite and bitsandbytes take part where they are installed.

Results go to ``benchmarks/results/gpu.json``, ``gpu.md`` and ``gpu.png`` (where matplotlib is installed). ``--seconds``
stops before a time limit with what there is; ``--merge`` adds to what an earlier run wrote. ``--tiny`` runs the whole
script in a minute on small sizes, on a CPU too, where the operators' references run: that shows the script, no speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gpu_decoder
import gpu_layers
import torch
from circumstances import circumstances
from gpu_tables import markdown, plot
from gpu_timing import ceilings
from gpu_variants import variants

import qcompiler  # noqa: F401  # registers the operators

RESULTS = Path(__file__).parent / "results" / "gpu"
PARTS = ("check", "layers", "decoder")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", help="models whose layers are timed; all by default")
    parser.add_argument("--rows", nargs="+", type=int, default=list(gpu_layers.ROWS), help="M")
    parser.add_argument("--variants", nargs="+", help="names; all by default, the bases always")
    parser.add_argument("--sizes", nargs="+", default=["1B", "8B"], choices=list(gpu_decoder.SIZES))
    parser.add_argument("--recipes", nargs="+", default=list(gpu_decoder.RECIPES))
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after about so many; 0: never")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


class Deadline:
    """What is left of ``--seconds``."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit if limit else float("inf")

    def passed(self) -> bool:
        return time.monotonic() > self.end


def about_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "CPU (the operators' references; no speed is to be read from this)"}
    p = torch.cuda.get_device_properties(device)
    return {"name": p.name, "sm": f"{p.major}{p.minor}", "processors": p.multi_processor_count, "bytes": p.total_memory}


def run_layers(args: argparse.Namespace, found: dict[str, Any], chosen: list[str], deadline: Deadline) -> None:
    device = torch.device(args.device)
    layers = gpu_layers.TINY_LAYERS if args.tiny else gpu_layers.LAYERS
    wrong = {r["variant"] for r in found.get("check", []) if not r["ok"]}
    done = {(r["model"], r["layer"], r["m"], r["variant"]) for r in found["layers"]}
    for layer in layers:
        if args.models and layer.model not in args.models:
            continue
        for m in args.rows:
            names = [n for n in chosen if n not in wrong and (layer.model, layer.name, m, n) not in done]
            if deadline.passed() or not any(variants()[n].ours for n in names):
                continue
            records = gpu_layers.measure(layer, m, names, args.rounds, device, found["ceilings"])
            found["layers"] += records
            best = {r["variant"]: round(r["faster"], 2) for r in records if "faster" in r}
            print(f"{layer.model} {layer.name} {layer.n}x{layer.k} M={m}: {best}", flush=True)


def run_decoders(args: argparse.Namespace, found: dict[str, Any], deadline: Deadline) -> None:
    device = torch.device(args.device)
    names = ["tiny"] if args.tiny else args.sizes
    prompts = (16,) if args.tiny else gpu_decoder.PROMPTS
    for name in names:
        for batch in gpu_decoder.BATCHES:
            if deadline.passed():
                return
            recipes = list(dict.fromkeys(["float", *args.recipes]))
            inner = "eager" if args.tiny else args.inner
            records = gpu_decoder.measure(gpu_decoder.SIZES[name], batch, recipes, prompts, device, inner, args.rounds)
            found["decoder"] += records
            for r in records:
                told = r.get("failed") or f"{r['decode']['tokens_per_s']:.1f} tokens/s"
                print(f"{name} batch {batch} {r['recipe']}: {told}", flush=True)


def main() -> None:
    args = arguments()
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    torch.manual_seed(0)
    if args.tiny:
        args.rows, args.rounds = [1, 17], 2
    every = variants()
    unknown = set(args.variants or ()) - set(every)
    if unknown:
        raise SystemExit(f"no variant is called {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    chosen = [n for n, v in every.items() if not args.variants or n in args.variants or "cublas" in n]
    path = args.out.with_suffix(".json")
    found: dict[str, Any] = {"check": [], "layers": [], "decoder": []}
    if args.merge and path.is_file():
        found |= {k: v for k, v in json.loads(path.read_text()).items() if k in found}
    found |= circumstances("benchmarks/gpu.py", "torch") | {"device": about_device(device)}
    try:
        import triton

        found["versions"]["triton"] = triton.__version__
    except ModuleNotFoundError:
        found["versions"]["triton"] = "none"
    found["ceilings"] = ceilings(device, small=args.tiny)
    print({k: f"{v:.3g}" for k, v in found["ceilings"].items()}, flush=True)
    if "check" in args.part:
        found["check"] = gpu_layers.check_all([every[n] for n in chosen], device, sorted({*args.rows, 3, 17}))
        bad = [r for r in found["check"] if not r["ok"]]
        print(f"{len(found['check'])} checks, {len(bad)} wrong", *bad, sep="\n", flush=True)
    if "layers" in args.part:
        run_layers(args, found, chosen, deadline)
    if "decoder" in args.part:
        run_decoders(args, found, deadline)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(found))
    plot(found, args.out.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
