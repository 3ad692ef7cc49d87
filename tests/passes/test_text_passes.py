"""Passes, text in and text out: ``cases/NAME.qir`` names its recipe, ``golden/passes/NAME.qir`` is what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qcompiler import recipe
from qcompiler.backends.onnx import kernels
from qcompiler.backends.onnx.running import runnable
from qcompiler.calibrate.calibrator import Calibrator, Planned
from qcompiler.calibrate.data import open_data
from qcompiler.ir import Graph
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.spec import check
from qcompiler.text import show
from tests.support import Golden

CASES = sorted((Path(__file__).parent / "cases").glob("*.qir"))


def header(text: str, key: str) -> str | None:
    found = re.search(rf"^# {key}: (.*)$", text, re.MULTILINE)
    return None if found is None else found[1]


def calibration(graph: Graph, text: str) -> Calibrator | None:
    """``# calibration: normal SEED``: four batches of standard normal inputs, symbolic sizes being 6; ``planned``:
    every value lies in -1..1."""
    kind = header(text, "calibration")
    if kind is None or kind == "planned":
        return None if kind is None else Planned()
    rng = np.random.default_rng(int(kind.removeprefix("normal ")))
    shapes = {v.name: [d if isinstance(d, int) else 6 for d in v.tensor.shape or ()] for v in graph.inputs}
    batches = [{n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()} for _ in range(4)]
    return Calibrator(open_data(batches), runnable)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_case(case: Path, golden: Golden) -> None:
    text = case.read_text()
    target, steps = header(text, "target"), header(text, "recipe")
    assert steps is not None
    graph = parse(text)
    ctx = Context(None if target is None else kernels.target(target), calibration=calibration(graph, text))
    run(graph, recipe.parse_line(steps).passes, ctx)
    check(graph)
    out = show(graph)
    assert show(parse(out)) == out
    sites = [
        f"# site {s.name}: {s.op} {s.n}x{s.k} <{s.scheme}> {s.status} {s.reason or ''}".rstrip() for s in ctx.ledger
    ]
    refusals = [
        f"# refused {r.rule} {r.site or r.op}: {r.reason.code} {r.reason.message}".rstrip() for r in ctx.refusals
    ]
    notes = [f"# note {note}" for note in ctx.notes]
    golden(f"passes/{case.name}", "\n".join([*(line.rstrip() for line in (*sites, *refusals, *notes)), out]))
