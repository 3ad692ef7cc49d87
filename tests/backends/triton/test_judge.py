"""The verdict on calls of Triton operators: their kernels by phase, and every way in which a call is broken by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import dtypes
from qcompiler.backends.base import Silent
from qcompiler.backends.torch.backend import TorchBackend
from qcompiler.backends.torch.evidence import verify_file
from qcompiler.backends.torch.judge import examine
from qcompiler.backends.torch.kernel_error import error_of
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.nodes import low_bit
from qcompiler.backends.torch.nodes_triton import SLOTS, WN_LINEAR, row_keys
from qcompiler.backends.torch.payload import tensor_of
from qcompiler.backends.torch.program import call_module, open_module
from qcompiler.backends.torch.reference import Reference
from qcompiler.backends.torch.stored import check_stored
from qcompiler.backends.torch.weights_triton import weight_of
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, TensorType, Value
from qcompiler.payload import constant
from tests.backends.onnx.proof import table
from tests.backends.torch import proof
from tests.backends.torch.lowered import HIDDEN, SITES, WORDS, at, lowered, written
from tests.backends.torch.lowered import WIDTH as COLUMNS

SPEC = "torch-cuda:sm_90"
HOPPER = target(SPEC)
FORMS = {"w4a16": ("int8", "int4", "int4", "int8"), "w8a16": ("int8",) * 4, "w2a16": ("int8", "int2", "int2", "int8")}


@pytest.mark.parametrize("recipe", FORMS)
def test_each_site_has_a_kernel_for_decode_and_one_for_prefill(recipe: str) -> None:
    graph = lowered(recipe, SPEC)
    seen = examine(graph, HOPPER)
    assert not seen.findings
    assert not check_stored(seen)
    sites = {s.name: s for s in seen.sites}
    assert tuple(sites) == SITES
    table_, *layers = FORMS[recipe]
    assert sites["emb"].kernel == {"decode": "torch-cuda/gather", "prefill": "torch-cuda/gather"}
    for name, form in zip(SITES[1:], layers, strict=True):
        wanted = {"decode": f"torch-cuda/wn.gemv.{form}", "prefill": f"torch-cuda/wn.gemm.{form}"}
        assert sites[name].kernel == wanted
    assert [(s.op, s.n, s.k) for s in sites.values()] == [
        ("embedding", WORDS, COLUMNS),
        ("linear", HIDDEN, COLUMNS),
        ("linear", COLUMNS, HIDDEN),
        ("linear", WORDS, COLUMNS),
    ]
    assert sites["head"].tied_to == "emb"
    assert table_ in sites["emb"].scheme


def test_stored_bytes_are_those_of_the_constants() -> None:
    sites = {s.name: s.bytes for s in examine(lowered("w4a16", SPEC), HOPPER).sites}
    assert sites["up"] == {"codes": 128 * 128 // 2, "scales": 128 * 2, "zeros": 128 * 2}  # 100 x 64 is padded


# -- mutants ---------------------------------------------------------------------------------------------------------


def with_args(op: Op, **changed: Any) -> None:
    args = list(op.attrs["args"])
    for key, value in changed.items():
        args[getattr(SLOTS[WN_LINEAR], key)] = value
    op.attrs["args"] = tuple(args)


def put(op: Op, index: int, array: Array, element: Any = None) -> None:
    op.set_operand(index, op.graph.add_const(op.graph.fresh("given"), constant(array, element)))


def other_form(op: Op) -> None:
    with_args(op, form="int8")


def no_form(op: Op) -> None:
    with_args(op, form="int3")


def odd_group(op: Op) -> None:
    with_args(op, group=48)


def other_group(op: Op) -> None:
    with_args(op, group=32)


def more_features(op: Op) -> None:
    with_args(op, n=300)


def zeros_of_floats_codes(op: Op) -> None:
    with_args(op, form="nf4")


def short_scales(op: Op) -> None:
    put(op, 2, np.ones((2, 128), np.float32))


def wide_zeros(op: Op) -> None:
    put(op, 3, np.ones((1, 128), np.int32))


def codes_given(op: Op) -> None:
    codes = op.operand(1)
    assert codes is not None
    op.set_operand(1, op.graph.add_input("codes", codes.tensor))


def scales_given(op: Op) -> None:
    scales = op.operand(2)
    assert scales is not None
    op.set_operand(2, op.graph.add_input("scales", scales.tensor))


def wrong_codes(op: Op) -> None:
    put(op, 1, np.zeros((1, 128, 16), np.int64))


MUTANTS: list[tuple[Callable[[Op], None], str, str]] = [
    (other_form, "QC205", "int8 fragments are int32[K / 128, N, 32]"),
    (no_form, "QC201", "names the form 'int3'"),
    (odd_group, "QC202", "its groups are of 48"),
    (other_group, "QC203", "its scales are [1, 128], and groups of 32 need [4, 128]"),
    (more_features, "QC205", "N=300"),
    (zeros_of_floats_codes, "QC203", "nf4 codes have no zero points"),
    (short_scales, "QC203", "its scales are [2, 128]"),
    (wide_zeros, "QC203", "its zero points are int32"),
    (codes_given, "QC104", "its codes 'codes' is an input"),
    (scales_given, "QC104", "its scales 'scales' are an input"),
    (wrong_codes, "QC205", "its codes are int64"),
]


@pytest.mark.parametrize(("mutate", "code", "words"), MUTANTS, ids=lambda v: getattr(v, "__name__", ""))
def test_what_was_changed_by_hand_is_found(mutate: Callable[[Op], None], code: str, words: str) -> None:
    graph = lowered("w4a16", SPEC)
    mutate(at(graph, "up"))
    seen = examine(graph, HOPPER)
    assert {f.op for f in seen.findings} == {"up"}
    assert any(f.code == code and words in f.reason for f in seen.findings), seen.findings
    assert all(f.fix for f in seen.findings)
    assert {s.name for s in seen.sites if s.status == "unfused"} == {"up"}


def test_calls_of_torch_have_no_row_on_a_gpu() -> None:
    seen = examine(lowered("w4a16", "torch-cpu:avx2"), HOPPER)
    assert {f.code for f in seen.findings} == {"QC206"}
    assert any("aten._weight_int4pack_mm_for_cpu" in f.reason for f in seen.findings)


def test_on_a_cpu_the_reference_is_no_kernel() -> None:
    seen = examine(lowered("w4a16", SPEC), target("torch-cpu"))
    assert {f.code for f in seen.findings} == {"QC206"}
    assert {s.status for s in seen.sites} == {"unfused"}


def test_an_old_gpu_does_not_run_it() -> None:
    seen = examine(lowered("w4a16", SPEC), target("torch-cuda:sm_75"))
    assert {f.code for f in seen.findings} == {"QC206"}


def test_broken_scales_are_found_and_those_of_padding_are_not() -> None:
    graph = lowered("w4a16", SPEC)
    scales = np.ones((1, 128), np.float32)
    scales[0, HIDDEN:] = 0
    put(at(graph, "up"), 2, scales)
    assert not check_stored(examine(graph, HOPPER))
    scales = scales.copy()
    scales[0, 3] = np.nan
    put(at(graph, "up"), 2, scales)
    (found,) = check_stored(examine(graph, HOPPER))
    assert (found.code, found.op) == ("QC302", "up")


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_judged_without_a_gpu_and_runs_on_a_cpu(tmp_path: Path) -> None:
    path = written(lowered("w4a16", SPEC), tmp_path / "net.pt2")
    judged = verify_file(path, HOPPER)
    assert not judged.findings
    assert judged.evidence.kind == "static"
    assert any("is not here" in note for note in judged.evidence.notes)
    assert {s.name: s.status for s in judged.sites} == dict.fromkeys(SITES, "fused")
    (out,) = call_module(open_module(path), [torch.zeros(1, 3, dtype=torch.int64)])
    assert out.shape == (1, 3, WORDS)


def test_a_file_whose_group_was_changed_is_rejected(tmp_path: Path) -> None:
    graph = lowered("w4a16", SPEC)
    op = at(graph, "up")
    with_args(op, group=256)  # one group of 256 spans K as one of 128 does: the shapes agree, and so do the numbers
    assert not verify_file(written(graph, tmp_path / "same.pt2"), HOPPER).findings
    with_args(op, group=32)
    with pytest.raises(Exception, match="scales"):
        written(graph, tmp_path / "net.pt2")


def test_code_for_a_cpu_is_not_made_of_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'emb' calls .*, whose kernels are for GPUs"):
        TorchBackend().emit(lowered("w4a16", SPEC), tmp_path / "net.pt2", {"aot": True}, Silent())


# -- numbers ---------------------------------------------------------------------------------------------------------


def arrays_of(op: Op) -> dict[Value, Array]:
    return {v: v.payload.array() for v in op.operands if v is not None and v.payload is not None}


SCHEMES = ("int4 g32 asym", "uint4 g128 asym", "int2 g32 asym", "int8 channel sym", "int8 tensor sym")


@pytest.mark.parametrize("text", SCHEMES)
def test_the_weight_of_a_call_is_what_its_codes_mean(text: str) -> None:
    t = table(text, 70, 200, dtypes.F32)
    graph = proof.lower(proof.linear(t), SPEC)
    op = next(op for op in graph if op.name == f"{WN_LINEAR}.default")
    found = weight_of(op, arrays_of(op).get)
    assert found is not None
    np.testing.assert_allclose(found[:70, :200], t.values, rtol=1e-12, atol=0)
    part = weight_of(op, arrays_of(op).get, 5)
    assert part is not None
    np.testing.assert_array_equal(part, found[:5])
    node = low_bit(op)
    assert node is not None
    assert (node.n, node.k, row_keys(node)) == (70, 200, (f"wn.gemv.{text.split()[0]}", f"wn.gemm.{text.split()[0]}"))


def one_call(text: str) -> tuple[Graph, Op, Array, torch.Tensor]:
    t = table(text, 70, 200, dtypes.F32)
    graph = proof.lower(proof.linear(t), SPEC)
    op = next(op for op in graph if op.name == f"{WN_LINEAR}.default")
    x = np.random.default_rng(3).standard_normal((5, 200)).astype(np.float32)
    (y,) = proof.run(graph, x)
    return graph, op, x, torch.from_numpy(y)


@pytest.mark.parametrize("text", SCHEMES)
def test_what_ran_is_compared_with_the_codes(text: str) -> None:
    _, op, x, y = one_call(text)
    node = low_bit(op)
    assert node is not None
    known: dict[Value, Any] = {v: tensor_of(constant(a)) for v, a in arrays_of(op).items()}
    known |= {v: tensor_of(v.payload) for v in op.operands if v is not None and v.payload is not None}
    known[op.operands[0]] = torch.from_numpy(x)  # type: ignore[index]
    right = Reference({}).relative_error(node, known, y)
    wrong = Reference({}).relative_error(node, known, y.flip(-1))
    assert right is not None and wrong is not None
    assert right < 2.0**-8 < wrong  # activations were rounded to bf16, nothing else
    operands = [known[v].numpy() if v.tensor.dtype != dtypes.BF16 else v.payload.array() for v in op.operands]  # type: ignore[union-attr]
    bound = error_of(op, operands)
    want = x.astype(np.float64) @ weight_of(op, arrays_of(op).get)[:70, :200].T  # type: ignore[index]
    assert (np.abs(y.numpy() - want) <= bound).all()


def test_another_dtype_of_activations_is_no_fault() -> None:
    graph = lowered("w4a16", SPEC)
    op = at(graph, "up")
    x = op.operand(0)
    assert x is not None
    x.type = TensorType(dtypes.BF16, x.tensor.shape)
    assert not examine(graph, HOPPER).findings
