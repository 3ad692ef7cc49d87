"""Writes in place and views of aten graphs: what becomes functional, what stays, and what a write may still change."""

from qcompiler.functional import drop_checks, make_functional, share_views, unsteady
from qcompiler.ir import Graph
from qcompiler.reader import parse
from qcompiler.spec import check


def graph_of(body: str, returns: str = "%y") -> Graph:
    return parse(
        f"""graph @main dialect=aten {{
          input %x: f32[2, 4]
          const %w: f32[4, 4] = rand:1
          {body}
          return {returns}
        }}"""
    )


def names(graph: Graph) -> list[str]:
    check(graph)
    return [op.name.removeprefix("aten.") for op in graph]


LINEAR = "%a: f32[2, 4] = aten.linear.default(%x, %w) {args = [$0, $1]}\n"
RELU_ = '%r: f32[2, 4] = aten.relu_.default(%a) {args = [$0]} meta {effect = "write"}\n'


def test_a_write_becomes_a_value_that_later_readers_take() -> None:
    graph = graph_of(LINEAR + RELU_ + "%y: f32[2, 4] = aten.add.Tensor(%a, %r) {args = [$0, $1]}")
    assert make_functional(graph) == 1
    assert names(graph) == ["linear.default", "relu.default", "add.Tensor"]
    add = list(graph)[-1]
    assert [v.name for v in add.operands if v is not None] == ["r", "r"]
    assert not unsteady(graph)


def test_readers_before_the_write_keep_what_they_read() -> None:
    graph = graph_of(LINEAR + "%b: f32[2, 4] = aten.mul.Tensor(%a) {args = [$0, 2.0]}\n" + RELU_, "%b, %a")
    assert make_functional(graph) == 1
    assert [v.name for v in graph.outputs] == ["b", "r"]
    assert [v.name for v in list(graph)[1].operands if v is not None] == ["a"]


def test_one_write_after_another() -> None:
    more = '%s: f32[2, 4] = aten.add_.Tensor(%r, %x) {args = [$0, $1]} meta {effect = "write"}\n'
    graph = graph_of(LINEAR + RELU_ + more, "%s, %a")
    assert make_functional(graph) == 2
    assert names(graph) == ["linear.default", "relu.default", "add.Tensor"]
    assert [v.name for v in graph.outputs] == ["s", "s"]


def test_what_others_may_see_is_left() -> None:
    """A view taken before, an argument of the caller, and a result of another type."""
    view = "%v: f32[8] = aten.view.default(%a) {args = [$0, [8]]}\n"
    graph = graph_of(LINEAR + view + RELU_, "%v")
    assert make_functional(graph) == 0
    assert {v.name for v in unsteady(graph)} == {"a", "v", "r"}
    graph = graph_of('%y: f32[2, 4] = aten.relu_.default(%x) {args = [$0]} meta {effect = "write"}')
    assert make_functional(graph) == 0
    assert {v.name for v in unsteady(graph)} == {"x", "y"}
    wide = '%d: f64[2, 4] = aten.to.dtype(%x) {args = [$0, torch.dtype"float64"]}\n'
    graph = graph_of(
        LINEAR + wide + '%y: f32[2, 4] = aten.add_.Tensor(%a, %d) {args = [$0, $1]} meta {effect = "write"}'
    )
    assert make_functional(graph) == 0


def test_equal_views_are_one() -> None:
    twice = "".join(f"%v{i}: f32[8] = aten.view.default(%x) {{args = [$0, [{n}]]}}\n" for i, n in enumerate((8, 8, -1)))
    graph = graph_of(twice + "%y: f32[8] = aten.add.Tensor(%v0, %v1) {args = [$0, $1]}", "%y, %v2")
    assert share_views(graph) == 1
    assert names(graph) == ["view.default", "view.default", "add.Tensor"]


def test_checks_of_known_types_go() -> None:
    args = '{args = [$0, none, none, torch.dtype"DTYPE"]} meta {effect = "check"}'
    said = f"aten._assert_tensor_metadata.default(%x) {args}\n"
    body = said.replace("DTYPE", "float32") + said.replace("DTYPE", "float64") + LINEAR
    graph = graph_of(body, "%a")
    assert drop_checks(graph) == 1
    assert names(graph) == ["_assert_tensor_metadata.default", "linear.default"]
