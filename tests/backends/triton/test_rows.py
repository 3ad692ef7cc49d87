"""The table of torch-cuda: which kernel each M gets, what is refused by name, that every row can be followed."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest

from qcompiler.backends.chips import SM
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.triton.families import FAMILIES
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.rows import DECODE_ROWS, row_name, sm_features
from qcompiler.backends.triton.scheme_forms import form_of, group_of, scheme_told
from qcompiler.cli_tables import kernel_parts
from qcompiler.dtypes import BF16, F16, F32, F64, DType
from qcompiler.errors import InputError
from qcompiler.passes.choose_layout import entry_point
from qcompiler.scheme import parse_scheme
from qcompiler.target import DECODE, PHASES, PREFILL, Choice, Phase, Request
from tests.support import ROOT

HOPPER = target("torch-cuda:sm_90")


def request(text: str, op: str = "q.linear", x: str | None = None, activation: DType = F32) -> Request:
    scheme = None if x is None else parse_scheme(x)
    return Request(op, parse_scheme(text).with_axis(1), 70, 200, activation, x=scheme)


WEIGHT_ONLY = {
    "int4 g128 asym": "int4",
    "int4 g32 sym": "int4",
    "uint4 g64 asym": "uint4",
    "int4 channel asymf": "int4",
    "int2 g32 asym": "int2",
    "int8 channel sym": "int8",
    "uint8 g1024 asym": "uint8",
    "int8 tensor sym": "int8",
    "f8e4m3 channel sym": "f8e4m3",
    "f8e4m3 b128x128 sym": "f8e4m3",
    "f8e4m3 g32 sym scale=f8e8m0": "f8e4m3",
    "f8e5m2 tensor sym": "f8e5m2",
    "nf4 g64 sym": "nf4",
    "f4e2m1 g64 sym": "f4e2m1",
    "f4e2m1 g32 sym scale=f8e8m0": "mxfp4",
    "f4e2m1 g16 sym scale=f8e4m3": "nvfp4",
}


@pytest.mark.parametrize(("text", "form"), WEIGHT_ONLY.items())
@pytest.mark.parametrize("activation", [F32, F16, BF16])
def test_a_weight_has_a_kernel_for_decode_and_one_for_prefill(text: str, form: str, activation: DType) -> None:
    asked = request(text, activation=activation)
    choice = HOPPER.choose(asked)
    assert choice is not None
    assert choice.kernels() == {"decode": row_name(f"wn.gemv.{form}"), "prefill": row_name(f"wn.gemm.{form}")}
    assert form_of(asked.scheme) == form
    # The kernel of the other phase is no kernel that declines.
    assert not {*choice.kernels().values()} & set(HOPPER.declined(asked))


def test_the_kernels_meet_at_one_m() -> None:
    for m, kind in ((1, "gemv"), (DECODE_ROWS, "gemv"), (DECODE_ROWS + 1, "gemm"), (4096, "gemm")):
        choice = HOPPER.choose(request("int4 g128 asym"), [Phase("some", m)])
        assert choice is not None
        assert choice.kernels() == {"some": row_name(f"wn.{kind}.int4")}
    row = HOPPER.row(row_name("wn.gemv.int4"))
    (reason,) = row.why_not(request("int4 g128 asym"), HOPPER.features, PREFILL.m)
    assert reason.message.endswith("serves M up to 16; torch-cuda/wn.gemm.int4 takes more; this phase has M=512")
    (reason,) = HOPPER.row(row.hands_over).why_not(request("int4 g128 asym"), HOPPER.features, DECODE.m)
    assert reason.message == "torch-cuda/wn.gemm.int4 serves M from 17; this phase has M=1"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("int4 g16 asym", "QC202", "takes groups of 32, 64, 128, 256, 512, 1024, not 16"),
        ("f4e2m1 g16 sym", "QC202", "takes groups of"),
        ("f8e4m3 b64x64 sym", "QC202", "scales weights in b128x128, not in b64x64"),
        ("int16 channel sym", "QC201", "not int16"),
    ],
)
def test_what_no_kernel_takes_is_refused_by_name(text: str, code: str, words: str) -> None:
    (reason,) = HOPPER.why_not(request(text))
    assert reason.code == code
    assert words in reason.message
    assert reason.fix


def test_activations_that_no_kernel_takes() -> None:
    (reason,) = HOPPER.why_not(request("int4 g128 asym", activation=F64))
    assert (reason.code, "f64" in reason.message) == ("QC201", True)


def test_old_gpus_are_refused() -> None:
    old = target("torch-cuda:sm_75")
    for text in WEIGHT_ONLY:
        (reason,) = old.why_not(request(text))
        assert reason.code == "QC206"
        assert reason.message.endswith("needs sm_80, which this chip lacks")
        assert reason.fix == "name a chip that has them, for example torch-cuda:sm_80"


def test_without_a_word_it_is_what_every_gpu_has() -> None:
    assert target("torch-cuda").features == target("torch-cuda:sm_80").features == {"cuda", "sm_75", "sm_80"}
    for sm in SM:
        assert sm_features(sm) == {"cuda", *(f"sm_{s}" for s in SM if s <= sm)}


@pytest.mark.parametrize(
    ("weights", "x", "least", "kernel"),
    [
        ("int8 channel sym", "int8 token sym dynamic", 80, "a8.gemm.int8"),
        ("int8 channel sym", "int8 tensor sym", 80, "a8.gemm.int8"),
        ("f8e4m3 channel sym", "f8e4m3 token sym dynamic", 89, "a8.gemm.f8"),
        ("f8e4m3 tensor sym", "f8e4m3 tensor sym", 89, "a8.gemm.f8"),
        ("f8e4m3 b128x128 sym", "f8e4m3 b1x128 sym dynamic", 89, "a8.gemm.f8"),
        ("int4 g128 sym", "int8 token sym dynamic", 80, "a8.gemm.w4"),
        ("int4 channel asym", "f8e4m3 token sym dynamic", 89, "a8.gemm.w4"),
    ],
)
def test_products_of_codes(weights: str, x: str, least: int, kernel: str) -> None:
    op = "q.linear_dyn" if "dynamic" in x else "q.linear_static"
    asked = request(weights, op, x)
    for sm in SM:
        choice = target(f"torch-cuda:sm_{sm}").choose(asked)
        found = None if choice is None else set(choice.kernels().values())
        assert found == ({row_name(kernel)} if sm >= least else None)


@pytest.mark.parametrize(
    ("weights", "x", "words"),
    [
        ("int8 channel sym", "uint8 tensor asym dynamic", "the nearest is 'int8 token sym dynamic'"),
        ("int8 channel asym", "int8 token sym dynamic", "integer zero points"),
        ("int8 g64 sym", "int8 token sym dynamic", "scales per channel, tensor, not per group"),
        ("int4 g64 sym", "int8 token sym dynamic", "takes groups of 128, 256, 512, 1024, not 64"),
    ],
)
def test_products_of_codes_that_are_refused(weights: str, x: str, words: str) -> None:
    reasons = HOPPER.why_not(request(weights, "q.linear_dyn", x))
    assert any(words in f"{r.message} {r.fix}" for r in reasons), reasons


def test_convolutions_have_no_kernel_and_the_target_says_so() -> None:
    for op in ("q.conv", "q.conv_dyn"):
        (reason,) = HOPPER.why_not(request("int8 channel sym", op))
        assert reason.message == "torch-cuda has no kernel for convolutions on codes"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [0, 32, 128])
def test_the_arguments_of_a_call_tell_the_scheme(form: str, group: int) -> None:
    for zero in ("none", "int", "float") if FORMS[form].kind == "integer" else ("none",):
        told = scheme_told(form, {"mxfp4": 32, "nvfp4": 16}.get(form, group), zero)  # type: ignore[arg-type]
        assert told is not None
        assert form_of(told) == form
        assert told.zero == zero
        assert group_of(told) in (group, 16, 32)
        assert HOPPER.choose(Request("q.linear", told.with_axis(1), 1, 1, F16)) is not None


def test_arguments_that_tell_of_no_scheme() -> None:
    assert scheme_told("int3", 0, "none") is None
    assert scheme_told("int4", 48, "none") is None
    assert scheme_told("nf4", 64, "int") is None
    assert scheme_told("nvfp4", 32, "none") is None
    with pytest.raises(InputError, match="have no form among the kernels' own"):
        form_of(parse_scheme("int16 channel sym"))


def test_every_row_can_be_followed() -> None:
    assert HOPPER.rows
    for row in HOPPER.rows:
        assert row.name.startswith("torch-cuda/")
        assert "cuda" in row.needs
        assert row.evidence
        assert row.numerics
        assert callable(entry_point(Choice(((DECODE, row),))))
        if row.layout:
            module, _, name = row.layout.partition(":")
            assert callable(getattr(importlib.import_module(module), name))
        if row.hands_over:
            assert HOPPER.row(row.hands_over) == replace(
                row,
                name=row.hands_over,
                numerics=HOPPER.row(row.hands_over).numerics,
                hands_over="",
                m_max=None,
                m_min=DECODE_ROWS + 1,
                rank=1,
            )


def test_what_kernels_claim_belongs_to_rows_and_every_row_is_claimed() -> None:
    for sm in (80, 89, 90, 100):
        claimed = set()
        for family in FAMILIES:
            found = list(importlib.import_module(f"qcompiler.backends.triton.{family}").claims(sm))
            assert found
            claimed |= {claim.row for claim in found if claim.least_sm <= sm}
        served = {row.name for row in target(f"torch-cuda:sm_{sm}").rows if not row.needs - sm_features(sm)}
        plain = {"torch-cuda/dequantize", "torch-cuda/mul"}  # calls of aten, no kernels of ours
        assert served - plain == claimed


def test_the_tests_that_rows_name_are_there() -> None:
    named = {found[0] for row in HOPPER.rows if (found := re.search(r"tests/\S+\.py", row.evidence))}
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_the_table_is_printed() -> None:
    assert kernel_parts(HOPPER.rows, 200)
    assert all(HOPPER.choose(request("int8 channel sym", "q.embedding"), [p]) is not None for p in PHASES)
