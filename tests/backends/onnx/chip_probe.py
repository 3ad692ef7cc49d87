"""What the linear and table kernels do on the chip at hand, as JSON: ``python -m tests.backends.onnx.chip_probe``.

Small enough to run under an emulator. Each case: fallback lines, temporary bytes, bytes of the expanded weight, and
the error in units of the bound of test_kernels (at most 1).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.backends.onnx.activations import int8_activations
from qcompiler.backends.onnx.kernels import CPU_ROWS
from tests.backends.onnx.proof import Table, embedding, linear, lower, run, table

N, K = 48, 160


def extremes(t: Table) -> Table:
    """Rows of all least and all greatest codes: with constant activations, what 16-bit sums would saturate on."""
    d = t.scheme.dtype
    codes = np.where(np.arange(t.n)[:, None] % 2, d.qmin, d.qmax) + np.zeros((1, t.k), np.int64)
    return replace(t, codes=codes.astype(d.storage))


def probe_linear(kernel: str, t: Table) -> dict[str, Any]:
    graph = lower(linear(t), kernel=kernel)
    (node,) = list(graph)
    xs = [np.random.default_rng(m).standard_normal((m, K)).astype(np.float32) for m in (1, 5)]
    xs += [x * 0 + sign for x in xs for sign in (1, -1)]
    seen = run(graph, [{"x": x} for x in xs])
    worst = 0.0
    for x, (y,) in zip(xs, seen.outputs, strict=True):
        level4 = node.attrs["accuracy_level"] == 4
        a = int8_activations(x, node.attrs["block_size"]) if level4 else x.astype(np.float64)
        bound = (K + 4) * 2.0**-24 * (np.abs(a) @ (t.stored_magnitude if level4 else np.abs(t.values)).T)
        worst = max(worst, float((np.abs(y - a @ t.values.T) / bound).max()))
    return {"fallbacks": seen.fallbacks, "temp": seen.temp[0]["head"], "expanded": N * K * 4, "error": worst}


def probe_table(scheme: str) -> dict[str, Any]:
    t = table(scheme, N, K)
    ids = np.arange(6).reshape(2, 3)
    seen = run(lower(embedding(t)), [{"i": ids}])
    off = float(np.abs(seen.outputs[0][0] - t.values[ids].astype(np.float32)).max())
    return {"temp": seen.temp[0]["embed"], "error": off}


def main() -> None:
    out: dict[str, Any] = {}
    for row in (r for r in CPU_ROWS if r.op in ("q.linear", "q.embedding")):
        for code in sorted(c for c in row.codes if c.startswith("int")):
            for rest in ("g32 asym", "channel sym"):
                scheme = f"{code} {rest}"
                if row.op == "q.linear":
                    out[f"{row.name} {scheme}"] = probe_linear(row.name, table(scheme, N, K))
                    out[f"{row.name} {scheme} extremes"] = probe_linear(row.name, extremes(table(scheme, N, K)))
                else:
                    out[f"{row.name} {scheme}"] = probe_table(scheme)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
