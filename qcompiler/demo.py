"""``make demo``: a small trained language model to int4 and proved, then the runtime's own 8-bit model refused.

Everything it prints is measured in this run. Files go to ``out/demo`` (or the folder given as argument).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import api
from qcompiler.report.model import Report
from qcompiler.report.terminal import print_report

PROMPT = "def read_lines(path):\n    "
WINDOWS = 64
"""Held-out windows of 256 tokens that perplexity is taken over."""


def session(path: Path) -> Any:
    """The file in ONNX Runtime at its defaults."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_of(opened: Any) -> Callable[[Any], Any]:
    """Token ids int64 ``[B, S]`` -> logits ``[B, S, V]``."""
    name = opened.get_inputs()[0].name
    return lambda ids: opened.run(None, {name: np.ascontiguousarray(ids, np.int64)})[0]


def latencies(runs: dict[str, Callable[[], Any]], rounds: int = 21) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that the machine's drift falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def say(text: str = "") -> None:
    print(text, flush=True)


def float_model(folder: Path) -> Path:
    """The trained model as a float ONNX file."""
    from qcompiler.backends.torch.to_onnx import export_onnx
    from qcompiler.models import pystdlib

    module, args, shapes = pystdlib.example()
    return export_onnx(module, args, shapes, folder / "pystdlib.float.onnx")


def quality_and_speed(reference: Path, compiled: Path, folder_bytes: tuple[int, int]) -> None:
    """Bytes, perplexity on held-out modules and latency of both, and a few lines that the compiled one writes."""
    from qcompiler.models import pystdlib

    both = {"float32": logits_of(session(reference)), "int4": logits_of(session(compiled))}
    one = np.ones((1, 1), np.int64)
    many = np.ones((1, 256), np.int64)
    decode = latencies({name: lambda f=f: f(one) for name, f in both.items()})  # type: ignore[misc]
    prefill = latencies({name: lambda f=f: f(many) for name, f in both.items()}, 11)  # type: ignore[misc]
    say(f"{'':10}{'file bytes':>12}{'perplexity':>12}{'M=1 ms':>10}{'M=256 ms':>10}")
    for (name, f), size in zip(both.items(), folder_bytes, strict=True):
        perplexity = pystdlib.perplexity(f, limit=WINDOWS)
        say(f"{name:10}{size:>12,}{perplexity:>12.3f}{decode[name]:>10.2f}{prefill[name]:>10.2f}")
    bigram = np.exp(pystdlib.record()["nats_per_token"]["bigram"])
    say(f"(held-out modules of the standard library, {WINDOWS} windows; a bigram model has perplexity {bigram:.1f})")
    say()
    say("What the int4 model writes:")
    text = pystdlib.generate(both["int4"], PROMPT, max_tokens=80, temperature=0.7, top_k=20, seed=1)
    say("\n".join("    " + line for line in (PROMPT + text).splitlines()))


def refused(reference: Path, folder: Path) -> Report:
    """The runtime's own quantizer at its defaults for 8 bits, judged; then how slow what it wrote is."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    theirs = folder / "pystdlib.theirs8.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(reference), bits=8)
    quantizer.process()
    quantizer.model.save_model_to_file(str(theirs))
    report = api.verify(theirs, target="ort-cpu")
    print_report(report)
    ours = folder / "pystdlib.w8a16.onnx"
    api.compile(reference, target="ort-cpu", recipe="w8a16", out=ours)
    files = {"float32": reference, "their 8 bits": theirs, "w8a16": ours}
    opened = {name: logits_of(session(path)) for name, path in files.items()}
    one = np.ones((1, 1), np.int64)
    found = latencies({name: lambda f=f: f(one) for name, f in opened.items()})  # type: ignore[misc]
    say()
    say("Measured, one token: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()))
    ratio = found["their 8 bits"] / found["w8a16"]
    say(f"The refused model takes {ratio:.1f}x the time of the one that qcompiler compiles to 8 bits.")
    return report


def main() -> int:
    """Run the demo; 0 when the int4 model was accepted and the other one refused."""
    parser = argparse.ArgumentParser(description="int4 proved, an unfused 8-bit model refused")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/demo"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    say("1. Export the trained model, compile it with w4a16 for ort-cpu, and have the runtime show which kernels ran.")
    say()
    reference = float_model(folder)
    artifact = api.compile(reference, target="ort-cpu", recipe="w4a16", out=folder / "pystdlib.w4a16.onnx")
    print_report(artifact.report)
    say()
    say("2. Quality and speed, float against int4.")
    say()
    quality_and_speed(reference, artifact.path, (reference.stat().st_size, artifact.path.stat().st_size))
    say()
    say("3. Let ONNX Runtime's quantizer make an 8-bit model at its defaults, and ask qcompiler verify about it.")
    say()
    report = refused(reference, folder)
    return 0 if artifact.report.accepted and not report.accepted else 1


if __name__ == "__main__":
    raise SystemExit(main())
