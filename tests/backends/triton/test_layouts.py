"""Fragments, laid-out scales and zeros: where each code goes, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.forms import FORMS, Form
from qcompiler.backends.triton.layouts import (
    fragment_shape,
    pack_codes,
    pack_scales,
    pack_zeros,
    unpack_codes,
    unpack_scales,
    unpack_zeros,
)
from qcompiler.dtypes import Array, dtype
from qcompiler.errors import InputError

INTEGERS = [f.name for f in FORMS.values() if f.kind == "integer"]


def codes_of(form: Form, n: int, k: int, seed: int = 0) -> Array:
    """Random codes of a form in the storage of its type; every code may come."""
    raw = np.random.default_rng(seed).integers(0, 1 << form.bits, (n, k)).astype(np.uint8)
    if form.kind == "integer":
        return (raw - np.uint8(form.shift)).view(dtype(form.name).storage)
    word = {"mxfp4": "f4e2m1", "nvfp4": "f4e2m1"}.get(form.name, form.name)
    return raw.view(dtype(word).storage)


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(list(FORMS)), n=st.integers(1, 150), k=st.integers(1, 300), seed=st.integers(0, 9))
def test_codes_come_back_whatever_their_form_and_shape(form: str, n: int, k: int, seed: int) -> None:
    codes = codes_of(FORMS[form], n, k, seed)
    packed = pack_codes(codes, form)
    assert packed.shape == fragment_shape(n, k, form)
    assert packed.dtype == np.int32
    back = unpack_codes(packed, form, n, k)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back.view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize("form", INTEGERS)
def test_each_code_lies_where_its_lane_multiplies_it(form: str) -> None:
    """Lane 4 g + c of a warp holds, of row g and each 16 columns, 2 c + lo and 8 + 2 c + lo (PTX ISA, mma.m16n8k16)."""
    bits, shift = FORMS[form].bits, FORMS[form].shift
    codes = codes_of(FORMS[form], 3, 256)
    packed = pack_codes(codes, form).view(np.uint32)
    stored = codes.view(np.uint8) + np.uint8(shift)
    for column in range(256):
        tile, inside = divmod(column, 128)
        slab, rest = divmod(inside, 16)
        hi, rest = divmod(rest, 8)
        c, lo = divmod(rest, 2)
        h, s = divmod(slab, 8 // bits)
        word = packed[tile, :3, c * bits + h]
        found = (word >> np.uint32(16 * lo + bits * (hi + 2 * s))) & np.uint32((1 << bits) - 1)
        np.testing.assert_array_equal(found, stored[:, column])


@pytest.mark.parametrize("form", INTEGERS)
def test_padding_holds_codes_whose_value_is_zero(form: str) -> None:
    packed = pack_codes(codes_of(FORMS[form], 5, 100), form)
    signed = unpack_codes(packed, form, 64, 128)
    assert not signed[5:].any()
    assert not signed[:, 100:].any()


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = codes_of(FORMS["int4"], 300, 200)
    whole = pack_codes(codes, "int4")
    monkeypatch.setattr(layouts, "CHUNK_CODES", 1)
    np.testing.assert_array_equal(pack_codes(codes, "int4"), whole)
    np.testing.assert_array_equal(unpack_codes(whole, "int4", 300, 200), codes)


@pytest.mark.parametrize("group", [0, 16, 32, 64, 128, 256, 384])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 128), (70, 300), (130, 129)])
def test_scales_come_back(n: int, k: int, group: int) -> None:
    count = -(-k // group) if group else 1
    scales = np.random.default_rng(0).uniform(1, 2, (n, count)).astype(np.float16)
    laid = pack_scales(scales, n, k, group)
    assert laid.shape == (layouts.scale_rows(k, group), layouts.padded(n, 64))
    assert laid.dtype == np.float16
    np.testing.assert_array_equal(unpack_scales(laid, n, k, group), scales)
    assert laid.sum(dtype=np.float64) == scales.sum(dtype=np.float64)  # 0 in the padding


def test_one_scale_of_a_tensor_is_there_for_each_row() -> None:
    laid = pack_scales(np.full((1, 1), 0.5, np.float32), 70, 300, 0)
    assert laid[0, :70].tolist() == [0.5] * 70
    np.testing.assert_array_equal(unpack_scales(laid, 70, 300, 0, whole=True), [[0.5]])


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("form", INTEGERS)
def test_zero_points_come_back_shifted_as_the_codes_are(form: str, group: int) -> None:
    n, k = 70, 300
    zeros = codes_of(FORMS[form], n, -(-k // group) if group else 1)
    laid = pack_zeros(zeros, n, k, group, form)
    assert laid.dtype == np.int16
    assert int(laid[0, 3]) == int(zeros[3, 0]) + FORMS[form].shift
    back = unpack_zeros(laid, n, k, group, form)
    assert back.dtype == zeros.dtype
    np.testing.assert_array_equal(back, zeros)


def test_float_zero_points_stay_as_they_are() -> None:
    zeros = np.random.default_rng(0).uniform(-20, 20, (70, 3)).astype(np.float16)
    laid = pack_zeros(zeros, 70, 300, 128, "int4")
    assert laid.dtype == np.float16
    np.testing.assert_array_equal(unpack_zeros(laid, 70, 300, 128, "int4"), zeros)


WRONG: dict[str, tuple[NDArray[np.int8], str, str]] = {
    "storage": (np.zeros((2, 2), np.int8), "uint4", r"uint4 codes are \[N, K\] in uint8, not int8\[2, 2\]"),
    "rank": (np.zeros(2, np.int8), "int4", r"int4 codes are \[N, K\] in int8, not int8\[2\]"),
    "range": (np.full((2, 2), 8, np.int8), "int4", r"int4 codes lie in -8..7, not in 8..8"),
    "form": (np.zeros((2, 2), np.int8), "int3", "no form of codes is called 'int3'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_codes_that_do_not_fit_are_refused(case: str) -> None:
    codes, form, match = WRONG[case]
    with pytest.raises(InputError, match=match):
        pack_codes(codes, form)


def test_parameters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"in groups of 128 are \[4, 2\], not \[4, 3\]"):
        pack_scales(np.ones((4, 3), np.float32), 4, 256, 128)
    with pytest.raises(InputError, match=r"in groups of 0 are \[4, 1\] or \[1, 1\], not \[4, 2\]"):
        pack_scales(np.ones((4, 2), np.float32), 4, 256, 0)
    with pytest.raises(InputError, match="nf4 codes have no zero points"):
        pack_zeros(np.zeros((4, 1), np.int8), 4, 128, 0, "nf4")
    with pytest.raises(InputError, match="are int8 as the codes are, not uint8"):
        pack_zeros(np.zeros((4, 1), np.uint8), 4, 128, 0, "int4")
    with pytest.raises(InputError, match=r"are int32\[1, 64, 16\], not int32\[1, 64, 8\]"):
        unpack_codes(np.zeros((1, 64, 8), np.int32), "int4", 64, 128)
