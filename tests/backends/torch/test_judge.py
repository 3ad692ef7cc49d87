"""The static verdict: accepted graphs as they are, and every way in which one is broken is found with its op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompiler import dtypes
from qcompiler.backends.torch.conditions import CONDITIONS, WIDTH
from qcompiler.backends.torch.judge import examine, judge_graph, sites_of
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.nodes import PLACES
from qcompiler.backends.torch.nodes_triton import SLOTS
from qcompiler.backends.torch.stored import check_stored
from qcompiler.dtypes import BF16, F32, INT8
from qcompiler.ir import Atom, Graph, Hole, Op, TensorType, Value
from qcompiler.payload import constant
from tests.backends.torch.lowered import HIDDEN, RECIPES, SITES, WORDS, at, lowered
from tests.backends.torch.lowered import WIDTH as COLUMNS

CPU = target("torch-cpu")
ROWS = {
    "w4a16": ("gather", "int4pack", "int4pack", "int8pack"),
    "w8a16": ("gather", "int8pack", "int8pack", "int8pack"),
    "w8a8-dynamic": ("gather", "qlinear.u8s8", "qlinear.u8s8", "qlinear.u8s8"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_lowered_graph_is_accepted(recipe: str) -> None:
    seen = examine(lowered(recipe), CPU)
    assert not seen.findings
    sites = {s.name: s for s in seen.sites}
    assert tuple(sites) == SITES
    assert all(s.status == "fused" for s in sites.values())
    assert tuple(s.kernel["prefill"] for s in sites.values()) == tuple(f"torch-cpu/{r}" for r in ROWS[recipe])
    shapes = [(s.op, s.n, s.k) for s in sites.values()]
    assert shapes == [
        ("embedding", WORDS, COLUMNS),
        ("linear", HIDDEN, COLUMNS),
        ("linear", COLUMNS, HIDDEN),
        ("linear", WORDS, COLUMNS),
    ]
    assert sites["head"].tied_to == "emb"


def test_stored_bytes_are_those_of_the_constants() -> None:
    graph = lowered("w4a16")
    sites = {s.name: s.bytes for s in sites_of(graph)}
    assert sites["emb"] == {"codes": WORDS * COLUMNS, "scales": WORDS * 4, "zeros": 0}
    # 100 rows are padded to 112; a pair of bf16 for each row of a group.
    assert sites["up"] == {"codes": 112 * COLUMNS // 2, "scales": 112 * 2, "zeros": 112 * 2}


# -- mutants ---------------------------------------------------------------------------------------------------------


def with_args(op: Op, **changed: Any) -> None:
    args = list(op.attrs["args"])
    for key, value in changed.items():
        args[int(key.removeprefix("a"))] = value
    op.attrs["args"] = tuple(args)


def const(graph: Graph, name: str, array: Any, element: Any = None) -> Value:
    return graph.add_const(graph.fresh(name), constant(array, element))


def float_activation(graph: Graph, site: str) -> None:
    """The kernel reads the activation before it was cast."""
    op = at(graph, site)
    x = op.operand(0)
    assert x is not None
    x.type = TensorType(F32, x.tensor.shape)


def group(graph: Graph, site: str) -> None:
    with_args(at(graph, site), a2=48)


def few_rows(graph: Graph, site: str) -> None:
    op = at(graph, site)
    op.set_operand(1, const(graph, "short", np.zeros((WORDS, 32), np.uint8)))


def ragged_columns(graph: Graph, site: str) -> None:
    """Codes of 100 columns, not padded to 112."""
    op = at(graph, site)
    op.set_operand(1, const(graph, "ragged", np.ones((COLUMNS, HIDDEN), np.int8)))


def other_width(graph: Graph, site: str) -> None:
    notes = dict(graph.meta["metadata"])
    notes[WIDTH] = "avx2" if notes[WIDTH] == "avx512" else "avx512"
    graph.meta["metadata"] = tuple(notes.items())


def given_codes(graph: Graph, site: str) -> None:
    """The codes come from outside."""
    op = at(graph, site)
    slot = 0 if "embedding" in op.name else 3 if op.name.startswith("qcompiler") else 1
    codes = op.operand(slot)
    assert codes is not None
    op.set_operand(slot, graph.add_input(graph.fresh("given"), codes.type))


def called(name: str) -> Callable[[Graph, str], None]:
    def mutate(graph: Graph, site: str) -> None:
        at(graph, site).name = name

    return mutate


def signed(graph: Graph, site: str) -> None:
    op = at(graph, site)
    x = op.operand(0)
    assert x is not None
    x.type = TensorType(INT8, x.tensor.shape)


def expanded(graph: Graph, site: str) -> None:
    """The kernel is a float product again, on a weight that is dequantized before it."""
    op = at(graph, site)
    codes = const(graph, "codes8", np.ones((op.result.tensor.shape[1], 64), np.int8))  # type: ignore[index]
    floats = TensorType(BF16, codes.tensor.shape)
    attrs = {"args": (Hole(0), Atom("torch.dtype", "bfloat16"))}
    cast = graph.create("aten.to.dtype", [codes], attrs, [(graph.fresh("wide"), floats)], before=op)
    op.name, op.attrs = "aten.linear.default", {"args": (Hole(0), Hole(1))}
    op.set_operands([op.operand(0), cast.result])


def expanded_table(graph: Graph, site: str) -> None:
    op = at(graph, site)
    table, ids = op.operands
    assert table is not None
    attrs = {"args": (Hole(0), Atom("torch.dtype", "float32"))}
    kind = TensorType(F32, table.tensor.shape)
    cast = graph.create("aten.to.dtype", [table], attrs, [(graph.fresh("wide"), kind)], before=op)
    op.set_operands([cast.result, ids])
    op.result.type = TensorType(F32, op.result.tensor.shape)


def named_dequantize(graph: Graph, site: str) -> None:
    expanded(graph, site)
    next(op for op in graph if op.results and op.result.name.startswith("wide")).name = "some.lib_dequantize.default"


def unpacked_onednn(graph: Graph, site: str) -> None:
    at(graph, site).name = "onednn.qlinear_pointwise.tensor"


def packed_each_time(graph: Graph, site: str) -> None:
    op = at(graph, site)
    codes = op.operand(3)
    assert codes is not None
    pack = graph.create(
        "onednn.qlinear_prepack.default",
        [codes],
        {"args": (Hole(0), None)},
        [(graph.fresh("p"), codes.type)],
        before=op,
    )
    op.name = "onednn.qlinear_pointwise.tensor"
    op.set_operand(3, pack.result)


def fp8(graph: Graph, site: str) -> None:
    op = at(graph, site)
    x = op.operand(0)
    assert x is not None
    packed_each_time(graph, site)
    x.type = TensorType(dtypes.TABLE["f8e4m3"], x.tensor.shape)


MUTANTS: dict[str, tuple[str, str, Callable[[Graph, str], None], str]] = {
    "int4 on f32": ("w4a16", "up", float_activation, "QC201"),
    "int4 in groups of 48": ("w4a16", "up", group, "QC202"),
    "int4 of 50 rows": ("w4a16", "up", few_rows, "QC203"),
    "int4 of another chip": ("w4a16", "up", other_width, "QC205"),
    "int4 given": ("w4a16", "down", given_codes, "QC104"),
    "int4 for CUDA": ("w4a16", "up", called("aten._weight_int4pack_mm.default"), "QC201"),
    "int4 expanded": ("w4a16", "up", expanded, "QC101"),
    "int4 dequantized": ("w4a16", "up", named_dequantize, "QC101"),
    "int4 by reference code": ("w4a16", "up", called("aten._dyn_quant_matmul_4bit.default"), "QC206"),
    "int8 on f32": ("w8a16", "up", float_activation, "QC201"),
    "int8 ragged": ("w8a16", "down", ragged_columns, "QC203"),
    "int8 given": ("w8a16", "down", given_codes, "QC104"),
    "int8 by nobody's op": ("w8a16", "up", called("some.fused_linear.default"), "QC104"),
    "a table expanded": ("w8a16", "emb", expanded_table, "QC101"),
    "integers, signed": ("w8a8-dynamic", "up", signed, "QC201"),
    "integers, not packed": ("w8a8-dynamic", "up", unpacked_onednn, "QC205"),
    "integers, packed each time": ("w8a8-dynamic", "up", packed_each_time, "QC205"),
    "fp8": ("w8a8-dynamic", "up", fp8, "QC206"),
    "integers, given": ("w8a8-dynamic", "down", given_codes, "QC104"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_breaks_it_is_found(name: str) -> None:
    recipe, site, mutate, code = MUTANTS[name]
    graph = lowered(recipe)
    mutate(graph, site)
    found = [f for f in judge_graph(graph, CPU) if f.severity == "error"]
    assert code in {f.code for f in found}
    worst = next(f for f in found if f.code == code)
    assert worst.op in (site, "wide")
    assert worst.reason and worst.fix
    status = {s.name: s.status for s in examine(graph, CPU).sites}
    assert status[site] == "unfused"
    # Tied or lowered beside it, the others are what they were; a chip's packing is wrong for all of them.
    others = {n for n, s in status.items() if s == "unfused"} - {site}
    assert others <= ({"down"} if mutate is other_width else set())


def test_an_fp8_product_expands_its_weight() -> None:
    graph = lowered("w8a16")
    op = at(graph, "up")
    op.name = "aten._scaled_mm.default"
    f8 = dtypes.TABLE["f8e4m3"]
    codes = const(graph, "f8", np.ones((COLUMNS, HIDDEN)), f8)
    op.set_operand(1, codes)
    found = judge_graph(graph, CPU)
    assert [(f.code, f.op) for f in found] == [("QC104", "up")]
    assert "expands" in found[0].message


def test_targets_without_rows() -> None:
    seen = examine(lowered("w4a16"), target("torch-cuda"))
    assert {f.code for f in seen.findings} == {"QC206"}
    assert all(s.status == "unfused" for s in seen.sites)


def test_a_float_graph_has_no_sites() -> None:
    seen = examine(lowered("w4a16"), CPU)
    assert seen.nodes
    plain = examine(lowered('insert-qdq{match = ["*"], weights = "int4 g32 sym", skip = ["*"]}'), CPU)
    assert not plain.nodes
    assert not plain.findings


def test_scales_that_are_no_numbers() -> None:
    graph = lowered("w8a8-dynamic")
    op = at(graph, "up")
    op.set_operand(4, const(graph, "nan", np.array([np.nan] + [1.0] * (HIDDEN - 1), np.float32)))
    (found,) = check_stored(examine(graph, CPU))
    assert (found.code, found.op, found.severity) == ("QC302", "up", "error")


def test_every_condition_names_operators_that_are_read() -> None:
    known = set(PLACES) | set(SLOTS) | {"quantized.linear_dynamic_fp16_unpacked_weight"}
    for condition in CONDITIONS:
        assert condition.ops <= known
        assert condition.fix


def test_judging_changes_nothing() -> None:
    graph = lowered("w4a16")
    before = [(op.name, copy.copy(op.operands)) for op in graph.walk()]
    judge_graph(graph, CPU)
    assert before == [(op.name, op.operands) for op in graph.walk()]
