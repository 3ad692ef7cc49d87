"""Resident memory of a 1B llama in fp32 after torch.compile with ``release_weights``, against what has to be there.

    python benchmarks/torch_memory.py [--recipe w4a16] [--inner inductor] [--layers 22] [--tiny] [--dry]

Everything happens in subprocesses. One builds the model in fp32, compiles it, runs the prompt and one token, lets go of
what is free, and reads its resident memory. What has to be there: the packed weights (their bytes as they are stored,
counted over the tensors that live), activations (the largest layer's result for the prompt, in f32, the logits and the
key/value cache) and the interpreter. The interpreter is measured in a process of its own, twice: with torch imported,
and with the compiler used once on a model of one small layer (dynamo, inductor and what they import). Both ratios are
stored; the peak is that of making the float model, which is there before it is compiled.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from circumstances import circumstances
from torch_llama import TINY, Size, build, linear_weights, status

RESULTS = Path(__file__).parent / "results" / "torch_memory.json"
TARGET = 1.15
"""The most that resident memory may be of what has to be there."""


def child(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the process ``kind`` (imported, compiled, model) found out."""
    import torch
    from torch_variants import released

    import qcompiler  # noqa: F401  # part of the interpreter of whoever compiles with it

    if kind == "imported":
        return {"resident_bytes": status("VmRSS")}
    torch.set_num_threads(given["threads"])
    size = Size(**given["size"])
    options = {"recipe": given["recipe"], "release_weights": True} | given["inner"]
    if kind == "compiled":
        size = replace(TINY, layers=1)
    model = build(size, torch.float32)
    floats = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    built = status("VmRSS")
    call = torch.compile(model, dynamic=False, backend="qcompiler", options=options)
    ids = torch.randint(0, size.vocab, (1, size.cache), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        call(ids[:, : size.prompt], torch.arange(size.prompt))
        call(ids[:, size.prompt : size.prompt + 1], torch.tensor([size.prompt]))
    del model
    gc.collect()
    released()
    found = {"resident_bytes": status("VmRSS"), "peak_bytes": status("VmHWM"), "after_build_bytes": built}
    return found | {"float_bytes": floats, "tensor_bytes": tensors_alive()}


def tensors_alive() -> int:
    """Bytes of all storages that the collector can reach: packed weights, caches, tables, what else is kept."""
    import torch

    seen: dict[int, int] = {}
    for value in gc.get_objects():
        try:
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        except Exception:  # proxies and freed parameters answer anything with an error of their own
            continue
    return sum(seen.values())


def run(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """:func:`child` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{kind}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def packed_bytes(size: Size, recipe: str) -> int:
    """Bytes of the weights as the kernels of ``recipe`` store them, by arithmetic: int4 codes with a bf16 scale and
    offset for 128 of them, int8 codes with an f32 scale a row; the table in int8."""
    weights = linear_weights(size)
    bits = 4 + 32 / 128 if recipe.startswith("w4") else 8
    return int(weights * bits / 8) + size.vocab * size.hidden + 4 * size.vocab


def activation_bytes(size: Size) -> int:
    """The gated layer's two inputs and result for the whole prompt, the logits, and the cache, in f32."""
    head = size.hidden // size.heads
    cache = 2 * size.layers * size.kv_heads * size.cache * head
    return 4 * (3 * size.prompt * size.intermediate + size.vocab + cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--inner", choices=("inductor", "eager"), help="what runs under our graph; by itself otherwise")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], json.loads(args.child[1]))))
        return
    size = TINY if args.tiny else Size()
    size = replace(size, layers=args.layers) if args.layers else size
    inner = {"inner": args.inner} if args.inner else {}
    given = {"size": asdict(size), "recipe": args.recipe, "threads": args.threads, "inner": inner}
    found = {kind: run(kind, given) for kind in ("imported", "compiled", "model")}
    must = packed_bytes(size, args.recipe) + activation_bytes(size)
    resident = found["model"]["resident_bytes"]
    ratios = {kind: resident / (must + found[kind]["resident_bytes"]) for kind in ("imported", "compiled")}
    about = circumstances("benchmarks/torch_memory.py", "torch", "numpy", recipe=args.recipe, inner=args.inner)
    result = about | {
        "size": asdict(size),
        "packed_bytes": packed_bytes(size, args.recipe),
        "activation_bytes": activation_bytes(size),
        "measured": found,
        "ratio": {k: round(v, 4) for k, v in ratios.items()},
        "target": TARGET,
    }
    mib = {
        "packed": packed_bytes(size, args.recipe),
        "activations": activation_bytes(size),
        "interpreter, torch imported": found["imported"]["resident_bytes"],
        "interpreter, compiler used": found["compiled"]["resident_bytes"],
        "float model": found["model"]["float_bytes"],
        "resident after compile and run": resident,
        "of that, tensors": found["model"]["tensor_bytes"],
        "peak": found["model"]["peak_bytes"],
    }
    for name, value in mib.items():
        print(f"{name}: {value / 2**20:.1f} MiB")
    for kind, ratio in ratios.items():
        print(f"ratio over packed + activations + interpreter ({kind}): {ratio:.3f} (target under {TARGET})")
    if not args.dry and not args.tiny:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
