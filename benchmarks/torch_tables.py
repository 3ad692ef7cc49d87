"""The tables of ``torch_cpu.py``, and what stands below them: what is slower than float and why, what bounds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_variants import BASES, PACK4, PACK8, WHY

SLOWER = 0.97
"""Below this many times the float speed a cell counts as slower; nearer ones are within the noise of a round."""

FEW = 4
"""Rows up to which reading the weights is what takes the time."""
_UNEXPECTED = (
    "not expected where reading the weights takes the time, of which it reads fewer bytes; the rounds in the JSON file "
    "tell whether the machine was busy"
)
WHY_FEW = {PACK4: _UNEXPECTED, PACK8: _UNEXPECTED}


def markdown(found: dict[str, Any]) -> str:
    """The whole file."""
    chip, limits = found["chip"], found["limits"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    lines = [
        "# Torch on a processor",
        "",
        f"`{found['command']}`, commit {found['commit']}; {chip['model']} ({', '.join(chip['has'])}), "
        f"{found['settings']['threads']} threads; {versions}",
        "",
        f"Measured limits: {limits['read_bytes_per_s'] / 1e9:.1f} GB/s read by all threads together, "
        f"{limits['f32_multiply_adds_per_s'] / 1e9:.0f} G multiply-adds/s in f32, "
        f"{limits['bf16_multiply_adds_per_s'] / 1e9:.0f} in bf16.",
        "",
    ]
    if "kept" in found:
        kept = found["kept"]
        lines += [
            f"The {kept['part']} part: `{kept['command']}`, commit {kept['commit']}, when all "
            f"threads read {kept['limits']['read_bytes_per_s'] / 1e9:.1f} GB/s.",
            "",
        ]
    if "model" in found:
        lines += model_lines(found)
    if "linear" in found:
        lines += linear_lines(found)
    slower = list(slower_cells(found))
    lines += ["## Slower than float", ""]
    lines += slower or ["Nothing of ours or of torchao's is slower than either float base."]
    return "\n".join([*lines, ""])


def limits_of(found: dict[str, Any], part: str) -> dict[str, float]:
    """What the processor could do at best when ``part`` was measured."""
    kept = found.get("kept", {})
    limits: dict[str, float] = kept["limits"] if kept.get("part") == part else found["limits"]
    return limits


def model_lines(found: dict[str, Any]) -> list[str]:
    size, read = found["size"], limits_of(found, "model")["read_bytes_per_s"]
    out = [
        f"## Llama of {size['layers']} layers ({size['linear_weights'] / 1e9:.2f}e9 weights in linear layers), batch 1",
        "",
        f"Decode: one token after {size['prompt']} to {size['cache']}; prefill: {size['prompt']} tokens. Times as fast "
        "as fp32 eager / bf16 inductor, round by round. GB/s: weight bytes that a token reads, over its time; in "
        "brackets the share of the measured limit.",
        "",
        "| variant | decode ms | times | GB/s | prefill ms | times | peak MiB | resident MiB | compile s | SQNR dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["model"]:
        if "failed" in r:
            out.append(f"| {r['variant']} | failed: {_cell(r['failed'])} | | | | | | | | |")
            continue
        share = r["bytes_per_s"] / read
        out.append(
            f"| {r['variant']} | {r['decode']['s'] * 1e3:.1f} | {_times(r['decode'])} | {r['bytes_per_s'] / 1e9:.1f} "
            f"({share:.0%}) | {r['prefill']['s'] * 1e3:.0f} | {_times(r['prefill'])} | {r['peak_bytes'] >> 20} "
            f"| {r['resident_bytes'] >> 20} | {r['compile_s']:.0f} | {_decibel(r['sqnr_db'])} |"
        )
    return [*out, "", *bounds(found), ""]


def bounds(found: dict[str, Any]) -> list[str]:
    """What decoding could reach at best on the measured bandwidth, which is what a figure that is missed is held to."""
    read, by_name = (
        limits_of(found, "model")["read_bytes_per_s"],
        {r["variant"]: r for r in found["model"] if "failed" not in r},
    )
    out = []
    for r in by_name.values():
        if not _is_float(r["variant"]):
            for base in BASES:
                if base in by_name:
                    most = by_name[base]["decode"]["s"] * read / r["weight_bytes"]
                    got = r["decode"]["faster"].get(base, 0.0)
                    out.append(
                        f"- {r['variant']}: {got:.2f} times {base}; reading its {r['weight_bytes'] / 1e6:.0f} MB of "
                        f"weights at the measured limit and nothing else would be {most:.2f} times."
                    )
    return out


def linear_lines(found: dict[str, Any]) -> list[str]:
    read = limits_of(found, "linear")["read_bytes_per_s"]
    out = ["## Linear layers", ""]
    shapes = list(dict.fromkeys((r["k"], r["n"]) for r in found["linear"]))
    for k, n in shapes:
        records = [r for r in found["linear"] if (r["k"], r["n"]) == (k, n)]
        rows = list(dict.fromkeys(r["m"] for r in records))
        out += [
            f"K={k}, N={n}: microseconds a layer (times fp32 eager / bf16 inductor)",
            "",
            "| variant | " + " | ".join(f"M={m}" for m in rows) + " | GB/s at M=1 | SQNR dB |",
            "|---|" + "---|" * (len(rows) + 2),
        ]
        for name in dict.fromkeys(r["variant"] for r in records):
            own = [r for r in records if r["variant"] == name]
            if bad := next((r for r in own if "failed" in r), None):
                out.append(f"| {name} | failed: {_cell(bad['failed'])} |" + " |" * (len(rows) + 1))
                continue
            cells = [f"{r['s'] * 1e6:.0f} ({_times(r)})" for r in own]
            speed = own[0]["bytes_per_s"]
            out.append(
                f"| {name} | {' | '.join(cells)} | {speed / 1e9:.1f} ({speed / read:.0%}) "
                f"| {_decibel(min(r['sqnr_db'] for r in own))} |"
            )
        out.append("")
    return out


def slower_cells(found: dict[str, Any]) -> Iterator[str]:
    """A line for every variant, place and base that it is slower than, with the reason; floats are left out."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for r in found.get("linear", []):
        if "failed" not in r and not _is_float(r["variant"]):
            for base, times in r["faster"].items():
                if times < SLOWER:
                    few = ", few rows" if r["m"] <= FEW else ""
                    key = (r["variant"], base, f"linear {r['k']}x{r['n']}{few}")
                    rate = r["k"] * r["n"] * r["m"] / r["s"]
                    cells.setdefault(key, []).append(f"M={r['m']} ({times:.2f}, {rate / 1e9:.0f} G multiply-adds/s)")
    for r in found.get("model", []):
        if "failed" not in r and not _is_float(r["variant"]):
            for what in ("decode", "prefill"):
                for base, times in r[what]["faster"].items():
                    if times < SLOWER:
                        cells.setdefault((r["variant"], base, f"the llama's {what}"), []).append(f"{times:.2f}")
    kernels = {r["variant"]: r["kernel"] for part in ("linear", "model") for r in found.get(part, [])}
    for (name, base, where), at in cells.items():
        few = where.endswith("decode") or where.endswith("rows")
        why = WHY_FEW.get(kernels[name], WHY[kernels[name]]) if few else WHY[kernels[name]]
        yield f"- {name} against {base}, {where}: {', '.join(at)}. `{kernels[name]}`: {why}."


def _is_float(name: str) -> bool:
    return name.startswith(("fp32", "bf16"))


def _times(figures: dict[str, Any]) -> str:
    return " / ".join(f"{figures['faster'][b]:.2f}" if b in figures["faster"] else "-" for b in BASES)


def _decibel(value: float | None) -> str:
    return "-" if value is None else "exact" if value >= 200 else f"{value:.1f}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:120]
