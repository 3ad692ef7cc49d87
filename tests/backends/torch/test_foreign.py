"""Programs that other tools quantized: torch's pt2e flow, tensor classes of their own, libraries that are not here."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.archive import open_program
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.evidence import verify_file
from qcompiler.backends.torch.judge import examine
from qcompiler.backends.torch.kernels import target
from qcompiler.errors import InputError
from qcompiler.verify.static import find_unfused

CPU = target("torch-cpu")
QD = torch.ops.quantized_decomposed


class Pt2e(nn.Module):
    """What the x86 inductor quantizer of torchao 0.18 and torch 2.13 make of conv, relu, pool, linear, relu, linear."""

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.dynamic = dynamic
        for name, shape in (("conv", (8, 3, 3, 3)), ("l1", (32, 128)), ("l2", (16, 32))):
            self.register_buffer(f"{name}_param", torch.randint(-127, 128, shape, dtype=torch.int8, generator=g))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0], generator=g) / 127)
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))
            self.register_buffer(f"{name}_bias", torch.randn(shape[0], generator=g))

    def pair(self, x: Tensor, scale: float, zero: int) -> Tensor:
        if self.dynamic:
            s, z = QD.choose_qparams(x, 0, 255, 2**-12, torch.uint8)
            codes = QD.quantize_per_tensor(x, s, z, 0, 255, torch.uint8)
            made: Tensor = QD.dequantize_per_tensor(codes, s, z, 0, 255, torch.uint8)
            return made
        codes = QD.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
        made = QD.dequantize_per_tensor(codes, scale, zero, 0, 255, torch.uint8)
        return made

    def weight(self, name: str) -> Tensor:
        param, scale, zero = (getattr(self, f"{name}_{p}") for p in ("param", "scale", "zero"))
        made: Tensor = QD.dequantize_per_channel(param, scale, zero, 0, -128, 127, torch.int8)
        return made

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(self.pair(x, 0.03, 128), self.weight("conv"), self.conv_bias, padding=1)
        h = F.avg_pool2d(torch.relu(h), 4).flatten(1)
        h = torch.relu(F.linear(self.pair(h, 0.01, 0), self.weight("l1"), self.l1_bias))
        return F.linear(self.pair(h, 0.02, 0), self.weight("l2"), self.l2_bias)


def exported(module: nn.Module, *shape: int) -> ExportedProgram:
    dims = {0: Dim("batch", min=2, max=64)}
    with torch.no_grad():
        return torch.export.export(module.eval(), (torch.randn(*shape),), dynamic_shapes=(dims,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_pt2e_model_runs_its_products_in_float(dynamic: bool, tmp_path: Path) -> None:
    path = tmp_path / "pt2e.pt2"
    torch.export.save(exported(Pt2e(dynamic), 2, 3, 16, 16), path)
    judged = verify_file(path, CPU)
    errors = [(f.code, f.op) for f in judged.findings if f.severity == "error"]
    assert errors == [("QC101", f"dequantize_per_channel{n}") for n in ("", "_1", "_2")]
    assert [(s.op, s.n, s.k, s.status) for s in judged.sites] == [
        ("conv", 8, 27, "unfused"),
        ("linear", 32, 128, "unfused"),
        ("linear", 16, 32, "unfused"),
    ]
    assert all(s.scheme == "int8" for s in judged.sites)


# -- tensor classes --------------------------------------------------------------------------------------------------


class Codes(Tensor):
    """A weight of int8 codes in a class of its own, as torchao writes them."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:  # type: ignore[misc]
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> Codes:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes.detach(), args[0].scale.detach())
        wide = pytree.tree_map(lambda a: a.codes.to(torch.float32) * a.scale if isinstance(a, cls) else a, args)
        return func(*wide, **(kwargs or {}))


def wrapped() -> nn.Module:
    module = nn.Sequential(nn.Linear(64, 32, bias=False))
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (32, 64), dtype=torch.int8, generator=g)
    module[0].weight = nn.Parameter(Codes(codes, torch.rand(32, 1, generator=g)), requires_grad=False)
    return module


def test_a_tensor_class_is_judged_by_what_it_does() -> None:
    graph = load(exported(wrapped(), 2, 64))
    held = {v.name: str(v.tensor.dtype) for v in graph.consts.values()}
    assert held == {f"0.parametrizations.weight.original{i}": kind for i, kind in enumerate(("int8", "f32"))}
    (found,) = examine(graph, CPU).findings
    assert found.code == "QC101"
    assert f"of a {__name__}.Codes" in found.message


def test_a_module_of_tensor_classes_is_written_and_judged() -> None:
    import qcompiler

    report = qcompiler.verify(wrapped(), target="torch-cpu", args=(torch.randn(2, 64),), run=False)
    assert not report.accepted
    assert [f.code for f in report.findings] == ["QC101"]


# -- libraries that are not here -------------------------------------------------------------------------------------


def renamed(path: Path, old: str, new: str) -> Path:
    """A copy of an archive in which operators have another name."""
    out = path.with_name("renamed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as copy:
        for info in source.infolist():
            data = source.read(info)
            copy.writestr(info, data.replace(old.encode(), new.encode()) if info.filename.endswith(".json") else data)
    return out


def test_an_operator_that_nobody_registered(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(Pt2e(False), 2, 3, 16, 16), path)
    absent = renamed(path, "quantized_decomposed.dequantize_per_channel", "somebodys.dequantize_per_channel")
    with pytest.raises(InputError):
        open_program(absent)
    judged = verify_file(absent, CPU)
    assert [f.code for f in judged.findings] == ["QC101"]
    assert "somebodys.dequantize_per_channel" in judged.findings[0].message


def test_a_damaged_program_is_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(nn.Linear(8, 8), 2, 8), path)
    with pytest.raises(InputError):
        verify_file(renamed(path, "aten.linear", "aten.lin/ear"), CPU)


def test_a_pickled_tensor_class_is_named_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(wrapped(), 2, 64), path)
    judged = verify_file(path, CPU)
    assert ("QC101", "0.weight") in {(f.code, f.op) for f in judged.findings}
    assert "Codes" in judged.findings[0].message


# -- torchao itself --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    quantization.quantize_(model, getattr(quantization, config)())
    with torch.no_grad():
        graph = load(torch.export.export(model, (torch.randn(2, 128),)))
    found = find_unfused(graph)
    assert {f.code for f in found} == {"QC101"}
    assert len(found) == 2
    assert all("of a torchao." in f.message for f in found)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_torchaos_pt2e_flow(dynamic: bool, tmp_path: Path) -> None:
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    home = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = home.X86InductorQuantizer()
    quantizer.set_global(home.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32)).eval()
    x = (torch.randn(2, 3, 8, 8),)
    prepared = flow.prepare_pt2e(torch.export.export(model, x).module(), quantizer)
    prepared(*x)
    torch.export.save(torch.export.export(flow.convert_pt2e(prepared), x), tmp_path / "pt2e.pt2")
    judged = verify_file(tmp_path / "pt2e.pt2", CPU)
    assert len([s for s in judged.sites if s.status == "unfused"]) == 2
