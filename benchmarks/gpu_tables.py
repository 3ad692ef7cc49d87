"""The markdown and the plot of ``gpu.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_variants import BASE

Records = list[dict[str, Any]]


def markdown(found: dict[str, Any]) -> str:
    """The whole file."""
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    c = found["ceilings"]
    lines = [
        "# Triton kernels on a GPU",
        "",
        f"`{found['command']}`, commit {found['commit']}; {found['device']['name']}; {versions}",
        "",
        f"Measured ceilings: copy {c['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), read "
        f"{c['read_bytes_per_s'] / 1e12:.2f} TB/s, cuBLAS bf16 {c['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s, an empty "
        f"launch in a graph {c['empty_launch_s'] * 1e6:.2f} us.",
        "",
    ]
    if found["check"]:
        lines += checks(found["check"])
    if found["layers"]:
        lines += layers(found["layers"])
    if found["decoder"]:
        lines += decoders(found["decoder"])
    return "\n".join([*lines, ""])


def checks(records: Records) -> list[str]:
    wrong = [r for r in records if not r["ok"]]
    worst = max((r["off"] for r in records if r["ok"]), default=0.0)
    out = ["## Correctness", "", f"{len(records)} comparisons with the operators' references, {len(wrong)} wrong; "]
    out[-1] += f"largest relative error of the right ones {worst:.1e}."
    out += [f"- {r['variant']} M={r['m']} {r['n']}x{r['k']}: {r.get('said') or r.get('off')}" for r in wrong]
    return [*out, ""]


def _order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def layers(records: Records) -> list[str]:
    out = ["## Linear layers", ""]
    out += ["Microseconds (times as fast as cuBLAS bf16 in the same rounds). Last columns: share of the measured copy"]
    out += ["bandwidth at the least M, share of the measured cuBLAS rate at the largest.", ""]
    for model, name in _order((r["model"], r["layer"]) for r in records):
        own = [r for r in records if (r["model"], r["layer"]) == (model, name)]
        rows = sorted({r["m"] for r in own})
        out += [f"### {model} {name}: N={own[0]['n']}, K={own[0]['k']}", ""]
        out += ["| variant | " + " | ".join(f"M={m}" for m in rows) + " | bandwidth | rate |"]
        out += ["|---|" + "---|" * (len(rows) + 2)]
        for variant in _order(r["variant"] for r in own):
            cells = {r["m"]: r for r in own if r["variant"] == variant}
            timed = [cells[m] for m in rows if "s" in cells.get(m, {})]
            if not timed:
                continue
            shares = f"{timed[0]['bandwidth_share']:.0%} | {timed[-1]['rate_share']:.0%}"
            out.append(f"| {variant} | {' | '.join(_cell(cells.get(m, {})) for m in rows)} | {shares} |")
        out.append("")
    failed = _order(f"- {r['variant']}: {r['failed']}" for r in records if "failed" in r)
    skipped = _order(f"- {r['variant']}: {r['skipped']}" for r in records if "installed" in r.get("skipped", ""))
    return [*out, *(["Not run:", "", *failed, *skipped, ""] if failed or skipped else [])]


def _cell(r: dict[str, Any]) -> str:
    if "s" not in r:
        return "failed" if "failed" in r else "-"
    times = f" ({r['faster']:.2f})" if "faster" in r else ""
    return f"{r['s'] * 1e6:.1f}{times}"


def decoders(records: Records) -> list[str]:
    out = ["## Decoders", "", "Tokens a second (times as many as float bf16 under inductor, same rounds).", ""]
    whats = _order(k for r in records for k in r if k == "decode" or k.startswith("prefill"))
    out += [f"| size | batch | recipe | {' | '.join(whats)} | resident GB | peak GB |", "|---" * (5 + len(whats)) + "|"]
    for r in records:
        head = f"| {r['size']} | {r['batch']} | {r['recipe']} | "
        if "failed" in r:
            out.append(f"{head}failed: {r['failed'][:80]} |" + " |" * (len(whats) + 1))
            continue
        cells = [_tokens(r.get(w)) for w in whats]
        sizes = [f"{r[w] / 1e9:.2f}" if w in r else "-" for w in ("resident_bytes", "peak_bytes")]
        out.append(f"{head}{' | '.join([*cells, *sizes])} |")
    return [*out, ""]


def _tokens(told: dict[str, Any] | None) -> str:
    if told is None:
        return "-"
    times = f" ({told['faster']:.2f})" if "faster" in told else ""
    return f"{told['tokens_per_s']:.1f}{times}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Times as fast as cuBLAS against M, a panel a layer; written where matplotlib is installed, else said."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in found["layers"] if "faster" in r and r["variant"] != BASE]
    panels = _order((r["model"], r["layer"]) for r in records)
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [r for r in records if (r["model"], r["layer"]) == panel]
        for variant in _order(r["variant"] for r in own):
            line = sorted((r["m"], r["faster"]) for r in own if r["variant"] == variant)
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1, label=variant)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(" ".join(panel), fontsize=9)
        axis.set_xlabel("M")
        axis.set_ylabel("times cuBLAS bf16")
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
