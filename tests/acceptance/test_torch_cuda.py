"""torch-cuda on a machine without a GPU: accepted, static, a kernel for decode and one for prefill, right numbers.

The artifact runs on the CPU through the operators' references, against the reference semantics of the graph.
`QCOMPILER_FULL=1` runs every model with every recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler import api, driver
from qcompiler import recipe as recipes
from qcompiler.backends.base import Silent
from qcompiler.backends.torch.sources import Sample, from_pretrained_dir
from qcompiler.backends.triton.forms import FORMS
from qcompiler.calibrate.data import open_data
from qcompiler.dtypes import Array
from qcompiler.models import pystdlib
from qcompiler.report.model import Report
from tests import zoo
from tests.acceptance.test_torch import MODELS, TRAINED, fused_or_named, near
from tests.support import FULL, require_data

TARGET = "torch-cuda:sm_90"
WEIGHT_ONLY = ("w4a16", "w8a16", "w2a16", "f8a16", "nf4", "fp4", "mxfp4", "nvfp4")
ON_CODES = ("w8a8-dynamic", "w8a8", "w8a8-smooth", "fp8", "w4a8")
STATIC = {"w8a8", "w8a8-smooth"}
BOTH_ROADS = {"llama_tied-w4a16", "vit-w8a8-dynamic"}
SOME = {"llama_tied-w4a16", "vit-w8a8-dynamic", "cnn-w4a16", "llama_tied-nvfp4"}

BOUND = dict.fromkeys(WEIGHT_ONLY, 0.02) | {
    "w8a8-dynamic": 0.03,
    "w8a8": 0.03,
    "w8a8-smooth": 0.03,
    "w4a8": 0.03,
    "fp8": 0.06,
}
"""Largest |difference| from the reference semantics, as a share of the largest |output|. Activations and results are
rounded to bf16 layer after layer (2^-9 each); on codes, some fall on the other side of a half: a step of int8 is 2^-7
of the largest value of a token, one of e4m3 2^-4 of the value itself."""


def cases(models: Iterable[str]) -> list[Any]:
    named = [(f"{model}-{recipe}", model, recipe) for model in models for recipe in (*WEIGHT_ONLY, *ON_CODES)]
    return [pytest.param(*rest, id=name) for name, *rest in named if FULL or name in SOME]


def calibration(sample: Sample) -> list[dict[str, Array]]:
    """The sample itself, by the names of the inputs."""
    job = driver.start(TARGET, recipes.load("w4a16"), None, Silent())
    captured = driver.capture(job, sample.module, sample.args, sample.dynamic_shapes)
    names = [v.name for v in captured.graph.inputs if v.payload is None]
    captured.close()
    return [dict(zip(names, [t.numpy() for t in sample.args], strict=True))]


def reference(sample: Sample, recipe: str, data: list[dict[str, Array]] | None) -> Array:
    """What the quantized model means: the graph before kernels are chosen, each q op by its float64 semantics."""
    job = driver.start(TARGET, recipes.load(recipe), None, Silent())
    captured = driver.capture(job, sample.module, sample.args, sample.dynamic_shapes)
    if data is not None:
        driver.calibrate_with(job, open_data(data))
    driver.run_recipe(job, captured.graph, [p for p in job.recipe.passes if p.name not in ("choose-layout", "dce")])
    names = [v.name for v in captured.graph.inputs if v.payload is None]
    with job.backend.runner(captured.graph, []) as run:
        found = run(dict(zip(names, [t.numpy() for t in sample.args], strict=True)))
    captured.close()
    return next(iter(found.values()))


def kernels_named(report: Report, recipe: str) -> None:
    """Each site is fused by kernels of torch-cuda, or skipped with a reason; a weight-only layer has two kernels."""
    fused_or_named(report)
    for site in report.sites:
        if site.status != "fused":
            continue
        assert site.evidence == "static"
        assert set(site.kernel) == {"decode", "prefill"}
        short = [k.removeprefix("torch-cuda/") for k in (site.kernel["decode"], site.kernel["prefill"])]
        if site.op == "embedding":
            assert short == ["gather", "gather"]
        elif short[0].startswith("wn."):
            kind = short[0].removeprefix("wn.gemv.")
            assert kind in FORMS
            assert short == [f"wn.gemv.{kind}", f"wn.gemm.{kind}"]
        else:
            assert recipe in ON_CODES
            assert short[0].startswith("a8.gemm.")
    assert any("is not here" in note for note in report.notes)


@pytest.mark.parametrize(("model", "recipe"), cases(MODELS))
def test_models_compile_without_a_gpu(model: str, recipe: str, tmp_path: Path) -> None:
    compiled(model, getattr(zoo, model)(), recipe, tmp_path)


@pytest.mark.parametrize(("model", "recipe"), cases((*TRAINED, "pystdlib", "minilm")))
def test_trained_models_compile_without_a_gpu(model: str, recipe: str, tmp_path: Path) -> None:
    if model in TRAINED:
        element = torch.bfloat16 if model == "base" else torch.float32
        sample = from_pretrained_dir(require_data(TRAINED[model]), element)
    else:
        sample = Sample(*pystdlib.example()) if model == "pystdlib" else zoo.minilm()
    compiled(model, sample, recipe, tmp_path)


def compiled(model: str, sample: Sample, recipe: str, tmp_path: Path) -> None:
    data = calibration(sample) if recipe in STATIC else None
    want = reference(sample, recipe, data)
    artifact = api.compile(
        sample.module,
        args=sample.args,
        dynamic_shapes=sample.dynamic_shapes,
        target=TARGET,
        recipe=recipe,
        calibration=data,
        out=tmp_path / "model.pt2",
    )
    kernels_named(artifact.report, recipe)
    near(artifact(*sample.args)[0], want, BOUND[recipe])
    again = api.verify(tmp_path / "model.pt2", target=TARGET)
    assert again.accepted
    assert {s.name: s.kernel for s in again.sites} == {
        s.name: s.kernel for s in artifact.report.sites if s.status == "fused" and s.bytes["codes"]
    }
    if f"{model}-{recipe}" in BOTH_ROADS:
        under_torch_compile(sample, recipe, want, artifact.report)


def under_torch_compile(sample: Sample, recipe: str, want: Array, told: Report) -> None:
    """The same kernels for the same sites, and the same numbers, of a model whose weights are on the CPU."""
    torch.compiler.reset()
    reports: list[Report] = []
    options = {"recipe": recipe, "target": TARGET, "inner": "eager", "report": reports.append}
    run = torch.compile(sample.module, backend="qcompiler", options=options)
    with torch.no_grad():
        near(run(*sample.args), want, BOUND[recipe])
    (report,) = reports
    fused_or_named(report)
    assert {s.name: s.kernel for s in report.sites} == {s.name: s.kernel for s in told.sites}
