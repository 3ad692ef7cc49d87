"""Every CPU row: the lowered node runs in ONNX Runtime, its numbers are right, and its weight is never expanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qcompiler.backends.chips import CHIPS, detect_features, features_of
from qcompiler.backends.onnx.activations import int8_activations
from qcompiler.backends.onnx.kernels import CPU_ROWS, CUDA_ROWS, accuracy_level, target
from qcompiler.dtypes import BF16, F16, F32, INT32, INT64, Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.scheme import parse_scheme
from qcompiler.target import DECODE, KernelRow, Request
from tests.backends.onnx.proof import Table, embedding, linear, lower, run, table

AVX2 = "avx2" in detect_features()
needs_avx2 = pytest.mark.skipif(not AVX2, reason="the rows need AVX2 and this chip has none")

SIZES = ((1, 3), (17, 501), (5, 200), (96, 512))
"""N and K: the least, odd ones with a short last block, groups that are split into blocks, and whole blocks."""
MS = (1, 3, 17, 300)


def _schemes(row: KernelRow) -> list[str]:
    """Every kind of code, group and zero point that the row takes, as scheme texts; of unsigned codes some groups."""
    sizes = [f"g{g}" for g in sorted(row.groups)] + ["channel", "tensor"]
    zeros = {"none": "sym", "int": "asym"}
    some = {f"g{min(row.groups)}", "g128", "channel"}
    pairs = [(c, s) for c in sorted(row.codes) for s in sizes if c.startswith("int") or s in some]
    return [f"{c} {s} {zeros[z]}" for c, s in pairs for z in sorted(row.zeros)]


LINEAR = [(r.name, s) for r in CPU_ROWS if r.op == "q.linear" for s in _schemes(r)]
TABLES = [s for r in CPU_ROWS if r.op == "q.embedding" for s in _schemes(r)]


def _only_node(graph: Graph, name: str) -> dict[str, Any]:
    found = [op for op in graph if op.name == name]
    assert len(found) == 1, f"{name} is there {len(found)} times"
    return found[0].attrs


def _expected(t: Table, x: Array, bias: Array | None, level: int, block: int) -> tuple[NDArray, NDArray]:
    """The product in float64, and the magnitude of what the kernel sums in float32 for each result.

    Where activations are int8, the kernels add ``code * a`` and ``-zero * sum(a)`` apart, with unsigned codes.
    """
    seen = int8_activations(x, block) if level == 4 else x.astype(np.float64)
    extra = 0.0 if bias is None else bias.astype(np.float64)
    terms = t.stored_magnitude if level == 4 else np.abs(t.values)
    return seen @ t.values.T + extra, np.abs(seen) @ terms.T + np.abs(extra)


def _close(got: Array, want: NDArray, magnitude: NDArray, terms: int) -> None:
    """A sum of ``terms`` float32 products, in any order, is off by at most (terms + 4) 2^-24 of its magnitude.

    (Higham, Accuracy and Stability, 3.1; the 4 are the roundings of scale, product, zero and bias.) A float16 result is
    rounded once more: by 2^-11 of it, or 2^-25 below the normal range.
    """
    bound = (terms + 4) * 2.0**-24 * magnitude
    if got.dtype == np.float16:
        bound += np.abs(want) * 2.0**-11 + 2.0**-25
    assert np.all(np.abs(got.astype(np.float64) - want) <= bound), np.abs(got - want).max()


def _temp_bound(m: int, k: int, n: int, block: int) -> int:
    """Bytes of temporary memory that a fused node may use: a float32 and an int8 copy of the activations, a bias.

    The int8 copy has 8 bytes beside each block (scale and sum); the runtime rounds up to 64 and adds 63.
    """
    blocks = -(-k // block)
    return m * (4 * k + blocks * (block + 8)) + 4 * n + 4 * 127


@needs_avx2
@pytest.mark.parametrize(("kernel", "scheme"), LINEAR)
@pytest.mark.parametrize(("element", "sizes"), [(F32, SIZES), (F16, SIZES[1:2])], ids=["f32", "f16"])
def test_linear_is_right_and_never_expands_its_weight(
    kernel: str, scheme: str, element: DType, sizes: Sequence[tuple[int, int]]
) -> None:
    for n, k in sizes:
        rng = np.random.default_rng(n)
        t = table(scheme, n, k, element)
        bias = rng.standard_normal(n).astype(element.storage) if n != 17 else None
        graph = lower(linear(t, bias=bias), kernel=kernel)
        node = _only_node(graph, "com.microsoft.MatMulNBits")
        level, block = node["accuracy_level"], node["block_size"]
        xs = [rng.standard_normal((m, k)).astype(element.storage) for m in MS]
        seen = run(graph, [{"x": x} for x in xs])
        assert seen.fallbacks == 0
        for m, x, (y,), temp in zip(MS, xs, seen.outputs, seen.temp, strict=True):
            want, magnitude = _expected(t, x, bias, level, block)
            _close(y, want, magnitude, k)
            assert temp["head"] <= _temp_bound(m, k, n, block)
    # For the sizes that matter the bound is far under the expanded weight: it tells a fused node from another one.
    assert (n, k) != SIZES[-1] or _temp_bound(3, k, n, block) < n * k


@needs_avx2
def test_the_probe_sees_a_kernel_that_expands_the_weight() -> None:
    """8 bits at accuracy_level 0 are such a kernel: what the test above asserts fails there."""
    n, k = SIZES[-1]
    graph = lower(linear(table("int8 g32 asym", n, k)))
    _only_node(graph, "com.microsoft.MatMulNBits")["accuracy_level"] = 0
    seen = run(graph, [{"x": np.ones((1, k), np.float32)}])
    assert seen.fallbacks == 1
    assert seen.temp[0]["head"] == n * k * 4


@needs_avx2
@pytest.mark.parametrize("scheme", TABLES)
@pytest.mark.parametrize("element", [F32, F16], ids=str)
def test_embedding_is_exact_and_needs_no_temporary_memory(scheme: str, element: DType) -> None:
    """(code - zero) * scale is one rounding of a product, which float32 and float16 results must have exactly."""
    for v, k in ((1, 3), (17, 501), (40, 1500)):
        t = table(scheme, v, k, element)
        graph = lower(embedding(t))
        rng = np.random.default_rng(v)
        ids = [rng.integers(-v, v, shape) for shape in ((1, 1), (2, 5))]
        seen = run(graph, [{"i": i} for i in ids])
        for i, (e,), temp in zip(ids, seen.outputs, seen.temp, strict=True):
            np.testing.assert_array_equal(e, t.values[i].astype(np.float32).astype(element.storage))
            assert set(temp.values()) == {0}


@needs_avx2
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kernel", ["ort-cpu/MatMulNBits.int8", "ort-cpu/MatMulNBits.fp32"])
def test_activations_of_any_rank(kernel: str, lead: tuple[int, ...]) -> None:
    t = table("int4 g16 asym", 12, 40)
    graph = lower(linear(t, lead), kernel=kernel)
    node = _only_node(graph, "com.microsoft.MatMulNBits")
    x = np.random.default_rng(0).standard_normal((*lead, 40)).astype(np.float32)
    (y,) = run(graph, [{"x": x}]).outputs[0]
    assert y.shape == (*lead, 12)
    want, magnitude = _expected(t, x, None, node["accuracy_level"], 16)
    _close(y, want, magnitude, 40)


@needs_avx2
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("indices", [INT32, INT64], ids=str)
def test_indices_of_any_rank_and_none_at_all(lead: tuple[int, ...], indices: DType) -> None:
    t = table("int8 g32 sym", 7, 64)
    ids = np.asarray(np.arange(int(np.prod(lead))).reshape(lead) % 7, indices.storage)
    (e,) = run(lower(embedding(t, lead, indices)), [{"i": ids}]).outputs[0]
    np.testing.assert_array_equal(e, t.values[ids].astype(np.float32))


# -- the table as data -----------------------------------------------------------------------------------------


def _request(scheme: str, activation: DType = F32, op: str = "q.linear", n: int = 64, k: int = 256) -> Request:
    return Request(op, parse_scheme(scheme), n, k, activation, bias=op == "q.linear")


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("int4 g128 asym", "ort-cpu/MatMulNBits.int8"),
        ("int4 channel sym", "ort-cpu/MatMulNBits.int8"),
        ("int8 tensor sym", "ort-cpu/MatMulNBits.int8"),
        ("uint8 g16 asym", "ort-cpu/MatMulNBits.int8"),
        ("int2 g64 asym", "ort-cpu/MatMulNBits.w2int8"),
    ],
)
def test_what_the_ranks_choose(scheme: str, kernel: str) -> None:
    choice = target("ort-cpu:avx2").choose(_request(scheme))
    assert choice is not None
    assert choice.kernels() == {"decode": kernel, "prefill": kernel}


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (_request("int4 g128 asym", BF16), "QC201"),
        (_request("nf4 g64 sym"), "QC201"),
        (_request("int16 channel sym"), "QC201"),
        (_request("int8 g512 sym"), "QC202"),
        (_request("int2 g16 sym"), "QC202"),
        (_request("int2 g256 sym"), "QC202"),
        (_request("int4 g32 asymf"), "QC204"),
        (_request("int8 g32 sym", BF16, "q.embedding"), "QC201"),
        (_request("int8 b128x128 sym", F32, "q.embedding"), "QC202"),
    ],
)
def test_what_no_row_serves(request_: Request, code: str) -> None:
    reasons = target("ort-cpu:avx512vnni").why_not(request_)
    assert code in {r.code for r in reasons}


@pytest.mark.parametrize("chip", ["sse", "arm64"])
def test_a_chip_without_avx2_has_no_linear_kernel(chip: str) -> None:
    reasons = target(f"ort-cpu:{chip}").why_not(_request("int4 g128 sym"))
    assert [r.code for r in reasons] == ["QC206"]


def test_every_row_is_reached_by_some_chip_and_names_its_evidence() -> None:
    chips = [target(f"ort-cpu:{c}").features for c in CHIPS] + [target("ort-cuda:sm_90").features]
    for row in CPU_ROWS + CUDA_ROWS:
        assert any(row.needs <= c for c in chips), row.name
        assert ("static" in row.evidence) == row.name.startswith("ort-cuda/")
    names = [r.name for r in CPU_ROWS + CUDA_ROWS]
    assert len(set(names)) == len(names)


def test_unknown_chips_are_named() -> None:
    with pytest.raises(InputError, match="avx512vnni"):
        target("ort-cpu:vax")
    with pytest.raises(InputError, match="sm_90"):
        target("ort-cuda:sm_91")
    with pytest.raises(InputError, match="ort-cuda"):
        target("ort-tpu")


@pytest.mark.parametrize(
    ("line", "has", "lacks"),
    [
        ("flags : fpu sse2 avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni", {"avx512", "vnni"}, {"neon"}),
        ("flags\t\t: fpu sse2 avx2 avx_vnni", {"x86_64", "avx2", "vnni"}, {"avx512"}),
        ("flags : sse2 sse4_2", {"x86_64"}, {"avx2", "vnni"}),
        ("flags : sse2 avx2 avx512f", {"avx2"}, {"avx512"}),
        ("Features : fp asimd asimddp i8mm", {"arm64", "neon", "dotprod", "i8mm"}, {"avx2", "x86_64"}),
        ("processor : 0", set(), {"avx2", "x86_64", "neon"}),
    ],
)
def test_features_of_a_cpuinfo(line: str, has: set[str], lacks: set[str]) -> None:
    found = features_of(f"processor : 0\n{line}\nbogomips : 1\n")
    assert has <= found
    assert not (lacks & found)


# -- CUDA: the form of the node only, nothing runs here ------------------------------------------------------


@pytest.mark.parametrize("row", [r for r in CUDA_ROWS if r.op == "q.linear"], ids=lambda r: r.name)
def test_cuda_rows_emit_their_node(row: KernelRow) -> None:
    (code, *_), group = sorted(row.codes), max(row.groups)
    element = F16 if "f16" in row.activations else BF16
    t = table(f"{code} g{group} sym", 256, 512, F16)
    request = Request("q.linear", t.scheme, 256, 512, element)
    assert not row.why_not(request, target("ort-cuda:sm_90").features, 1)
    if element == BF16:
        return
    graph = linear(t)
    from qcompiler.backends.onnx.lower import matmul_nbits
    from qcompiler.target import Choice

    (op,) = list(graph)
    node = matmul_nbits(op, Choice(((DECODE, row),))).owner
    assert node is not None
    want = {"K": 512, "N": 256, "bits": t.scheme.bits, "block_size": group, "accuracy_level": accuracy_level(row)}
    assert node.attrs == want
    assert accuracy_level(row) == 0
    assert len(node.operands) == 3


def test_cuda_prefill_needs_the_session_key() -> None:
    cuda = target("ort-cuda:sm_90")
    request = Request("q.linear", parse_scheme("int4 g32 sym"), 4096, 4096, F16)
    choice = cuda.choose(request)
    assert choice is not None
    assert {row.session for _, row in choice.rows} == {(("ep.cuda.fpa_intb_gemm", "1"),)}
    asym = Request("q.linear", parse_scheme("int4 g32 asym"), 4096, 4096, F16)
    assert cuda.choose(asym) is None
    declined = cuda.declined(asym)
    assert "QC104" in {r.code for r in declined["ort-cuda/MatMulNBits.gemv4"]}
    assert "QC204" in {r.code for r in declined["ort-cuda/MatMulNBits.fpA_intB4.f16"]}
    decode = cuda.choose(asym, [DECODE])
    assert decode is not None
    assert decode.kernels() == {"decode": "ort-cuda/MatMulNBits.gemv4"}
