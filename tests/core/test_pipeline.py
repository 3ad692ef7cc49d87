"""The loop around passes: what it checks after each one, and what it says when one goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from qcompiler import debug
from qcompiler.errors import InputError, StructureError
from qcompiler.ir import Graph, Op, Value
from qcompiler.pipeline import Context, Pass, PassFailed, run
from qcompiler.reader import parse
from qcompiler.rewrite import Rewriter, apply_rules, rule

TEXT = """\
graph @main dialect=onnx {
  input %x : f32[4]
  %a : f32[4] = onnx.Relu(%x) loc("first")
  %y : f32[4] = onnx.Neg(%a)
  return %y
}
"""


@dataclass(frozen=True)
class Do(Pass):
    """A pass that does what the test says."""

    name: ClassVar[str] = "do"
    what: Callable[[Graph], object] = lambda g: None

    def run(self, graph: Graph, ctx: Context) -> None:
        self.what(graph)


def broken(g: Graph) -> None:
    op = next(iter(g))
    op.set_operand(0, g.outputs[0])


def renamed(g: Graph) -> None:
    g.rename(g.outputs[0], "other")


def crashing(g: Graph) -> None:
    raise ZeroDivisionError("nothing to divide")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (broken, r"pass 1 \(do\): operand 0, %y, is not defined before this op"),
        (renamed, r"pass 1 \(do\): the inputs and outputs were .*'y'.*'other'"),
        (crashing, r"pass 1 \(do\): ZeroDivisionError: nothing to divide"),
    ],
)
def test_a_pass_that_goes_wrong_is_named(what: Callable[[Graph], None], why: str) -> None:
    with pytest.raises(PassFailed, match=why):
        run(parse(TEXT), [Do(), Do(what)], Context())


def test_what_a_pass_says_to_the_user_is_passed_on() -> None:
    def fault(g: Graph) -> None:
        raise InputError("give another model")

    with pytest.raises(InputError, match="give another model"):
        run(parse(TEXT), [Do(fault)], Context())


def test_dumps_show_the_graph_after_each_pass(tmp_path: Path) -> None:
    run(parse(TEXT), [Do(), Do()], Context(), [debug.DumpHook(tmp_path / "dump")])
    found = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert found == ["00-input.qir", "01-do.qir", "02-do.qir"]
    assert (tmp_path / "dump" / "00-input.qir").read_text() == TEXT


def test_a_repro_file_reads_back(tmp_path: Path) -> None:
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError as e:
        path = debug.write_repro(e, TEXT, "dce", tmp_path)
    text = path.read_text()
    assert "ZeroDivisionError: why" in text
    assert "qcompiler run" in text
    assert len(parse(text)) == 2


def test_rules_that_never_end_are_stopped() -> None:
    @rule("onnx.Relu")
    def again(op: Op, rw: Rewriter) -> Value:
        """relu(x)  ->  relu(x)"""
        return rw.op("onnx.Relu", op.operand(0), type=op.result.type)

    with pytest.raises(StructureError, match="rules do not come to an end: again"):
        apply_rules(parse(TEXT), [again])


def test_a_declined_rule_leaves_nothing_behind() -> None:
    @rule("onnx.Relu")
    def halfway(op: Op, rw: Rewriter) -> Value:
        """builds something, then sees that it cannot"""
        rw.op("onnx.Neg", op.operand(0), type=op.result.type)
        raise rw.declined("not today", code="QC203", fix="ask again")

    graph, log = parse(TEXT), []  # type: ignore[var-annotated]
    assert apply_rules(graph, [halfway], log=log) == 0
    assert [op.name for op in graph] == ["onnx.Relu", "onnx.Neg"]
    assert [(r.rule, r.op, r.reason.message) for r in log] == [("halfway", "first", "not today")]
