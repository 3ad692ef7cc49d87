"""The static rules, on graphs written as text: every dialect, every spelling, and what is no fault."""

from __future__ import annotations

import pytest

from qcompiler.reader import parse
from qcompiler.verify.op_kinds import is_dequantize, is_quantize
from qcompiler.verify.static import find_spelled_out, find_unfused

X = "input %x : f32[m, 64]"
CODES = "const %w : int8[64, 64] = rand:1\n  const %s : f32[64] = rand:2\n  const %one : f32[] = dense(0.1)"
DQ = '%f : f32[64, 64] = onnx.DequantizeLinear(%w, %s) {axis = 1} loc("dq")'
Q = """%q : int8[m, 64] = onnx.QuantizeLinear(%x, %one) loc("q")
  %d : f32[m, 64] = onnx.DequantizeLinear(%q, %one) loc("d")"""


def graph(*lines: str, dialect: str = "onnx") -> str:
    return f"graph @main dialect={dialect} {{\n  " + "\n  ".join(lines) + "\n  return %y\n}\n"


FAULTS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "direct": (
        graph(X, CODES, DQ, '%y : f32[m, 64] = onnx.MatMul(%x, %f) loc("mm")'),
        [("QC101", "dq", "error")],
    ),
    "moved": (
        graph(
            X,
            CODES,
            DQ,
            '%t : f32[64, 64] = onnx.Transpose(%f) {perm = [1, 0]} loc("t")',
            "%r : f32[64, 64] = onnx.Reshape(%t, %w)",
            '%y : f32[m, 64] = onnx.MatMul(%x, %r) loc("mm")',
        ),
        [("QC102", "dq", "error")],
    ),
    "lookup": (
        graph(
            "input %i : int64[m]",
            CODES,
            DQ,
            '%g : f32[m, 64] = onnx.Gather(%f, %i) loc("g")',
            "%y : f32[m, 64] = onnx.Relu(%g)",
        ),
        [("QC102", "dq", "error")],
    ),
    "codes moved first": (
        graph(
            X,
            CODES,
            "%t : int8[64, 64] = onnx.Transpose(%w) {perm = [1, 0]}",
            '%f : f32[64, 64] = onnx.DequantizeLinear(%t, %s) {axis = 0} loc("dq")',
            "%y : f32[m, 64] = onnx.MatMul(%x, %f)",
        ),
        [("QC101", "dq", "error")],
    ),
    "an output": (
        graph(X, CODES, '%y : f32[64, 64] = onnx.DequantizeLinear(%w, %s) {axis = 1} loc("dq")'),
        [("QC101", "dq", "error")],
    ),
    "in a branch": (
        graph(
            X,
            "input %c : bool[]",
            CODES,
            DQ,
            '%y : f32[m, 64] = onnx.If(%c) loc("if") regions {',
            "  then_branch = graph @t dialect=onnx {",
            '    %a : f32[m, 64] = onnx.MatMul(%x, %f) loc("inner")',
            "    return %a",
            "  }",
            "  else_branch = graph @e dialect=onnx {",
            "    %b : f32[m, 64] = onnx.Relu(%x)",
            "    return %b",
            "  }",
            "}",
        ),
        [("QC101", "dq", "error")],
    ),
    "a vector": (
        graph(
            X,
            "const %b : int32[64] = rand:3\n  const %s : f32[] = dense(0.1)",
            '%f : f32[64] = onnx.DequantizeLinear(%b, %s) loc("dq")',
            "%y : f32[m, 64] = onnx.Add(%x, %f)",
        ),
        [("QC101", "dq", "warning")],
    ),
    "torch": (
        graph(
            X,
            CODES,
            '%f : f32[64, 64] = quantized_decomposed.dequantize_per_channel.default(%w, %s) loc("dq")',
            "%t : f32[64, 64] = aten.t.default(%f)",
            '%y : f32[m, 64] = aten.mm.default(%x, %t) {args = [$0, $1]} loc("mm")',
            dialect="aten",
        ),
        [("QC102", "dq", "error")],
    ),
    "ours": (
        graph(
            X,
            CODES,
            '%f : f32[64, 64] = q.dequantize(%w, %s) {scheme = <int8 channel sym axis=0>} loc("dq")',
            '%y : f32[m, 64] = aten.linear.default(%x, %f) {args = [$0, $1]} loc("mm")',
            dialect="aten",
        ),
        [("QC101", "dq", "error")],
    ),
    "somebody else's": (
        graph(
            X,
            CODES,
            '%f : f32[64, 64] = some.lib.BlockDequantize(%w, %s) loc("dq")',
            "%y : f32[m, 64] = onnx.MatMul(%x, %f)",
        ),
        [("QC101", "dq", "error")],
    ),
    "spelled out": (
        graph(
            X,
            CODES,
            '%c : f32[64, 64] = onnx.Cast(%w) {to = 1} loc("cast")',
            "%f : f32[64, 64] = onnx.Mul(%c, %s)",
            "%y : f32[m, 64] = onnx.MatMul(%x, %f)",
        ),
        [("QC103", "cast", "error")],
    ),
    "spelled out in torch": (
        graph(
            X,
            CODES,
            '%c : f32[64, 64] = aten.to.dtype(%w) {args = [$0, dtype"f32"]} loc("cast")',
            "%f : f32[64, 64] = aten.mul.Tensor(%c, %s)",
            "%y : f32[m, 64] = aten.linear.default(%x, %f)",
            dialect="aten",
        ),
        [("QC101", "cast", "error")],
    ),
    "spelled out, scale known at run time": (
        graph(
            X,
            CODES,
            "input %z : f32[64]",
            '%c : f32[64, 64] = onnx.Cast(%w) {to = 1} loc("cast")',
            "%f : f32[64, 64] = onnx.Mul(%c, %z)",
            "%y : f32[m, 64] = onnx.MatMul(%x, %f)",
        ),
        [("QC101", "cast", "error")],
    ),
    "an island": (graph(X, CODES, Q, "%y : f32[m, 64] = onnx.Tanh(%d)"), [("QC105", "d", "error")]),
    "an island behind a kernel": (
        graph(
            "input %x : int8[m, 64]",
            CODES,
            "const %z : int8[] = dense(0)",
            "%q : int8[m, 64] = onnx.QLinearMatMul(%x, %one, %z, %w, %s, %z, %one, %z)",
            '%d : f32[m, 64] = onnx.DequantizeLinear(%q, %one) loc("d")',
            '%t : f32[m, 64] = onnx.Tanh(%d) loc("tanh")',
            "%y : int8[m, 64] = onnx.QuantizeLinear(%t, %one)",
        ),
        [("QC105", "d", "error")],
    ),
    "a pair": (graph(X, CODES, Q, "%y : int8[m, 64] = onnx.QuantizeLinear(%d, %one)"), [("QC107", "d", "error")]),
    "a pair around movement": (
        graph(X, CODES, Q, "%t : f32[64, m] = onnx.Transpose(%d)", "%y : int8[64, m] = onnx.QuantizeLinear(%t, %one)"),
        [("QC105", "d", "error")],
    ),
    "a pair at the end": (
        graph(
            X,
            CODES,
            '%q : int8[m, 64] = onnx.QuantizeLinear(%x, %one) loc("q")',
            '%y : f32[m, 64] = onnx.DequantizeLinear(%q, %one) loc("d")',
        ),
        [("QC107", "d", "warning")],
    ),
    "a cache": (
        graph(
            X,
            "input %past : int8[b, 64, 64]",
            CODES,
            '%d : f32[b, 64, 64] = onnx.DequantizeLinear(%past, %one) loc("d")',
            "%y : f32[b, m, 64] = onnx.MatMul(%x, %d)",
        ),
        [("QC101", "d", "error")],
    ),
    "experts picked first": (
        graph(
            X,
            "input %i : int64[]",
            "const %e : int8[8, 64, 64] = rand:1",
            CODES,
            "%g : int8[64, 64] = onnx.Gather(%e, %i)",
            '%d : f32[64, 64] = onnx.DequantizeLinear(%g, %one) loc("d")',
            "%y : f32[m, 64] = onnx.MatMul(%x, %d)",
        ),
        [("QC101", "d", "error")],
    ),
}

SOUND: dict[str, str] = {
    "float": graph(X, "const %w : f32[64, 64] = rand:1", "%y : f32[m, 64] = onnx.MatMul(%x, %w)"),
    "an integer kernel's exit": graph(
        "input %x : int8[m, 64]",
        CODES,
        "const %z : int8[] = dense(0)",
        "%q : int8[m, 64] = onnx.QLinearMatMul(%x, %one, %z, %w, %s, %z, %one, %z)",
        "%d : f32[m, 64] = onnx.DequantizeLinear(%q, %one)",
        "%y : f32[m, 64] = onnx.Softmax(%d)",
    ),
    "rows picked first": graph(
        "input %i : int64[m]",
        CODES,
        "%g : int8[m, 64] = onnx.Gather(%w, %i)",
        "%d : f32[m, 64] = onnx.DequantizeLinear(%g, %one)",
        "%y : f32[m, 64] = onnx.Relu(%d)",
    ),
    "a mask": graph(
        X,
        "const %mask : uint8[64, 64] = rand:1",
        "%c : f32[64, 64] = onnx.Cast(%mask) {to = 1}",
        "%y : f32[m, 64] = onnx.Mul(%x, %c)",
    ),
    "an image": graph(
        "input %x : uint8[m, 3, 8, 8]",
        CODES,
        "%d : f32[m, 3, 8, 8] = onnx.DequantizeLinear(%x, %one)",
        "%y : f32[m, 3, 8, 8] = onnx.Sub(%d, %one)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_left_over_is_found(name: str) -> None:
    text, expected = FAULTS[name]
    found = find_unfused(parse(text))
    assert [(f.code, f.op, f.severity) for f in found] == expected
    assert all(f.reason and f.fix for f in found)


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_fault(name: str) -> None:
    assert not find_unfused(parse(SOUND[name]))


def test_ops_that_the_runtime_fuses_are_passed_over() -> None:
    g = parse(FAULTS["direct"][0])
    product = next(op for op in g if op.label == "mm")
    assert not find_unfused(g, frozenset({product}))


def test_the_message_names_the_path_and_the_size() -> None:
    (found,) = find_unfused(parse(FAULTS["moved"][0]))
    assert "'t'" in found.message
    assert "MatMul 'mm'" in found.message
    assert "16384 bytes" in found.message


def test_only_arithmetic_is_spelled_out() -> None:
    assert not find_spelled_out(parse(FAULTS["direct"][0]))
    assert [f.code for f in find_spelled_out(parse(FAULTS["spelled out"][0]))] == ["QC103"]


def test_names_of_quantizing_ops() -> None:
    g = parse(
        graph(
            X,
            CODES,
            "%a : int8[m, 64] = onnx.QuantizeLinear(%x, %one)",
            "%b : f32[m, 64] = com.microsoft.DequantizeLinear(%a, %one)",
            "%c : f32[m, 64] = com.microsoft.DynamicQuantizeMatMul(%b, %w, %s)",
            "%d : int8[m, 64], %e : f32[], %h : int8[] = onnx.DynamicQuantizeLinear(%c)",
            "%y : f32[m, 64] = torchao.dequantize_affine.default(%d)",
        )
    )
    kinds = [(is_quantize(op), is_dequantize(op)) for op in g]
    assert kinds == [(True, False), (False, True), (False, False), (True, False), (False, True)]
