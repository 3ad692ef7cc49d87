"""What the integer kernels do on the chip at hand, as JSON: ``python -m tests.backends.onnx.integer_chip_probe``.

Small enough to run under an emulator. Each case: how far the result is outside the row's bound (at most 1 is right),
for random codes and for extreme ones: activations and weights at the ends of their ranges, where sums of 16 bits
saturate.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from qcompiler.backends.onnx.kernels_integer import INTEGER_ROWS
from qcompiler.target import KernelRow
from tests.backends.onnx.integer import Case, conv, linear_dyn, linear_static, matmul, ran, wrong

N, K = 24, 96
PRODUCTS = ("q.linear_static", "q.linear_dyn", "q.conv", "q.conv_dyn", "q.matmul")


def cases(row: KernelRow) -> dict[str, Case]:
    """Cases of ``row``: a linear layer or product, or a dense, a grouped and a depthwise convolution."""
    kind = next(w for w in row.name.split(".")[1:] if w[:2] in ("u8", "s8"))
    x = "uint8 tensor asym" if kind[0] == "u" else "int8 tensor asym"
    w = "int8 channel sym"
    rng = np.random.default_rng(0)
    if row.op == "q.linear_static":
        y = None if "float" in row.y_codes else f"{min(row.y_codes)} tensor asym"
        return {"linear": linear_static(rng, N, K, (5,), x=x, w=w, y=y, bias=row.bias)}
    if row.op == "q.linear_dyn":
        return {"linear": linear_dyn(rng, N, K, (5,), w=w)}
    if row.op == "q.matmul":
        y = None if row.y_codes == {"float"} else f"{min(row.y_codes)} tensor asym"
        left = "left" in row.name
        a, b = ("int8 tensor sym", x) if left else (x, "int8 tensor sym")
        return {"product": matmul(rng, (2, 5, K), (2, K, N), a=a, b=b, y=y, inputs=(3,) if left else (0,))}
    more = {"x": x, "w": w, "dynamic": row.dynamic, "coded": "float" not in row.y_codes}
    return {
        "conv": conv(rng, 16, 12, (3, 3), (8, 8), **more),  # type: ignore[arg-type]  # options by name
        "grouped": conv(rng, 16, 16, (3, 3), (8, 8), attrs={"group": 2}, **more),  # type: ignore[arg-type]
        "depthwise": conv(rng, 16, 16, (3, 3), (8, 8), attrs={"group": 16}, **more),  # type: ignore[arg-type]
        "pointwise": conv(rng, 32, 64, (1, 1), (6, 6), **more),  # type: ignore[arg-type]
    }


def extremes(case: Case) -> Case:
    """Activations at the upper end of their range; rows of all greatest and all least weights."""
    places = {"q.linear_static": (0, 3), "q.conv": (0, 3), "q.matmul": (0, 3)}.get(case.name, (0, 1))
    for place in places:
        array = case.arrays[place]
        assert array is not None
        if array.dtype.kind == "f":
            array[...] = 1.0
            continue
        info = np.iinfo(array.dtype)
        if place in case.inputs:
            array[...] = info.max
        else:
            rows = np.arange(array.shape[0]).reshape(-1, *[1] * (array.ndim - 1)) % 2
            array[...] = np.where(rows, info.min, info.max)
    return case


def main(spec: str) -> None:
    out: dict[str, float] = {}
    for row in INTEGER_ROWS:
        if row.op not in PRODUCTS:
            continue
        for name in cases(row):
            for how in ("random", "extreme"):
                case = cases(row)[name]
                case = extremes(case) if how == "extreme" else case
                out[f"{row.name} {name} {how}"] = wrong(case, ran(case, spec, row.name).result)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ort-cpu:avx512vnni")
