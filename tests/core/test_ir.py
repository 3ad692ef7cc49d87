"""The graph container: order, use lists, names, regions, and what the structure check refuses."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.dtypes import F32, dtype
from qcompiler.errors import StructureError
from qcompiler.ir import Graph, Loc, Op, TensorType, Use, Value
from qcompiler.payload import constant
from qcompiler.scheme import parse_scheme
from qcompiler.spec import check

T = TensorType(F32, (2, 4))


def chain(length: int = 3) -> tuple[Graph, list[Op]]:
    g = Graph()
    v = g.add_input("x", T)
    ops = []
    for i in range(length):
        ops.append(g.create("onnx.Relu", [v], {}, [(f"y{i}", T)]))
        v = ops[-1].result
    g.add_output(v)
    return g, ops


def names(g: Graph) -> list[str]:
    return [op.results[0].name for op in g]


def test_insert_before_and_erase_keep_order_and_uses() -> None:
    g, ops = chain()
    new = g.create("onnx.Neg", [ops[0].result], {}, [("n", T)], before=ops[1])
    ops[1].set_operand(0, new.result)
    assert names(g) == ["y0", "n", "y1", "y2"]
    check(g)
    ops[1].set_operand(0, ops[0].result)
    new.erase()
    assert names(g) == ["y0", "y1", "y2"]
    assert len(g) == 3
    assert g.local("n") is None
    check(g)


def test_an_op_in_use_cannot_be_erased() -> None:
    _, ops = chain()
    with pytest.raises(StructureError, match="still has 1 uses"):
        ops[0].erase()


def test_iteration_survives_erasing_the_current_and_the_next_op() -> None:
    g, ops = chain(6)
    seen = []
    for op in g:
        seen.append(op.result.name)
        if op is ops[1]:
            ops[4].set_operand(0, ops[0].result)
            ops[3].erase()
            ops[2].erase()
            op.erase()
    assert seen == ["y0", "y1", "y4", "y5"]
    check(g)


def test_replace_uses_reaches_regions_and_outputs() -> None:
    g, ops = chain(1)
    cond = g.add_input("c", TensorType(dtype("bool"), ()))
    branch_op = g.create("onnx.If", [cond], {}, [("z", T)])
    inner = g.add_region(branch_op, "then_branch")
    used = inner.create("onnx.Neg", [ops[0].result], {}, [("inner", T)])
    inner.add_output(used.result)
    other = g.create("onnx.Abs", [g.inputs[0]], {}, [("w", T)], before=ops[0])
    ops[0].result.replace_uses(other.result)
    assert used.operands == (other.result,)
    assert g.outputs == (other.result,)
    assert not ops[0].result.uses
    check(g)


def test_erasing_an_op_erases_what_its_regions_use() -> None:
    g, ops = chain(1)
    cond = g.add_input("c", TensorType(dtype("bool"), ()))
    branch = g.create("onnx.If", [cond], {}, [("z", T)])
    inner = g.add_region(branch, "then_branch")
    inner.add_output(inner.create("onnx.Neg", [ops[0].result], {}, [("inner", T)]).result)
    branch.erase()
    assert list(ops[0].result.uses) == [Use(g, 0)]


def test_fresh_names_avoid_every_visible_name() -> None:
    g, ops = chain()
    assert g.fresh("new") == "new"
    assert g.fresh("y0") == "y0_1"
    g.create("onnx.Neg", [ops[0].result], {}, [("y0_1", T)])
    assert g.fresh("y0") == "y0_2"
    with pytest.raises(StructureError, match="already has a value called %x"):
        g.add_input("x", T)


def test_fresh_names_avoid_those_inside_regions() -> None:
    g, _ = chain(1)
    op = g.create("onnx.If", [g.inputs[0]], {}, [("z", T)])
    region = g.add_region(op, "then_branch")
    region.add_output(region.create("onnx.Neg", [g.inputs[0]], {}, [("inner", T)]).result)
    g.add_const(g.fresh("inner"), constant(np.zeros(2, np.float32)))
    check(g)


def test_rename_moves_the_constant_table_along() -> None:
    g = Graph()
    c = g.add_const("c", constant(np.zeros(2, np.float32)))
    g.rename(c, "d")
    assert c.is_const
    assert list(g.consts) == ["d"]
    assert g.local("c") is None


# -- the structure check -------------------------------------------------------------------------------------


def test_check_refuses_a_use_before_its_definition() -> None:
    g, ops = chain()
    ops[0].set_operand(0, ops[2].result)
    with pytest.raises(StructureError, match=r"operand 0, %y2, is not defined before this op; in: %y0"):
        check(g)


def test_check_refuses_a_missing_use() -> None:
    g, ops = chain()
    del ops[0].result.uses[Use(ops[1], 0)]
    with pytest.raises(StructureError, match="the use list of %y0 misses operand 0"):
        check(g)


def test_check_refuses_shadowing_and_names_the_source_line() -> None:
    g, _ = chain(1)
    op = g.create("onnx.If", [g.inputs[0]], {}, [("z", T)], loc=Loc("n", "", "model.py:3"))
    region = g.add_region(op, "then_branch")
    region.add_output(region.create("onnx.Neg", [g.inputs[0]], {}, [("y0", T)]).result)
    with pytest.raises(StructureError, match="%y0 shadows"):
        check(g)
    g2, _ = chain(1)
    g2.create("q.nonsense", [g2.inputs[0]], {}, [("q", T)], loc=Loc("n", "", "model.py:3"))
    with pytest.raises(StructureError, match=r"no op q\.nonsense.*"):
        check(g2)


def test_check_refuses_a_payload_of_another_type() -> None:
    g = Graph()
    c = g.add_const("c", constant(np.zeros(2, np.float32)))
    c.type = T
    with pytest.raises(StructureError, match=r"declared f32\[2, 4\], its bytes are f32\[2\]"):
        check(g)


def linear(scheme: str, n: int = 8, k: int = 64, g: int = 2, zero: bool = True, codes: str = "int4") -> Graph:
    s = parse_scheme(scheme)
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, ("b", k)))
    element = dtype(codes)
    operands: list[Value | None] = [
        x,
        graph.add_const("w", constant(np.zeros((n, k)), element)),
        graph.add_const("s", constant(np.ones((n, g), np.float32))),
        graph.add_const("z", constant(np.zeros((n, g)), element)) if zero else None,
    ]
    y = graph.create("q.linear", operands, {"scheme": s, "site": "a"}, [("y", TensorType(F32, ("b", n)))])
    graph.add_output(y.result)
    return graph


def test_spec_of_linear_accepts_the_canonical_form() -> None:
    check(linear("int4 g32 asym axis=1"))
    check(linear("int4 g32 sym axis=1", zero=False))
    check(linear("int8 channel sym axis=1", zero=False, g=1, codes="int8"))


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (lambda: linear("int4 g32 asym axis=1", zero=False), "an asymmetric scheme has a zero point"),
        (lambda: linear("int4 g32 sym axis=1"), "a symmetric one has none"),
        (lambda: linear("int4 g32 asym axis=1", g=3), r"the scale has shape \[8, 3\], the scheme asks for \[8, 2\]"),
        (lambda: linear("int4 g32 asym axis=0"), "groups along K"),
        (lambda: linear("int8 g32 asym axis=1"), "codes are int4, the scheme says int8"),
    ],
)
def test_spec_of_linear_refuses(graph, why) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StructureError, match=why):
        check(graph())
