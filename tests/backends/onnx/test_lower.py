"""What the entry points write: names, order, refusals, laziness, and one stored copy of a tied table."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from qcompiler.backends.chips import detect_features
from qcompiler.backends.onnx.activations import int8_activations
from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.kernels import CPU_ROWS, target
from qcompiler.backends.onnx.lower import block_size, matmul_nbits
from qcompiler.dtypes import BOOL, F16, F32, INT8, UINT8, Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, TensorType
from qcompiler.payload import Computation, Payload, computed, constant
from qcompiler.scheme import parse_scheme
from qcompiler.target import DECODE, PREFILL, Choice
from tests.backends.onnx.proof import embedding, linear, lower, run, table, tied

needs_avx2 = pytest.mark.skipif("avx2" not in detect_features(), reason="the rows need AVX2 and this chip has none")


def _names(graph: Graph) -> list[str]:
    return [op.name.rpartition(".")[2] for op in graph]


# -- names and order ---------------------------------------------------------------------------------------------


def test_node_and_constants_carry_the_name_of_the_site() -> None:
    graph = lower(linear(table("int4 g32 asym", 8, 64), bias=np.ones(8, np.float32)))
    (node,) = list(graph)
    assert node.loc.name == node.label == "head"
    names = [None if v is None else v.name for v in node.operands]
    assert names == ["x", "head.weight_q4", "head.weight_scales", "head.weight_zeros", None, "bias"]
    assert [*graph.consts] == ["bias", "head.weight_q4", "head.weight_scales", "head.weight_zeros"]
    assert node.attrs == {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}
    assert node.result.type == TensorType(F32, ("m", 8))


def test_symmetric_codes_need_no_zeros_and_trailing_operands_are_left_out() -> None:
    (node,) = list(lower(linear(table("int8 g32 sym", 8, 64))))
    assert len(node.operands) == 3


def test_unsigned_symmetric_codes_say_that_zero_is_0() -> None:
    """The kernel's default would be the middle code."""
    graph = lower(linear(table("uint4 g32 sym", 8, 64)))
    zeros = graph.consts["head.weight_zeros"].payload
    assert zeros is not None
    np.testing.assert_array_equal(zeros.array(), np.zeros((8, 1), np.uint8))


def test_a_forced_kernel_is_obeyed() -> None:
    (node,) = list(lower(linear(table("int4 g32 sym", 8, 64)), kernel="ort-cpu/MatMulNBits.fp32"))
    assert node.attrs["accuracy_level"] == 0


def test_phases_that_want_two_kernels_in_one_node_are_refused() -> None:
    row = target("ort-cpu:avx2").row
    split = Choice(((DECODE, row("ort-cpu/MatMulNBits.int8")), (PREFILL, row("ort-cpu/MatMulNBits.fp32"))))
    (op,) = list(linear(table("int4 g32 sym", 8, 64)))
    with pytest.raises(InputError, match=r"fp32 \(prefill\)"):
        matmul_nbits(op, split)


def _choice(kernel: str) -> Choice:
    return Choice(((DECODE, target("ort-cpu:avx2").row(kernel)),))


def test_weights_that_are_no_constants_are_refused() -> None:
    graph = linear(table("int8 g32 sym", 8, 64))
    (op,) = list(graph)
    op.set_operand(1, graph.add_input("w", TensorType(INT8, (8, 64))))
    with pytest.raises(InputError, match="codes %w is no constant"):
        matmul_nbits(op, _choice("ort-cpu/MatMulNBits.int8"))


def test_a_scale_of_another_type_than_the_activation_is_refused() -> None:
    graph = linear(table("int8 g32 sym", 8, 64))
    (op,) = list(graph)
    op.set_operand(0, graph.add_input("h", TensorType(F16, ("m", 64))))
    with pytest.raises(InputError, match="scale of the activation's type f16, not f32"):
        matmul_nbits(op, _choice("ort-cpu/MatMulNBits.int8"))


def test_indices_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match="int32 or int64 indices, not int8"):
        lower(embedding(table("int8 g32 sym", 8, 64), indices=INT8))


@pytest.mark.parametrize(
    ("scheme", "k", "allowed", "block"),
    [
        ("int4 g64", 4096, {16, 32, 64, 128, 256}, 64),
        ("int4 g256", 4096, {16, 32, 64, 128, 256}, 256),
        ("int8 g128", 64, {16, 32, 64, 128, 256}, 64),
        ("int8 g128", 192, {16, 32, 64, 128, 256}, 64),
        ("int4 g128", 896, {16, 32, 64, 128, 256}, 128),
        ("int8 channel", 4096, {16, 32, 64, 128, 256}, 128),
        ("int8 channel", 64, {16, 32, 64, 128, 256}, 64),
        ("int4 tensor", 3, {16, 32, 64, 128, 256}, 16),
        ("int8 channel", 192, {16, 32, 64, 128, 256}, 64),
        ("int2 channel", 3, {32, 64, 128}, 32),
        ("int4 channel", 4096, {32}, 32),
    ],
)
def test_the_block_of_a_row(scheme: str, k: int, allowed: set[int], block: int) -> None:
    assert block_size(parse_scheme(scheme), k, frozenset(allowed)) == block


# -- nothing is read before it is written ------------------------------------------------------------------------


class _Quantizer:
    """A computation of codes, scales and zeros that counts how often it runs."""

    def __init__(self, n: int, k: int) -> None:
        self.runs = 0
        self.table = t = table("int4 g32 asym", n, k)
        assert t.zero is not None
        shapes = [(t.scheme.dtype, (n, k)), (F32, t.scale.shape), (t.scheme.dtype, t.zero.shape)]
        self.payloads: tuple[Payload, ...] = Computation("quantizer", self._fn, [], shapes).outputs()

    def _fn(self) -> list[Array]:
        self.runs += 1
        assert self.table.zero is not None
        return [self.table.codes, self.table.scale, self.table.zero]


def test_lowering_reads_nothing_and_writing_reads_once() -> None:
    source = _Quantizer(16, 256)
    graph = linear(source.table)
    for name, payload in zip(("codes", "scale", "zero"), source.payloads, strict=True):
        graph.consts[name].payload = payload
    lower(graph)
    assert source.runs == 0
    to_model(graph)
    assert source.runs == 1


# -- a tied table ------------------------------------------------------------------------------------------------


@needs_avx2
@pytest.mark.parametrize(
    "scheme", ["int8 g32 sym", "int8 channel asym", "int4 g128 asym", "int4 g16 sym", "uint8 g64 sym"]
)
@pytest.mark.parametrize("k", [256, 250])
@pytest.mark.parametrize("head_first", [False, True], ids=["embedding first", "head first"])
def test_a_tied_table_is_stored_once_and_fused_by_both(scheme: str, k: int, head_first: bool) -> None:
    """Codes have one initializer; neither node expands the table; both give the numbers of a table of their own."""
    v = 96
    t = table(scheme, v, k)
    graph = lower(tied(t, head_first=head_first))
    packed = [c for c in graph.consts.values() if ".weight_q" in c.name]
    assert len(packed) == 1
    assert {op.loc.name for op in packed[0].users} == {"embed", "head"}
    (gather,) = [op for op in graph if op.loc.name == "embed"]
    assert gather.meta["shares"] == packed[0].name
    (head,) = [op for op in graph if op.loc.name == "head"]

    rng = np.random.default_rng(0)
    ids, x = rng.integers(-v, v, (2, 3)), rng.standard_normal((3, k)).astype(np.float32)
    seen = run(graph, [{"i": ids, "x": x}])
    assert seen.fallbacks == 0
    assert seen.temp[0]["embed"] == 0
    assert seen.temp[0]["head"] < v * k * 4 / 8, "3 rows of int8 activations, not the table"
    y, e = seen.outputs[0] if head_first else seen.outputs[0][::-1]
    np.testing.assert_array_equal(e, t.values[ids].astype(np.float32))
    # The bound of test_kernels: K float32 products of codes and zero points that are summed apart.
    seen_x = int8_activations(x, head.attrs["block_size"])
    bound = (k + 4) * 2.0**-24 * (np.abs(seen_x) @ t.stored_magnitude.T)
    assert np.all(np.abs(y - seen_x @ t.values.T) <= bound)


def test_a_table_of_its_own_stays_in_plain_rows() -> None:
    graph = lower(embedding(table("int4 g32 asym", 8, 64)))
    assert _names(graph) == ["GatherBlockQuantized"]
    assert graph.consts["embed.weight_q4"].type == TensorType(UINT8, (8, 32))


def test_a_tied_table_under_indices_of_unknown_rank_is_stored_twice() -> None:
    graph = tied(table("int8 g32 sym", 8, 64))
    graph.inputs[0].type = TensorType(graph.inputs[0].tensor.dtype, None)
    lower(graph)
    assert _names(graph) == ["GatherBlockQuantized", "MatMulNBits"]
    assert sorted(n for n in graph.consts if "_q8" in n) == ["embed.weight_q8", "head.weight_q8"]


def test_rows_whose_codes_do_not_fill_bytes_are_cut() -> None:
    assert _names(lower(embedding(table("int4 g16 sym", 3, 17)))) == ["GatherBlockQuantized", "Slice"]


def test_names_taken_already_are_stepped_around() -> None:
    graph = linear(table("int8 g32 sym", 8, 64))
    graph.add_const("head.weight_q8", constant(np.zeros(1, np.float32)))
    (node,) = list(lower(graph))
    assert node.operands[1] is graph.consts["head.weight_q8_1"]


def test_every_row_names_an_entry_and_a_layout_that_exist() -> None:
    for row in CPU_ROWS:
        for spot in (row.entry, row.layout or row.entry):
            module, _, name = spot.partition(":")
            assert callable(getattr(importlib.import_module(module), name)), spot


def test_a_lazy_payload_is_not_kept_alive_by_the_canonical_one() -> None:
    """The canonical constants leave the graph; their bytes stay reachable through what was derived from them."""
    t = table("int8 g32 sym", 8, 64)
    graph = linear(t)
    graph.consts["codes"].payload = computed("late", lambda: t.codes, [], INT8, (8, 64))
    lower(graph)
    assert "codes" not in graph.consts
    packed = graph.consts["head.weight_q8"].payload
    assert packed is not None
    np.testing.assert_array_equal(packed.array().reshape(8, 64), t.codes.view(np.uint8) + np.uint8(128))


@needs_avx2
def test_a_bias_may_be_computed() -> None:
    t = table("int8 g32 sym", 8, 64)
    graph = linear(t, bias=np.zeros(8, np.float32))
    (op,) = list(graph)
    op.set_operand(4, graph.add_input("late_bias", TensorType(F32, (8,))))
    lower(graph)
    x, b = np.ones((2, 64), np.float32), np.arange(8, dtype=np.float32) * 100
    (with_bias,), (without,) = run(graph, [{"x": x, "late_bias": b}, {"x": x, "late_bias": b * 0}]).outputs
    # Float32 sums of magnitude under 800: the last addition is off by at most 800 2^-24 in each of the two.
    np.testing.assert_allclose(with_bias - without, np.broadcast_to(b, (2, 8)), rtol=0, atol=1e-4)


def test_a_layer_inside_a_subgraph_shares_the_constants_of_the_outer_one() -> None:
    """New constants stand beside the canonical codes, where every branch sees them."""
    outer = Graph()
    t = table("int8 g32 sym", 8, 64)
    codes = outer.add_const("codes", constant(t.codes))
    scale = outer.add_const("scale", constant(t.scale))
    x = outer.add_input("x", TensorType(F32, (1, 64)))
    branch_op = outer.create(
        "onnx.If", [outer.add_input("c", TensorType(BOOL, ()))], {}, [("y", TensorType(F32, (1, 8)))]
    )
    for key in ("then_branch", "else_branch"):
        branch = outer.add_region(branch_op, key)
        attrs = {"scheme": t.scheme, "site": f"head.{key}"}
        made = branch.create("q.linear", [x, codes, scale], attrs, [(f"y.{key}", TensorType(F32, (1, 8)))])
        branch.add_output(made.result)
    outer.add_output(branch_op.result)
    lower(outer)
    assert [*outer.consts] == ["head.then_branch.weight_q8", "head.then_branch.weight_scales"]
    for made in outer.consts.values():
        assert {op.label for op in made.users} == {"head.then_branch", "head.else_branch"}
