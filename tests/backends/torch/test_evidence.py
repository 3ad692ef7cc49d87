"""Evidence from runs: accepted artifacts are accepted, measured; what a file says that is not so is found."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler import recipe as recipes
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.evidence import NOTHING, TorchEvidence, verify_file
from qcompiler.backends.torch.held import LowBit
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.reference import WRONG
from qcompiler.backends.torch.watching import Watched
from qcompiler.dtypes import BF16
from qcompiler.ir import TensorType
from qcompiler.payload import constant
from qcompiler.pipeline import Context, run
from tests.backends.torch import exports
from tests.backends.torch.lowered import RECIPES, SITES, at, lowered, written

CPU = target("torch-cpu")


def exported(module: nn.Module, path: Path, *shape: int) -> Path:
    dims = {0: Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        program = torch.export.export(module.eval(), (torch.randn(*shape),), dynamic_shapes=(dims,))
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_artifacts_are_accepted_and_measured(recipe: str, tmp_path: Path) -> None:
    judged = verify_file(written(lowered(recipe), tmp_path / "model.pt2"), CPU)
    assert not judged.findings
    assert judged.evidence.kind == "measured"
    assert [(s.name, s.status, s.evidence) for s in judged.sites] == [(n, "fused", "measured") for n in SITES]
    for site in SITES:
        seen = judged.evidence.of(site)
        assert [(n.phase, n.facts["m"]) for n in seen] == [("decode", 1), ("prefill", 512)]
        assert all(n.kernel == judged.sites[SITES.index(site)].kernel[n.phase] for n in seen)
        assert all(n.facts["ran"] for n in seen)
    # The first of each kind of call is held against float64: bf16 rounds to 2^-9, 8-bit sums are exact.
    off = [n.facts["relative_error"] for n in judged.evidence.nodes if "relative_error" in n.facts]
    assert off
    assert max(off) < 0.006


def test_without_running(tmp_path: Path) -> None:
    judged = verify_file(written(lowered("w8a16"), tmp_path / "model.pt2"), CPU, run=False)
    assert judged.evidence.kind == "static"
    assert {s.evidence for s in judged.sites} == {"static"}
    assert all(s.status == "fused" for s in judged.sites)
    assert judged.evidence.notes[0].startswith("nothing was run")


def test_codes_packed_for_another_chip(tmp_path: Path) -> None:
    if CPU.row("torch-cpu/int4pack").layout.endswith("avx2"):
        pytest.skip("this machine packs for avx2 itself")
    judged = verify_file(written(lowered("w4a16", "torch-cpu:avx2"), tmp_path / "model.pt2"), CPU, run=False)
    assert {(f.code, f.op) for f in judged.findings} == {("QC205", "up"), ("QC205", "down")}
    assert "packed for avx2" in judged.findings[0].reason
    assert {s.name: s.status for s in judged.sites}["up"] == "unfused"


def test_an_artifact_for_avx2_runs_on_avx512(tmp_path: Path) -> None:
    judged = verify_file(written(lowered("w4a16", "torch-cpu:avx2"), tmp_path / "model.pt2"), target("torch-cpu:avx2"))
    assert not judged.findings
    if target("torch-cpu").features != target("torch-cpu:avx2").features:
        assert judged.evidence.kind == "static"
    assert all(n.facts["m"] for n in judged.evidence.nodes)


class Scaled(nn.Module):
    """fp8 by torch's own operator, whose CPU code expands both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(256, 256).to(torch.float8_e4m3fn))
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        codes = x.to(torch.float8_e4m3fn)
        return torch._scaled_mm(codes, self.w.t(), self.one, self.one, out_dtype=torch.bfloat16)


def test_what_a_kernel_allocates_is_seen(tmp_path: Path) -> None:
    path = exported(Scaled(), tmp_path / "fp8.pt2", 4, 256)
    result = TorchEvidence(CPU).collect(path)
    facts = result.nodes[0].facts
    assert facts["temp_bytes"] >= 4 * 256 * 256
    assert result.nodes[0].verdict == "dequant"
    assert {f.code for f in result.findings} == {"QC104"}


def test_a_site_that_the_report_promises_is_missed(tmp_path: Path) -> None:
    path = exported(nn.Sequential(nn.Linear(8, 8)), tmp_path / "model.pt2", 4, 8)
    report = {"sites": [{"name": "linear", "status": "fused", "scheme": "int4 g32 sym"}]}
    (tmp_path / "model.pt2.report.json").write_text(json.dumps(report))
    judged = verify_file(path, CPU)
    assert [(f.code, f.op) for f in judged.findings] == [("QC103", "linear")]


def test_a_float_weight_that_was_codes_once(tmp_path: Path) -> None:
    layer = nn.Linear(128, 64, bias=False)
    codes = torch.randint(-8, 8, (64, 128), generator=torch.Generator().manual_seed(0))
    layer.weight.data = codes * torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) * 0.1
    judged = verify_file(exported(layer, tmp_path / "folded.pt2", 4, 128), CPU)
    assert [f.code for f in judged.findings] == ["QC103"]


def test_damaged_files_are_the_users_fault(tmp_path: Path) -> None:
    from qcompiler.errors import InputError

    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/aotinductor/model/x.so", b"")
    with pytest.raises(InputError, match=r"AOTInductor"):
        verify_file(path, CPU)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"not a \.pt2"):
        verify_file(path, CPU)


class Kept(Watched):
    """Keeps what each low-bit call was given and gave."""

    def _note(self, node: LowBit, known: Any, results: Any) -> None:
        self.seen.setdefault(node.op, {})["kept"] = (node, dict(known), results[0])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("network", ["tied", "cnn"])
def test_numbers_are_held_against_float64(network: str, recipe: str) -> None:
    """What the calls give is right; the same numbers in another order are not."""
    if network == "tied":
        graph, feed = lowered(recipe), {"ids": np.arange(14).reshape(2, 7)}
    else:
        graph = load(exports.program("cnn"))
        run(graph, recipes.load(recipe).passes, Context(CPU))
        pictures = graph.inputs[0]
        shape = [2 if not isinstance(d, int) else d for d in pictures.tensor.shape or ()]
        feed = {pictures.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    kept = Kept(graph, None)
    kept(feed)
    calls = [facts["kept"] for facts in kept.seen.values()]
    assert {n.kind for n, _, _ in calls} & {"linear", "conv"}
    for node, known, result in calls:
        if node.kind != "embedding":
            right = kept.reference.relative_error(node, known, result)
            assert right is not None
            assert right < 0.006
            wrong = kept.reference.relative_error(node, known, result.roll(1, 1))
            assert wrong is not None
            assert wrong > WRONG


# -- what may end the process: last, since each takes a new one ----------------------------------------------------


def test_ragged_int8_codes(tmp_path: Path) -> None:
    """K % 16 != 0 in bf16: the kernel reads past its rows, and may end the process."""
    graph = lowered("w8a16")
    op = at(graph, "up")
    x = op.operand(0)
    assert x is not None
    op.set_operand(1, graph.add_const("ragged", constant(np.ones((100, 72), np.int8))))
    pad = next(o for o in graph if o.results and o.result is x)
    wide = graph.create(
        "aten.constant_pad_nd.default",
        [x],
        {"args": (pad.attrs["args"][0], (0, 8))},
        [(graph.fresh("wide"), TensorType(BF16, (*(x.tensor.shape or ())[:1], 72)))],
        before=op,
    )
    op.set_operand(0, wide.result)
    judged = verify_file(written(graph, tmp_path / "model.pt2"), CPU)
    assert next((f.code, f.op) for f in judged.findings if f.severity == "error") == ("QC203", "up")
    assert {s.name: s.status for s in judged.sites}["up"] == "unfused"
    seen = judged.evidence.of("up")  # where the process lived, its numbers are off
    assert all(n.verdict in ("wrong", "error") for n in seen)


class Crash(nn.Module):
    """A plain weight where oneDNN wants a packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(64, 64, dtype=torch.int8))
        self.register_buffer("s", torch.ones(64))
        self.register_buffer("z", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x.to(torch.uint8), 1.0, 0, self.w, self.s, self.z, None, 1.0, 0, torch.float32, "none", [1.0], ""
        )
        return out


def test_a_crash_is_a_finding(tmp_path: Path) -> None:
    path = exported(Crash(), tmp_path / "crash.pt2", 4, 64)
    judged = verify_file(path, CPU)
    assert [f.code for f in judged.findings if f.severity == "error"] == ["QC205"]
    assert judged.findings[0].op == "qlinear_pointwise"
    assert any("SIGSEGV" in n for n in judged.evidence.notes)
    assert judged.sites[0].status == "unfused"
    # The next file is judged by a new process.
    assert verify_file(exported(nn.Linear(8, 8), tmp_path / "plain.pt2", 4, 8), CPU).evidence.notes == [NOTHING]
