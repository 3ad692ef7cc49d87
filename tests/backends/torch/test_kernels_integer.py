"""Every integer row: the lowered call runs in torch on ragged shapes, is right, and expands no weight."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.kernels_integer import CPU_ABSENT, INTEGER_ROWS, QCONV, QLINEAR, runs_with
from qcompiler.dtypes import BF16, F16, F32, F64, Array, DType
from qcompiler.ir import Attr
from qcompiler.requests import request_of
from tests.backends.onnx.integer import Case, codes, conv, linear_dyn, linear_static, scales, scheme, wrong, zero
from tests.backends.torch.integer import ANY_CHIP, aten, narrowed, ran

SOME = settings(max_examples=12, deadline=None, derandomize=True)
HALF = {BF16: 2.0**-8, F16: 2.0**-11}
"""Half a step of the last place, relative: what rounding the result to that type may cost."""


def runs_right(case: Case, kernel: str, element: DType = F32) -> None:
    """The kernel's call is there under the site's name, and its numbers are within what the row states."""
    done = ran(case)
    name = kernel.partition("/")[2].partition(".")[0]
    made = [op for op in done.graph if op.name == f"qcompiler.{name}.default"]
    assert [op.loc.name for op in made] == [case.attrs["site"]], [op.name for op in done.graph]
    labels = [op.label for op in done.graph]
    assert len(set(labels)) == len(labels)
    assert wrong(case, done.result) <= 1 if element is F32 else nearly(case, done.result, HALF[element])
    assert done.graph.outputs[0].tensor.dtype == aten(case).outputs[0].tensor.dtype


def nearly(case: Case, got: Array, step: float) -> bool:
    """``got`` is the reference rounded once; a value on a tie of the rounding may go either way."""
    if "y_scheme" in case.attrs:
        return wrong(case, got) <= 1
    wide = Case(case.name, [a if a is None or a.dtype.kind in "iu" else a.astype(np.float64) for a in case.arrays], {})
    if case.attrs["x_scheme"].dynamic:
        wide.arrays[0] = None if case.arrays[0] is None else case.arrays[0].astype(np.float32)
    real = numerics.evaluate(case.name, wide.arrays, case.attrs).astype(np.float64)
    return bool((np.abs(got - real) <= 1.01 * step * np.abs(real) + 1e-5 * np.abs(real).max(initial=0.0) + 1e-7).all())


@st.composite
def lead(draw: Callable, most: int = 3) -> tuple[int, ...]:  # type: ignore[type-arg]
    return tuple(draw(st.lists(st.integers(1, 5), max_size=most)))


ELEMENTS = st.sampled_from([F32, F32, BF16, F16])
WEIGHTS = st.sampled_from(["int8 channel sym", "int8 tensor sym"])


@SOME
@given(data=st.data())
def test_static_linear(data: st.DataObject) -> None:
    draw = data.draw
    x = draw(st.sampled_from(["uint8 tensor asym", "uint8 tensor sym"]))
    y = draw(st.sampled_from([None, "uint8 tensor asym", "uint8 tensor sym"]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, k, element = draw(st.integers(1, 70)), draw(st.integers(1, 150)), draw(ELEMENTS)
    case = linear_static(rng, n, k, draw(lead()), x=x, w=draw(WEIGHTS), y=y, bias=draw(st.booleans()))
    runs_right(narrowed(case, element), QLINEAR, element)


@SOME
@given(data=st.data())
def test_dynamic_linear(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, k, element = draw(st.integers(1, 70)), draw(st.integers(1, 150)), draw(ELEMENTS)
    case = linear_dyn(rng, n, k, draw(lead()), w=draw(WEIGHTS), bias=draw(st.booleans()))
    runs_right(narrowed(case, element), QLINEAR, element)


@st.composite
def convolution(draw: Callable, dynamic: bool, coded: bool) -> Case:  # type: ignore[type-arg]
    axes, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    per, each = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):  # depthwise
        group, per = draw(st.sampled_from([4, 7, 16])), 1
    some = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, strides, dilations = draw(some), draw(some), draw(some)
    attrs: dict[str, Attr] = {"group": group, "strides": tuple(strides)}
    how = draw(st.sampled_from(["even", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "none"]))
    if how == "even":
        attrs["pads"] = tuple(draw(st.lists(st.integers(0, 2), min_size=axes, max_size=axes)) * 2)
    elif how == "pads":
        attrs["pads"] = tuple(draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes)))
    elif how != "none":
        attrs["auto_pad"] = how
    if not how.startswith("SAME"):
        attrs["dilations"] = tuple(dilations)
    size = [(k - 1) * d + draw(st.integers(1, 6)) for k, d in zip(kernel, dilations, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = draw(st.sampled_from(["uint8 tensor asym", "uint8 tensor sym"]))
    shape = (group * each, group * per, kernel, size)
    return conv(rng, *shape, x=x, w=draw(WEIGHTS), bias=draw(st.booleans()), dynamic=dynamic, coded=coded, attrs=attrs)


@pytest.mark.parametrize("kind", ["dynamic", "floats", "codes"])
@SOME
@given(data=st.data())
def test_convolution(kind: str, data: st.DataObject) -> None:
    case, element = data.draw(convolution(kind == "dynamic", kind == "codes")), data.draw(ELEMENTS)
    runs_right(narrowed(case, element), QCONV, element)


# -- edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [F32, BF16, F16])
@pytest.mark.parametrize("text", ["uint8 tensor asym", "uint8 tensor sym", "int8 tensor asym"])
def test_edges_are_the_reference_to_the_bit(text: str, element: DType) -> None:
    s, rng = scheme(text), np.random.default_rng(0)
    floats, given_ = rng.standard_normal((3, 5)).astype(element.storage), [scales(rng), zero(rng, s)]
    back = Case("q.dequantize", [codes(rng, s, (3, 5)), *given_], {"scheme": s})
    np.testing.assert_array_equal(ran(back).result, back.wanted)
    if s.dtype.name == "uint8":
        case = Case("q.quantize", [floats, *given_], {"scheme": s})
        np.testing.assert_array_equal(ran(case).result, case.wanted)
    factors = rng.uniform(0.5, 2, 5).astype(np.float32)
    scaled = Case("q.scale", [floats, factors], {})
    np.testing.assert_array_equal(ran(scaled).result, scaled.wanted.astype(np.float32))


def test_every_row_stands_in_one_of_these_tests() -> None:
    products = {"q.linear_static", "q.linear_dyn", "q.conv", "q.conv_dyn"}
    edges = {"q.quantize", "q.dequantize", "q.choose_qparams", "q.scale"}
    assert sorted(r.op for r in INTEGER_ROWS) == sorted(products | edges)
    assert {op for op, _ in CPU_ABSENT} == {"q.matmul", "q.apply"}


# -- what declines -------------------------------------------------------------------------------------------


def reasons(case: Case, spec: str = ANY_CHIP) -> list[str]:
    return [f"{r.code} {r.message}; {r.fix}" for r in target(spec).why_not(request_of(next(iter(aten(case)))))]


def test_what_has_no_row_says_why() -> None:
    rng = np.random.default_rng(0)
    assert reasons(linear_static(rng, 4, 8)) == reasons(linear_dyn(rng, 4, 8)) == []
    (found,) = reasons(linear_static(rng, 4, 8, x="int8 tensor asym"))
    assert found == f"QC201 {QLINEAR} takes uint8 activations, not int8; use uint8"
    (found,) = reasons(linear_static(rng, 4, 8, w="int8 channel asym"))
    assert found.startswith("QC204") and "zero points" in found
    (found,) = reasons(linear_static(rng, 4, 8, w="uint8 channel sym"))
    assert found.startswith(f"QC201 {QLINEAR} takes int8 codes, not uint8")
    (found,) = reasons(linear_static(rng, 4, 8, y="int8 tensor asym"))
    assert found.startswith(f"QC201 {QLINEAR} gives float or uint8 results, not int8")
    case = linear_dyn(rng, 4, 8)
    case.attrs["x_scheme"] = scheme("uint8 token asym dynamic")
    (found,) = reasons(case)
    assert "per tensor, not per token; the nearest is 'uint8 tensor asym dynamic'" in found
    (found,) = reasons(narrowed(linear_dyn(rng, 4, 8), F64))
    assert "takes bf16, f16, f32 activations, not f64" in found


@pytest.mark.parametrize("chip", ["avx2", "avx512", "sse", "arm64"])
def test_chips_that_saturate_are_refused(chip: str) -> None:
    """Without VNNI products of 16 bits saturate: measured by holding oneDNN down to AVX2 and to AVX-512."""
    case = linear_dyn(np.random.default_rng(0), 4, 8)
    assert any(r.startswith("QC206") and "vnni" in r for r in reasons(case, f"torch-cpu:{chip}"))


def test_a_chip_that_is_held_down_is_refused_where_it_compiles_and_where_it_runs() -> None:
    vnni = frozenset({"x86_64", "vnni"})
    assert runs_with(vnni, {}) == runs_with(vnni, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}) == vnni
    assert runs_with(vnni, {"ONEDNN_MAX_CPU_ISA": "avx2"}) == {"x86_64"}
    code = (
        "import torch; from qcompiler.backends.torch.packing import linear_weight as pack, conv_weight as conv\n"
        "from qcompiler.errors import InputError\n"
        "for call in (lambda: pack(torch.zeros(3, 4, dtype=torch.int8)),\n"
        "             lambda: conv(torch.zeros(3, 4, 1, dtype=torch.int8), [1], [0], [1], 1)):\n"
        "    try: call(); print('packed')\n"
        "    except InputError as e: print(e)\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert len(lines) == 2 and all("its products saturate in 16 bits" in line for line in lines), out


# -- memory --------------------------------------------------------------------------------------------------


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at most while ``run`` runs."""

    def field(name: str) -> int:
        line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    run()
    return field("VmHWM") - before


@pytest.mark.parametrize("m", [1, 64])
def test_no_weight_is_expanded(m: int) -> None:
    """A weight of 16 MiB; its floats would take 64, a reordered copy 16."""
    n = k = 4096
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=g)
    args = (torch.tensor(0.02), torch.tensor(3, dtype=torch.uint8), weight, torch.ones(n), None, 1.0, 0, torch.float32)
    torch.ops.qcompiler.qlinear(x, *args)  # packs
    assert peak_above(lambda: torch.ops.qcompiler.qlinear(x, *args)) <= 4 * m * n + (4 << 20)


def test_no_weight_of_a_convolution_is_expanded() -> None:
    """A weight of 9 MiB; its floats would take 36, a reordered copy 9."""
    weight = torch.randint(-128, 128, (1024, 1024, 3, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    x = torch.full((1, 1024, 4, 4), 7, dtype=torch.uint8)
    where = ([1, 1], [1, 1], [1, 1], 1)
    args = (torch.tensor(0.02), torch.tensor(3, dtype=torch.uint8), weight, torch.ones(1024), None, *where)
    torch.ops.qcompiler.qconv(x, *args, 1.0, 0, torch.float32)  # packs
    assert peak_above(lambda: torch.ops.qcompiler.qconv(x, *args, 1.0, 0, torch.float32)) <= 4 << 20
