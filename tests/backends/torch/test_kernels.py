"""Weight-only rows of torch-cpu: the kernel runs, its numbers keep a stated bound, the weight is never expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qcompiler import numerics
from qcompiler.backends.chips import CHIPS, SM, detect_features
from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.kernels import GATHER, INT4PACK, INT8PACK, chips, target, weight_only_rows
from qcompiler.backends.torch.payload import tensor_of
from qcompiler.cli_tables import slower_lines
from qcompiler.dtypes import BF16, F16, F32, Array, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.payload import constant
from qcompiler.scheme import parse_scheme
from qcompiler.target import DECODE, PREFILL, KernelRow, Request
from tests.backends.torch.proof import Table, bf16_table, embedding, linear, lower, run, table

Wide = NDArray[np.float64]

needs_avx2 = pytest.mark.skipif("avx2" not in detect_features(), reason="the rows need AVX2 and this chip has none")

HALF = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
"""Half a unit in the last place, at most, as a share of the value."""
TINY = {F32: 0.0, F16: 2.0**-25, BF16: 0.0}
"""The same for subnormal numbers, absolute."""


def case(t: Table, lead: tuple[int, ...], bias: bool, seed: int = 0) -> tuple[Graph, Array, Array | None]:
    """A lowered graph with open sizes, its input and its bias."""
    rng = np.random.default_rng([seed, t.n, t.k])
    element = t.scale.dtype
    x = rng.standard_normal((*lead, t.k)).astype(element)
    b = rng.standard_normal(t.n).astype(element) if bias else None
    return lower(linear(t, tuple("abc"[: len(lead)]), b)), x, b


def rounded_result(y: Wide, inner: Wide, element: DType, bias: Array | None) -> Wide:
    """What is lost behind a sum with an error of ``inner``: rounding to bf16, to ``element``, and adding the bias."""
    error = inner + HALF[BF16] * (np.abs(y) + inner)
    if bias is not None:
        error = error + HALF[element] * (np.abs(y + bias.astype(np.float64)) + error)
    return error + HALF[element] * (np.abs(y) + error) + TINY[element]


def sums(x: Wide, w: Wide) -> Wide:
    """The sum of magnitudes in each product."""
    return np.abs(x) @ np.abs(w).T


RAGGED = [(1, 1, 1), (7, 33, 3), (16, 128, 1), (40, 200, 5), (48, 96, 17), (100, 257, 2), (130, 64, 4), (64, 512, 33)]
INT4 = ["int4 g32 asym", "uint4 g64 asym", "int4 g128 sym", "int4 g256 asym", "uint4 channel asym", "int4 tensor sym"]


@needs_avx2
@pytest.mark.parametrize("element", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scheme", INT4)
def test_int4pack(scheme: str, element: DType) -> None:
    """Against float64 of the codes. What is lost: x rounded to bf16 (2^-8 of each product), (8 - zero) * s rounded to
    bf16 (2^-8 of that), f32 sums of products with the code and with the offset apart (2^-24 a step), and the result
    rounded to bf16."""
    for i, (n, k, m) in enumerate(RAGGED):
        t = bf16_table(scheme, n, k, element, seed=i)
        graph, x, bias = case(t, (m,), bool(i % 2))
        (y,) = run(graph, x)
        assert y.shape == (m, n)
        wide = x.astype(np.float64)
        exact = wide @ t.values.T
        zero = np.zeros((1, 1)) if t.zero is None else t.zero
        offset = ((0.0 if t.scheme.dtype.signed else 8.0) - t.over(np.broadcast_to(zero, t.scale.shape))) * t.over(
            t.scale
        )
        apart = np.abs(t.values - offset) + np.abs(offset)
        cast = 0.0 if element == BF16 else HALF[BF16] * sums(wide, t.values)
        inner = (
            cast + HALF[BF16] * sums(wide, offset) * (1 + HALF[BF16]) + (k + 4) * 2.0**-24 * sums(wide, apart) * 1.01
        )
        bound = rounded_result(exact, inner, element, bias)
        want = exact if bias is None else exact + bias.astype(np.float64)
        worst = np.max(np.abs(y - want) / np.maximum(bound, 1e-30))
        assert worst <= 1, f"N={n} K={k} M={m}: {worst:.3f} of the bound"


@needs_avx2
@pytest.mark.parametrize("element", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scheme", ["int8 channel sym", "int8 tensor sym"])
def test_int8pack(scheme: str, element: DType) -> None:
    """Against float64 of the codes: x rounded to bf16, f32 sums, the sum rounded to bf16. The scale is applied exactly,
    but for one f32 rounding; with bf16 scales inside the kernel, before the only rounding."""
    for i, (n, k, m) in enumerate(RAGGED):
        t = table(scheme, n, k, element, seed=i)
        graph, x, bias = case(t, (m,), bool(i % 2))
        (y,) = run(graph, x)
        assert y.shape == (m, n)
        wide = x.astype(np.float64)
        exact, magnitude = wide @ t.values.T, sums(wide, t.values)
        cast = 0.0 if element == BF16 else HALF[BF16] * magnitude
        inner = cast + (k + 4) * 2.0**-24 * magnitude * 1.01
        bound = rounded_result(exact, inner, element, bias)
        want = exact if bias is None else exact + bias.astype(np.float64)
        worst = np.max(np.abs(y - want) / np.maximum(bound, 1e-30))
        assert worst <= 1, f"N={n} K={k} M={m}: {worst:.3f} of the bound"


TABLES = [
    *(
        "int8 channel sym",
        "int8 tensor sym",
        "uint8 channel asym",
        "int8 g32 asym",
        "uint8 g16 asym",
        "uint8 channel sym",
    ),
    *("int4 g32 asym", "uint4 g64 asym", "int4 channel sym", "uint4 tensor asym", "uint4 g16 sym"),
]


@pytest.mark.parametrize("element", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("scheme", TABLES)
def test_gather_is_the_reference_bit_for_bit(scheme: str, element: DType) -> None:
    rng = np.random.default_rng(5)
    for v, k in ((1, 1), (11, 32), (9, 71), (5, 130)):
        t = table(scheme, v, k, element, seed=k)
        graph = lower(embedding(t))
        for shape in ((2, 3), (1, 0)):
            ids = rng.integers(0, v, shape)
            (found,) = run(graph, ids)
            want = numerics.q_embedding(ids, t.codes, t.scale, t.zero, t.scheme)
            assert found.shape == (*shape, k)
            assert np.array_equal(found, want.astype(np.float32))


@needs_avx2
@pytest.mark.parametrize("scheme", ["int4 g32 asym", "int8 channel sym"])
@pytest.mark.parametrize("element", [F32, BF16], ids=str)
@pytest.mark.parametrize("k", [40, 64])
def test_any_rank_any_strides_any_address_no_rows(scheme: str, element: DType, k: int) -> None:
    """The kernels take contiguous matrices alone, int8pack at multiples of 32 bytes; what reaches them has any rank,
    is a view of something, begins anywhere, or is empty."""
    t = bf16_table(scheme, 24, k, element)
    x = np.random.default_rng(2).standard_normal((3, 4, k)).astype(element.storage)
    module = to_graph_module(lower(linear(t, ("a", "b"))))
    flat = to_graph_module(lower(linear(t, ("a",))))
    tensor = tensor_of(constant(x))
    with torch.no_grad():
        (y,) = module(tensor)
        (turned,) = module(tensor.transpose(0, 1).contiguous().transpose(0, 1))
        (sliced,) = module(torch.cat([tensor, tensor], -1)[..., :k])
        (elsewhere,) = module(torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape))
        (columns,) = flat(tensor[0].t().contiguous().t())
        (empty,) = module(tensor[:0])
        (vector,) = to_graph_module(lower(linear(t, ())))(tensor[1, 2])
    assert y.shape == (3, 4, 24)
    for same in (turned, sliced, elsewhere):
        assert torch.equal(y, same)
    assert torch.equal(y[0], columns)
    assert empty.shape == (0, 4, 24)
    assert vector.shape == (24,)
    assert torch.allclose(vector.float(), y[1, 2].float(), rtol=2.0**-6, atol=2.0**-6)  # sums in another order, twice


# -- memory ------------------------------------------------------------------------------------------------------


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that torch allocates in ``call``, all of them together."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    return sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)


N, K = 512, 1024


@needs_avx2
@pytest.mark.parametrize("scheme", ["int4 g128 asym", "int4 channel sym", "int8 channel sym"])
@pytest.mark.parametrize("element", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 16])
def test_a_call_allocates_activations_only(scheme: str, element: DType, m: int) -> None:
    """A few copies of the rows in and out; one copy of the weight in bf16 would be 2 * N * K bytes."""
    t = bf16_table(scheme, N, K, element)
    module = to_graph_module(lower(linear(t)))
    x = torch.randn(m, K).to(tensor_of(constant(t.scale)).dtype)
    used = allocated(lambda: module(x))
    assert used <= 4 * m * (N + K) * 4 + 4096
    assert used < N * K // 4


@pytest.mark.parametrize("scheme", ["int8 channel sym", "int4 g32 asym"])
def test_a_lookup_allocates_the_rows_asked_for(scheme: str) -> None:
    module = to_graph_module(lower(embedding(bf16_table(scheme, N, K, F32))))
    assert allocated(lambda: module(torch.tensor([[1, 5, 7]]))) < 10 * 3 * K * 4


def test_an_expanded_weight_is_seen() -> None:
    codes, scale, x = torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1), torch.randn(1, K)
    assert allocated(lambda: torch.nn.functional.linear(x, codes * scale)) >= 4 * N * K


# -- the table -----------------------------------------------------------------------------------------------------


def request(text: str, op: str = "q.linear", element: DType = F32) -> Request:
    return Request(op, parse_scheme(text).with_axis(1), 64, 128, element)


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("int4 g128 asym", INT4PACK),
        ("uint4 channel sym", INT4PACK),
        ("int4 g1024 sym", INT4PACK),
        ("int8 channel sym", INT8PACK),
        ("int8 tensor sym", INT8PACK),
    ],
)
def test_the_kernel_of_a_scheme(text: str, kernel: str) -> None:
    for chip in ("avx2", "avx512vnni"):
        choice = target(f"torch-cpu:{chip}").choose(request(text))
        assert choice is not None
        assert choice.kernels() == {"decode": kernel, "prefill": kernel}


@pytest.mark.parametrize(
    ("text", "chip", "code", "words"),
    [
        ("int2 g32 asym", "avx512", "QC201", "not int2"),
        ("nf4 g64 sym", "avx512", "QC201", "not nf4"),
        ("f8e4m3 tensor sym", "avx512", "QC201", "not f8e4m3"),
        ("uint8 channel sym", "avx512", "QC201", "takes int8 codes"),
        ("int8 g128 sym", "avx512", "QC202", "scales per channel, tensor, not per group"),
        ("int8 channel asym", "avx512", "QC204", "integer zero points"),
        ("int4 g16 sym", "avx512", "QC202", "takes groups of 32, 64"),
        ("int4 g64 asymf", "avx512", "QC204", "float zero points"),
        ("int4 g64 sym", "sse", "QC206", "needs avx2"),
        ("int8 channel sym", "arm64", "QC206", "needs avx2"),
    ],
)
def test_what_no_kernel_takes(text: str, chip: str, code: str, words: str) -> None:
    reasons = target(f"torch-cpu:{chip}").why_not(request(text))
    assert code in {r.code for r in reasons}
    assert any(words in r.message for r in reasons), reasons


def test_a_chip_that_would_do_is_named() -> None:
    (reason,) = target("torch-cpu:sse").why_not(request("int4 g64 sym"))
    assert reason.fix == "name a chip that has them, for example torch-cpu:avx2"


def test_targets_and_chips() -> None:
    assert chips("torch-cpu") == tuple(CHIPS)
    assert chips("torch-cuda") == tuple(f"sm_{s}" for s in SM)
    assert chips("ort-cpu") == ()
    assert target("torch-cpu").features >= detect_features() - {"avx2"}
    for spec, words in (
        ("torch-cpu:z80", "no chip called 'z80'"),
        ("torch-cuda:sm_1", "no architecture called 'sm_1'"),
    ):
        with pytest.raises(InputError, match=words):
            target(spec)
    with pytest.raises(InputError, match="known: torch-cpu, torch-cuda"):
        target("torch-tpu")


def test_torch_held_down_below_avx2_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert {r.code for r in target("torch-cpu").why_not(request("int4 g64 sym"))} == {"QC206"}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert target("torch-cpu:avx512").row(INT4PACK).layout.endswith("int4pack_avx512")  # a named chip is that chip


def _row(name: str, width: str = "avx512") -> KernelRow:
    return next(r for r in weight_only_rows(width) if r.name == name)


def test_the_table_says_where_a_kernel_is_slower() -> None:
    assert slower_lines(_row(INT8PACK))[2] == "f16 activations, share of its speed: 0.89 from M=1, as fast from M=4"
    assert len(slower_lines(_row(INT4PACK))) == 1  # with f32 and f16 activations it is faster at every M


def test_where_a_kernel_is_slower_than_the_float_op() -> None:
    assert [_row(INT4PACK).speed("bf16", m) for m in (1, 8, 16, 100, 512)] == [None, None, 0.73, 0.47, 0.41]
    assert _row(INT4PACK).speed("f32", PREFILL.m) is None
    assert _row(INT8PACK).speed("f16", DECODE.m) == 0.89
    assert _row(INT8PACK).speed("f16", 4) is None  # "as fast" ends what is slower
    assert _row(GATHER).speed("f32", 64) is None
    assert _row(INT4PACK, "avx2").speed("f32", PREFILL.m) == 0.64
