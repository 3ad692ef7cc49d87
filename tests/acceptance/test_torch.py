"""Both roads of torch: compiled to a .pt2 file, and under torch.compile. Same sites, same kernels, same numbers.

`QCOMPILER_FULL=1` runs every model with every recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qcompiler import api, driver
from qcompiler import recipe as recipes
from qcompiler.backends.base import Silent
from qcompiler.backends.onnx import layouts as onnx_layouts
from qcompiler.backends.torch import capture, layouts, lower
from qcompiler.backends.torch.sources import Sample, from_pretrained_dir
from qcompiler.dtypes import Array, unpack_bits
from qcompiler.models import pystdlib
from qcompiler.report.model import Report
from qcompiler.scheme import parse_scheme
from tests import zoo
from tests.support import FULL, require_data

MODELS = ("llama", "llama_tied", "qwen3", "gpt2", "opt", "phi3", "gemma", "bert", "vit", "cnn")
TRAINED = {"stories260K": "lm/stories260K/hf", "base": "ckpt/_base"}
"""Model directories of the test data; ``base`` has bf16 weights and is read as that."""
RECIPES = ("w4a16", "w8a16", "w8a8-dynamic")
SOME = {"llama_tied-w8a16", "gpt2-w8a8-dynamic", "vit-w4a16", "cnn-w8a8-dynamic"}
SOME |= {"stories260K-w4a16", "base-w8a8-dynamic"}


def cases(models: Iterable[str]) -> list[Any]:
    named = [(f"{model}-{recipe}", model, recipe) for model in models for recipe in RECIPES]
    return [pytest.param(*rest, id=name) for name, *rest in named if FULL or name in SOME]


BOUND = {"w4a16": 0.02, "w8a16": 0.02, "w8a8-dynamic": 0.02}
"""Largest |difference| from the reference semantics, as a share of the largest |output|. The kernels round activations
and results to bf16 (2^-9 of each), layer after layer; w8a8 differs where a code falls on the other side of a half."""


def reference(sample: Sample, recipe: str, inputs: tuple[torch.Tensor, ...]) -> Array:
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


@pytest.mark.parametrize(("model", "recipe"), cases(MODELS))
def test_both_roads_fuse_the_same_sites(model: str, recipe: str, tmp_path: Path) -> None:
    both_roads(getattr(zoo, model)(), recipe, tmp_path)


@pytest.mark.parametrize(("model", "recipe"), cases((*TRAINED, "pystdlib", "minilm")))
def test_trained_models_take_both_roads(model: str, recipe: str, tmp_path: Path) -> None:
    if model in TRAINED:
        element = torch.bfloat16 if model == "base" else torch.float32
        sample = from_pretrained_dir(require_data(TRAINED[model]), element)
    else:
        sample = Sample(*pystdlib.example()) if model == "pystdlib" else zoo.minilm()
    both_roads(sample, recipe, tmp_path)


def both_roads(sample: Sample, recipe: str, tmp_path: Path) -> None:
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
    stored = [s for s in artifact.report.sites if s.status == "fused" and s.bytes["codes"]]  # bert's pooler is not
    assert {s.evidence for s in stored} == {"measured"}
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


def test_both_runtimes_hold_the_same_bits(tmp_path: Path) -> None:
    """Codes, scales and zero points of an ONNX artifact and of a torch artifact, each read from its own layout."""
    sample = zoo.mlp()
    held: dict[str, dict[str, tuple[Array, Array, Array]]] = {}
    for target in ("ort-cpu", "torch-cpu"):
        artifact = api.compile(
            sample.module, args=sample.args, dynamic_shapes=sample.dynamic_shapes, target=target, recipe="w4a16"
        )
        held[target] = (ort_bits if target == "ort-cpu" else torch_bits)(artifact)
    assert set(held["ort-cpu"]) == set(held["torch-cpu"]) == {"0", "2"}
    for site, bits in held["ort-cpu"].items():
        for ours, theirs in zip(bits, held["torch-cpu"][site], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def ort_bits(artifact: api.Artifact) -> dict[str, tuple[Array, Array, Array]]:
    model = onnx.load(artifact.path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    out = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        n, k = (next(a.i for a in node.attribute if a.name == key) for key in "NK")
        codes, scales, zeros = (stored[name] for name in node.input[1:4])
        groups = scales.size // n
        zero = unpack_bits(zeros.reshape(n, -1), 4, n * (zeros.size // n) * 2, signed=False).reshape(n, -1)[:, :groups]
        found = onnx_layouts.unblocks(codes, 4, k, signed=False), scales.reshape(n, groups), zero
        out[node.name] = found
    return out


def torch_bits(artifact: api.Artifact) -> dict[str, tuple[Array, Array, Array]]:
    graph = capture.load(artifact.path)
    out = {}
    for op in graph.walk():
        if op.name != "aten._weight_int4pack_mm_for_cpu.default":
            continue
        codes, stored = (v.payload.array() for v in op.operands[1:3] if v is not None and v.payload is not None)
        site = next(s for s in artifact.report.sites if s.name == op.label)
        width = next(w for w in ("avx512", "avx2") if any(f"_{w}" in str(v.name) for v in op.operands if v is not None))
        nibbles = layouts.int4unpack(codes, width)
        scheme = parse_scheme("int4 g128 asym").with_axis(1)
        scale, zero = layouts.parameters_of(stored, scheme, (site.n, 1), lower.int4_block(scheme, site.k))
        assert zero is not None
        unsigned = layouts.codes_of(nibbles, site.n, site.k, signed=True).astype(np.int16) + 8
        out[op.label] = unsigned.astype(np.uint8), scale, (zero.astype(np.int16) + 8).astype(np.uint8)
    return out
