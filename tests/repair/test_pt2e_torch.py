"""Repair of exported torch programs that other tools have quantized, against what the programs themselves compute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import recipe
from qcompiler.backends.torch import kernels
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.running import runnable
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.pipeline import Context, run
from qcompiler.spec import check
from qcompiler.target import Target
from tests.repair.torch_nets import Blocks, Dynamic, Inductor, Table, Written

EXACT = 1e-6
"""Share of the largest output: the program sums in f32, the reference in f64."""
HALF_STEP = 0.03
"""Where the rounding of activations changes: half a step of 1/127 of a range of 3 to 4 sigma is 1.4 % of one sigma a
product; the largest outputs are 2 to 3 sigma, and the worst of a hundred is 3 of theirs."""
SCALES = 2**-8
"""Scales that are rounded to 8 bits move each weight by at most 2**-9; sums of 64 of them by less than twice that."""


def rows() -> Target:
    """torch-cpu as on a chip with VNNI."""
    full = kernels.target("torch-cpu")
    return Target("torch-cpu", "", full.features | {"x86_64", "vnni"}, full.rows, "aten", full.absent)


STEPS = tuple(p for p in recipe.load("repair").passes if p.name != "choose-layout")


def lifted(module: nn.Module, *args: Tensor) -> tuple[Graph, Context, float]:
    """The graph as repair has it before a layout is chosen, and how far off its outputs are (share of the largest)."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), args)
        want: Any = module(*args)
    graph, ctx = load(program), Context(rows())
    names = [v.name for v in graph.inputs if v.payload is None]
    run(graph, STEPS, ctx)
    check(graph)
    with runnable(graph, []) as call:
        found = call({n: a.numpy() for n, a in zip(names, args, strict=True)})
    got = [found[v.name].astype(np.float64) for v in graph.outputs]
    wide = [w.double().numpy() for w in (want if isinstance(want, tuple) else (want,))]
    return graph, ctx, max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, wide, strict=True))


def ours(graph: Graph) -> Counter[str]:
    """The ops on codes; no op of another spelling is left."""
    left = [op.name for op in graph.walk() if op.name.startswith(("quantized_decomposed.", "torchao."))]
    assert not left
    return Counter(op.name for op in graph.walk() if op.name.startswith("q."))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
PICTURE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_static_codes_between_products(dtype: torch.dtype) -> None:
    """int8 activations become uint8, exactly; the last Relu goes into the codes of the product before it."""
    graph, ctx, off = lifted(Inductor(dtype), PICTURE)
    assert off <= EXACT
    assert ours(graph) == {"q.quantize": 2, "q.conv": 1, "q.linear_static": 2}
    assert {op.attrs["x_scheme"].text for op in graph if "x_scheme" in op.attrs} == {"uint8 tensor asym"}
    assert [(s.n, s.k) for s in ctx.ledger] == [(8, 27), (32, 128), (10, 32)]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "most"),
    [(0, 255, torch.uint8, EXACT), (-128, 127, torch.int8, EXACT), (0, 127, torch.uint8, HALF_STEP)],
)
def test_dynamic_codes(low: int, high: int, dtype: torch.dtype, most: float) -> None:
    graph, ctx, off = lifted(Dynamic(low, high, dtype), X[:, :32])
    assert off <= most
    assert ours(graph) == {"q.linear_dyn": 2}
    assert any("8 bits over their whole range" in note for note in ctx.notes) == (high == 127 and low == 0)


def test_blocks_of_four_bits() -> None:
    graph, ctx, off = lifted(Blocks(), X)
    assert off <= SCALES
    assert ours(graph) == {"q.linear": 1}
    (site,) = ctx.ledger
    assert site.scheme == "int4 g32 asym"
    assert "rounded to 8 significant bits" in str(site.reason)
    graph, ctx, off = lifted(Blocks(token=True), X)
    assert off <= HALF_STEP + SCALES
    assert ours(graph) == {"q.linear": 1}


@pytest.mark.parametrize(
    ("kind", "scheme", "most"),
    [
        ("promoted", "int8 channel sym", EXACT),
        ("middle", "int8 channel sym", EXACT),
        ("integers", "int8 channel sym", EXACT),
        ("turned", "int8 channel sym", EXACT),
        ("scaled behind", "int8 tensor sym", EXACT),
        ("nibbles", "int4 g32 sym", SCALES),
        ("nibbles with zeros", "uint4 g32 asym", SCALES),
    ],
)
def test_arithmetic_on_codes(kind: str, scheme: str, most: float) -> None:
    graph, ctx, off = lifted(Written(kind), X)
    assert off <= most
    assert ours(graph) == {"q.linear": 1}
    assert [s.scheme for s in ctx.ledger] == [scheme]


@pytest.mark.parametrize("kind", ["whole", "rows"])
def test_tables(kind: str) -> None:
    graph, _, off = lifted(Table(kind), torch.tensor([[0, 19, 3], [7, 7, 1]]))
    assert off == 0
    assert ours(graph) == {"q.embedding": 1}


def test_a_float_model_is_no_case_for_repair() -> None:
    with pytest.raises(InputError, match="nothing quantized"):
        lifted(nn.Linear(4, 4), torch.randn(2, 4))


# -- torchao's ops, by name --------------------------------------------------------------------------------------

AFFINE = (
    "quantize_affine(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, ScalarType output_dtype, "
    "int? quant_min=None, int? quant_max=None) -> Tensor",
    "dequantize_affine(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, ScalarType input_dtype, "
    "int? quant_min=None, int? quant_max=None, *, ScalarType output_dtype=float) -> Tensor",
    "choose_qparams_affine(Tensor input, str mapping_type, SymInt[] block_size, ScalarType target_dtype, "
    "int? quant_min=None, int? quant_max=None, float? eps=None) -> (Tensor, Tensor)",
)


@pytest.fixture
def torchao() -> Any:
    """Ops of torchao's names and schemas with its semantics, where the package itself has not defined them."""
    if hasattr(torch.ops.torchao, "dequantize_affine"):
        yield torch.ops.torchao
        return
    library = torch.library.Library("torchao", "FRAGMENT")
    for schema in AFFINE:
        library.define(schema)

    def spread(p: Tensor, x: Tensor, block: list[int]) -> Tensor:
        full = p.reshape([d // b for d, b in zip(x.shape, block, strict=True)])
        for axis, b in enumerate(block):
            full = full.repeat_interleave(b, axis)
        return full

    def quantize(x, block, scale, zero, dtype, low=None, high=None):  # type: ignore[no-untyped-def]
        s, z = spread(scale, x, block), 0 if zero is None else spread(zero, x, block)
        return (torch.round(x / s) + z).clamp(low, high).to(dtype)

    def dequantize(c, block, scale, zero, dtype, low=None, high=None, *, output_dtype=torch.float32):  # type: ignore[no-untyped-def]
        z = 0 if zero is None else spread(zero, c, block)
        return ((c.to(torch.float32) - z) * spread(scale, c, block)).to(output_dtype)

    def choose(x, mapping, block, dtype, low=None, high=None, eps=None):  # type: ignore[no-untyped-def]
        least, most = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = (most - least) / (high - low)
        return scale, (low - torch.round(least / scale)).to(torch.int32)

    for name, fn in (
        ("quantize_affine", quantize),
        ("dequantize_affine", dequantize),
        ("choose_qparams_affine", choose),
    ):
        library.impl(name, fn, "CompositeExplicitAutograd")
    yield torch.ops.torchao
    library._destroy()


class Affine(nn.Module):
    """int8 weights a channel or int4 in blocks of 32; the activation as it is, or with a scale a token."""

    def __init__(self, ao: Any, block: int, token: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.ao, self.block, self.token = ao, block, token
        self.low, self.high = (-8, 7) if block == 32 else (-127, 127)
        codes = torch.randint(self.low, self.high + 1, (16, 64), generator=generator)
        self.register_buffer("w", codes.to(torch.int8))
        self.register_buffer("s", (1 + torch.randint(0, 64, (16, 64 // block), generator=generator)) / 2**12)

    def forward(self, x: Tensor) -> Tensor:
        if self.token:
            how = ([1, 64], torch.int8)
            scale, zero = self.ao.choose_qparams_affine(x, "ASYMMETRIC", *how, -128, 127)
            codes = self.ao.quantize_affine(x, how[0], scale, zero, torch.int8, -128, 127)
            x = self.ao.dequantize_affine(codes, how[0], scale, zero, torch.int8, -128, 127)
        w = self.ao.dequantize_affine(
            self.get_buffer("w"), [1, self.block], self.get_buffer("s"), None, torch.int8, self.low, self.high
        )
        return nn.functional.linear(x, w)


@pytest.mark.parametrize(("block", "token"), [(64, False), (32, False), (32, True)])
def test_affine_ops_of_torchao(torchao: Any, block: int, token: bool) -> None:
    graph, ctx, off = lifted(Affine(torchao, block, token), X)
    assert off <= (HALF_STEP if token else EXACT)
    assert ours(graph) == {"q.linear": 1}
    assert [s.scheme for s in ctx.ledger] == ["int4 g32 sym" if block == 32 else "int8 channel sym"]


# -- from file to file -------------------------------------------------------------------------------------------


@pytest.mark.skipif("vnni" not in kernels.target("torch-cpu").features, reason="its kernels need a chip with VNNI")
def test_a_program_whose_products_run_in_float_is_rejected_and_repaired(tmp_path: Path) -> None:
    module = Inductor().eval()
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (PICTURE,)), tmp_path / "source.pt2")
        want = module(PICTURE)
    before = qcompiler.verify(str(tmp_path / "source.pt2"), target="torch-cpu")
    assert not before.accepted
    assert {f.code for f in before.findings if f.severity == "error"} == {"QC101"}
    made = tmp_path / "repaired.pt2"
    artifact = qcompiler.compile(str(tmp_path / "source.pt2"), target="torch-cpu", recipe="repair", out=str(made))
    assert [s.status for s in artifact.report.sites] == ["fused"] * 3
    assert {k for s in artifact.report.sites for k in s.kernel.values()} == {
        "torch-cpu/qconv.u8s8",
        "torch-cpu/qlinear.u8s8",
    }
    got = artifact(PICTURE)
    got = got[0] if isinstance(got, (tuple, list)) else got
    assert float((torch.as_tensor(got) - want).abs().max() / want.abs().max()) <= EXACT
    assert qcompiler.verify(str(made), target="torch-cpu").accepted
