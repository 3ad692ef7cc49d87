"""Both roads of torch: compiled to a .pt2 file, and under torch.compile. Same sites, same kernels, same numbers.

`QCOMPILER_FULL=1` runs every model with every recipe; without it each model runs one of them, and three run all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import api, driver
from qcompiler import recipe as recipes
from qcompiler.backends.base import Silent
from qcompiler.dtypes import Array
from qcompiler.report.model import Report
from tests import zoo

MODELS = ("llama", "llama_tied", "qwen3", "gpt2", "opt", "phi3", "gemma", "bert", "vit", "cnn")
RECIPES = ("w4a16", "w8a16", "w8a8-dynamic")
WHOLE = ("llama", "bert", "cnn")
FULL = bool(os.environ.get("QCOMPILER_FULL"))
CASES = [
    (model, recipe)
    for i, model in enumerate(MODELS)
    for j, recipe in enumerate(RECIPES)
    if FULL or model in WHOLE or j == i % len(RECIPES)
]
BOUND = {"w4a16": 0.02, "w8a16": 0.02, "w8a8-dynamic": 0.02}
"""Largest |difference| from the reference semantics, as a share of the largest |output|. The kernels round activations
and results to bf16 (2^-9 of each), layer after layer; w8a8 differs where a code falls on the other side of a half."""


def reference(sample: Any, recipe: str, inputs: tuple[torch.Tensor, ...]) -> Array:
    """What the quantized model means: the graph before kernels are chosen, each q op by its float64 semantics."""
    job = driver.start("torch-cpu", recipes.load(recipe), None, Silent())
    captured = driver.capture(job, sample.module, sample.args, sample.dynamic_shapes)
    driver.run_recipe(job, captured.graph, [p for p in job.recipe.passes if p.name not in ("choose-layout", "dce")])
    names = [v.name for v in captured.graph.inputs if v.payload is None]
    with job.backend.runner(captured.graph, []) as run:
        found = run(dict(zip(names, [t.numpy() for t in inputs], strict=True)))
    captured.close()
    return next(iter(found.values()))


def told(report: Report) -> list[tuple[Any, ...]]:
    """What a report says of each site, evidence aside."""
    return sorted((s.name, s.op, s.n, s.k, s.scheme, s.status, *sorted(s.kernel.items())) for s in report.sites)


def fused_or_named(report: Report) -> None:
    assert report.accepted
    assert not report.totals.unfused
    assert report.totals.fused
    assert all(s.reason for s in report.sites if s.status == "skipped")


def near(got: Any, want: Array, bound: float) -> None:
    got = np.asarray(got.detach().float() if isinstance(got, torch.Tensor) else got, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize(("model", "recipe"), CASES, ids=["-".join(c) for c in CASES])
def test_both_roads_fuse_the_same_sites(model: str, recipe: str, tmp_path: Path) -> None:
    sample = getattr(zoo, model)()
    want = reference(sample, recipe, sample.args)

    artifact = api.compile(
        sample.module,
        args=sample.args,
        dynamic_shapes=sample.dynamic_shapes,
        target="torch-cpu",
        recipe=recipe,
        out=tmp_path / "model.pt2",
    )
    fused_or_named(artifact.report)
    assert {s.evidence for s in artifact.report.sites if s.status == "fused"} == {"measured"}
    near(artifact(*sample.args)[0], want, BOUND[recipe])

    torch.compiler.reset()
    reports: list[Report] = []
    options = {"recipe": recipe, "inner": "eager", "report": reports.append}
    compiled = torch.compile(sample.module, backend="qcompiler", options=options)
    with torch.no_grad():
        near(compiled(*sample.args), want, BOUND[recipe])
    (report,) = reports
    fused_or_named(report)
    assert told(report) == told(artifact.report)
