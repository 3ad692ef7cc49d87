"""What the weight-only entry points write: names, order, laziness, refusals, open sizes, one copy of a tied table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler import recipe
from qcompiler.backends.chips import detect_features
from qcompiler.backends.torch import layouts, lower
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.export import export_program
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.payload import tensor_of
from qcompiler.dtypes import F32, INT8, Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, TensorType
from qcompiler.passes.choose_layout import ChooseLayout
from qcompiler.payload import ComputedPayload, Payload, computed, constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import parse_scheme
from qcompiler.spec import check
from qcompiler.speeds import slower_notes
from qcompiler.target import PHASES, Phase
from qcompiler.text import show
from tests.backends.torch import proof
from tests.support import Golden

needs_avx2 = pytest.mark.skipif("avx2" not in detect_features(), reason="the rows need AVX2 and this chip has none")

MIXED = """
graph @main dialect=aten {
  input %i : int64[b, s]
  const %table : int8[6, 24] = rand:1
  const %ts : f32[6, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0)
  const %wq : int4[8, 24] = rand:2
  const %ws : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
  const %wz : int4[8, 1] = rand:3
  const %b : f32[8] = dense(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
  %x : f32[b, s, 24] = q.embedding(%i, %table, %ts) {scheme = <int8 channel sym axis=1>, site = "embed"} loc("emb")
  %q : f32[b, s, 8] = q.linear(%x, %wq, %ws, %wz, %b) {scheme = <int4 g32 asym axis=1>, site = "q_proj"} loc("q")
  %k : f32[b, s, 8] = q.linear(%x, %wq, %ws, %wz) {scheme = <int4 g32 asym axis=1>, site = "k_proj"} loc("k")
  %y : f32[b, s, 6] = q.linear(%x, %table, %ts) {scheme = <int8 channel sym axis=1>, site = "head"} loc("head")
  return %q, %k, %y
}
"""


def ops(graph: Graph, name: str) -> list[Op]:
    return [op for op in graph.walk() if op.name == name]


def test_the_lowered_graph_as_text(golden: Golden) -> None:
    graph = parse(MIXED)
    check(graph)
    run(graph, [ChooseLayout()], Context(target("torch-cpu:avx512vnni")))
    text = show(graph)
    assert show(parse(text)) == text
    golden("torch/weight_only.qir", text)


def test_the_cast_of_an_activation_is_shared_and_a_tied_table_is_stored_once() -> None:
    graph = proof.lower(parse(MIXED), "torch-cpu:avx2")
    assert len(ops(graph, "aten.to.dtype")) == 1 + 1 + 3  # codes of the lookup, rows for three layers, three results
    tables = [v for v in graph.consts.values() if v.tensor.dtype == INT8]
    assert [v.tensor.shape for v in tables] == [(6, 32)]
    assert {u.name for u in tables[0].users} == {"aten.embedding.default", "aten._weight_int8pack_mm.default"}
    (packed,) = (v for v in graph.consts.values() if v.name.endswith("weight_int4_avx2"))  # two layers read it
    assert len(packed.users) == 2
    assert dict(graph.meta["metadata"]) == {lower.WIDTH: "avx2"}


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("k", [32, 40])
def test_both_kernels_read_the_same_codes(head_first: bool, k: int) -> None:
    t = proof.table("int8 channel sym", 9, k)
    graph = proof.lower(proof.tied(t, head_first=head_first))
    ids, x = np.array([[1, 8, 1]]), np.random.default_rng(0).standard_normal((4, k)).astype(np.float32)
    held = [v.tensor.shape for v in graph.consts.values() if v.tensor.dtype == INT8]
    assert held == [(9, layouts.padded(k, 16))]
    found = dict(
        zip(
            [o.tensor.rank for o in graph.outputs],
            proof.run(graph, *([x, ids] if head_first else [ids, x])),
            strict=True,
        )
    )
    assert np.array_equal(found[3], t.values.astype(np.float32)[ids])
    if "avx2" in detect_features():
        assert np.allclose(found[2], x @ t.values.T, rtol=0, atol=0.05 * np.abs(t.values).sum(1).max())


def test_the_call_that_runs_the_kernel_is_called_like_the_site() -> None:
    graph = proof.lower(parse(MIXED), "torch-cpu:avx2")
    assert [op.loc.name for op in ops(graph, "aten._weight_int4pack_mm_for_cpu.default")] == ["q_proj", "k_proj"]
    assert [op.loc.name for op in ops(graph, "aten._weight_int8pack_mm.default")] == ["head"]
    assert [op.loc.name for op in ops(graph, "aten.embedding.default")] == ["embed", "embed.scale"]


def test_lowering_reads_nothing() -> None:
    def fail(*_: Payload) -> Array:
        raise AssertionError("a weight was read")

    for text in ("int4 g32 asym", "int8 channel sym"):
        t = proof.bf16_table(text, 20, 64, F32)
        graph = proof.linear(t)
        for v in graph.consts.values():
            assert v.payload is not None
            v.payload = computed("unread", fail, [], v.payload.dtype, v.payload.shape)
        proof.lower(graph, "torch-cpu:avx2")
        assert all(isinstance(v.payload, ComputedPayload) or "ones" in v.name for v in graph.consts.values())


@pytest.mark.parametrize("text", ["int4 g32 sym", "int8 channel sym"])
def test_codes_that_are_no_constants_are_refused(text: str) -> None:
    graph = Graph("main", "aten")
    scheme = parse_scheme(text).with_axis(1)
    x = graph.add_input("x", TensorType(F32, (2, 32)))
    codes = graph.add_input("codes", TensorType(scheme.dtype, (16, 32)))
    scale = graph.add_const("scale", constant(np.ones((16, 1), np.float32)))
    attrs = {"scheme": scheme, "site": "fc"}
    made = graph.create("q.linear", [x, codes, scale], attrs, [("y", TensorType(F32, (2, 16)))])
    graph.add_output(made.result)
    with pytest.raises(InputError, match="'fc': the codes %codes is no constant"):
        proof.lower(graph)


def test_the_block_of_the_fewest_bytes() -> None:
    def block(text: str, k: int) -> int:
        return lower.int4_block(parse_scheme(text), k)

    assert block("int4 g128 asym", 4096) == 128
    assert block("int4 g1024 asym", 4096) == 256
    assert block("int4 channel sym", 4096) == 256
    assert block("int4 g128 asym", 200) == 128  # 2 * (64 + 4) bytes; 7 blocks of 32 take 140
    assert block("int4 g128 asym", 33) == 64
    assert block("int4 tensor sym", 20) == 32


# -- from a module and back -----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.q = nn.Linear(40, 40)
        self.k = nn.Linear(40, 24, bias=False)
        self.o = nn.Linear(24, 40)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.o(torch.relu(self.k(x))) + self.q(x))  # type: ignore[no-any-return]


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_a_recipe_on_a_module_with_open_sizes(name: str, dtype: torch.dtype) -> None:
    """What comes out is a program of torch alone, exported again with the same open sizes, in the model's own type."""
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    dims = ({0: Dim("b"), 1: Dim("s")},)
    first, second = torch.randint(0, 50, (2, 5)), torch.randint(0, 50, (3, 9))
    graph = load(export_program(net, (first,), dims))
    ctx = Context(target("torch-cpu"))
    run(graph, recipe.load(name).passes, ctx)
    assert {s.status for s in ctx.ledger} == {"fused"}
    assert not [op for op in graph.walk() if op.name.startswith(("q.", "qcompiler."))]
    again = export_program(to_graph_module(graph), (first,), dims)
    with torch.no_grad():
        made, want = again.module()(second), net(second)
    assert made.dtype == dtype
    assert made.shape == want.shape
    loss = float((made.double() - want.double()).norm() / want.double().norm())
    assert loss < (0.12 if name == "w4a16" else 0.03)  # 0.07 and 0.010 measured: rounding of the weights, then bf16


@needs_avx2
def test_the_canonical_parameters_come_back_from_the_program() -> None:
    """The bits that every other target has: those of the quantizer on the same weight under the same scheme."""
    torch.manual_seed(1)
    net = Net().eval()
    graph = load(export_program(net, (torch.zeros(1, 4, dtype=torch.int64),)))
    run(graph, recipe.load("w4a16").passes, Context(target("torch-cpu:avx2")))
    held = {v.name: v.payload.array() for v in graph.consts.values() if v.payload is not None}
    for name, (n, k) in {"q": (40, 40), "k": (24, 40), "o": (40, 24)}.items():
        scheme = parse_scheme("int4 g128 asym").with_axis(1)
        want = quantize_weight(net.get_submodule(name).weight.detach().numpy(), scheme)
        nibbles = layouts.int4unpack(held[f"{name}.weight_int4_avx2"], "avx2")
        assert np.array_equal(layouts.codes_of(nibbles, n, k, signed=True), want.codes)
        stored = held[f"{name}.weight_scales_zeros"]
        scale, zero = layouts.parameters_of(stored, scheme, (n, 1), lower.int4_block(scheme, k))
        assert np.array_equal(scale, want.scale)
        assert want.zero is not None
        assert zero is not None
        assert np.array_equal(zero, want.zero)
    table = quantize_weight(net.embed.weight.detach().numpy(), parse_scheme("int8 channel sym").with_axis(0))
    assert np.array_equal(layouts.int8unpack(held["embed.weight_int8"], 40), table.codes)
    assert np.array_equal(held["head.weight_scales"], table.scale)


@needs_avx2
def test_padding_and_scales_travel_as_torch_holds_them() -> None:
    graph = proof.lower(proof.linear(proof.bf16_table("uint4 channel sym", 20, 50, F32)), "torch-cpu")
    held = {v.name.partition(".")[2]: tensor_of(v.payload) for v in graph.consts.values() if v.payload is not None}
    (packed,) = (t for name, t in held.items() if name.startswith("weight_int4_"))
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (32, 32))
    assert (held["weight_scales_zeros"].dtype, tuple(held["weight_scales_zeros"].shape)) == (torch.bfloat16, (1, 32, 2))


# -- what the report says of speed -----------------------------------------------------------------------------


def test_a_kernel_that_is_slower_than_the_float_op_is_noted() -> None:
    graph = load(export_program(Net().to(torch.bfloat16).eval(), (torch.zeros(1, 4, dtype=torch.int64),)))
    ctx = Context(target("torch-cpu:avx512vnni"))
    run(graph, recipe.load("w4a16").passes, ctx)
    assert slower_notes(ctx.ledger, target("torch-cpu:avx512vnni"), PHASES) == [
        "1 site: torch-cpu/gather reaches 0.42 of the float op's speed at decode M=1 (bf16 activations)",
        "1 site: torch-cpu/gather reaches 0.55 of the float op's speed at prefill M=512 (bf16 activations)",
        "3 sites: torch-cpu/int4pack reaches 0.41 of the float op's speed at prefill M=512 (bf16 activations)",
        "1 site: torch-cpu/int8pack reaches 0.26 of the float op's speed at prefill M=512 (bf16 activations)",
    ]
    assert slower_notes(ctx.ledger, target("torch-cpu:avx512vnni"), [Phase("some", 4)]) == []
