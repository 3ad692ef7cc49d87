"""SmoothQuant against planted outliers: perplexity of W8A8 with and without smoothing.

    python benchmarks/smoothquant.py [--models pystdlib stories260K] [--factors 10 50 100] [--samples 32] [--held 64]

Outliers are planted by an exactly equivalent rescale (``tests/planting.py``): three channels of every norm's output and
of every gated product are multiplied by the factor, the weights that read them divided by it. Every artifact is
calibrated on the same samples and judged on the same held-out windows of 256 tokens. The results go to
``benchmarks/results/smoothquant.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort
from circumstances import circumstances

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qcompiler import api, recipe
from qcompiler.backends.torch.to_onnx import export_onnx
from tests.planting import plant
from tests.realmodels import RealModel, decoder_sample, model

RESULTS = Path(__file__).parent / "results" / "smoothquant"
RECIPES = {
    "w8a8": recipe.load("w8a8"),
    "smooth, alpha 0.5": recipe.adjusted(recipe.load("w8a8-smooth"), {"smoothquant.alpha": 0.5}),
    "smooth, search": recipe.load("w8a8-smooth"),
}


def perplexity(path: Path, judged: RealModel, feeds: list[Any]) -> float:
    """Per-token perplexity of the file on ``feeds``."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [session.run(None, feed) for feed in feeds]
    return 1 / judged.metric(found, found, feeds)


def measure(name: str, factors: list[int], samples: int, held: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each factor (1: nothing planted) and recipe."""
    judged = model(name)
    calibration, feeds = judged.calibration(samples), judged.held(held)
    rows = []
    for factor in [1, *factors]:
        sample = decoder_sample(name)
        if factor != 1:
            plant(sample.module, factor)
        source = export_onnx(sample.module, sample.args, sample.dynamic_shapes, folder / f"{name}-{factor}.onnx")
        rows.append(
            {"model": name, "factor": factor, "recipe": "float", "perplexity": perplexity(source, judged, feeds)}
        )
        for label, steps in RECIPES.items():
            out = folder / f"{name}-{factor}-{label.replace(' ', '')}.onnx"
            begin = time.perf_counter()
            report = api.compile(source, recipe=steps, calibration=calibration, out=out).report
            rows.append(
                {
                    "model": name,
                    "factor": factor,
                    "recipe": label,
                    "perplexity": perplexity(out, judged, feeds),
                    "verdict": "accepted" if report.accepted else "rejected",
                    "compile_s": round(time.perf_counter() - begin, 2),
                    "smoothquant_s": round(report.timing.passes_s.get("smoothquant", 0.0), 2),
                    "notes": [n for n in report.notes if n.startswith("smoothquant")],
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model and factor, perplexities, and the ratio to unmodified W8A8."""
    columns = ["float", *RECIPES]
    lines = [
        "| model | planted factor | " + " | ".join(columns) + " | search / unmodified w8a8 |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    found = {(r["model"], r["factor"], r["recipe"]): r["perplexity"] for r in rows}
    for name, factor in dict.fromkeys((r["model"], r["factor"]) for r in rows):
        values = [found[name, factor, c] for c in columns]
        ratio = values[-1] / found[name, 1, "w8a8"]
        planted = "none" if factor == 1 else f"{factor}x"
        lines.append(f"| {name} | {planted} | " + " | ".join(f"{v:.4f}" for v in values) + f" | {ratio:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pystdlib", "stories260K"])
    parser.add_argument("--factors", nargs="+", type=int, default=[10, 50, 100])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held", type=int, default=64)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            rows += measure(name, given.factors, given.samples, given.held, Path(folder))
    about = circumstances(
        "benchmarks/smoothquant.py", "numpy", "onnxruntime", "torch", samples=given.samples, held=given.held
    )
    RESULTS.with_suffix(".json").write_text(json.dumps(about | {"runs": rows}, indent=1) + "\n", encoding="utf-8")
    heading = f"Perplexity on {given.held} held-out windows of 256 tokens, {given.samples} calibration samples.\n\n"
    RESULTS.with_suffix(".md").write_text(
        f"# SmoothQuant and planted outliers\n\n{heading}{table(rows)}", encoding="utf-8"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
