"""Words of float codes: permutations of bits are bijections, tables are NF4, typed scales come back exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qcompiler.backends.triton import layouts, layouts_float
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.float_codes import NF4

STORAGE = {
    "f4e2m1": ml_dtypes.float4_e2m1fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
    "nf4": np.uint8,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}


def _codes(form: str, n: int, k: int, seed: int) -> Array:
    high = 256 if form.startswith("f8") else 16
    return np.random.default_rng(seed).integers(0, high, (n, k), dtype=np.uint8).view(STORAGE[form])


@pytest.mark.parametrize("form", STORAGE)
@given(n=st.integers(1, 130), k=st.integers(1, 300), seed=st.integers(0, 9))
def test_codes_come_back(form: str, n: int, k: int, seed: int) -> None:
    codes = _codes(form, n, k, seed)
    back = layouts.unpack_codes(layouts.pack_codes(codes, form), form, n, k)
    assert back.dtype == codes.dtype
    assert np.array_equal(back.view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize("form", layouts_float.ARRANGED)
def test_every_word_has_one_arrangement(form: str) -> None:
    """The map of 2^32 words acts on each 16 bits alone, and what the two give never overlaps."""
    low = layouts_float.arrange(np.arange(1 << 16, dtype=np.uint32), form)
    high = layouts_float.arrange(np.arange(1 << 16, dtype=np.uint32) << np.uint32(16), form)
    zero = layouts_float.arrange(np.zeros(1, np.uint32), form)[0]
    assert len(np.unique(low)) == len(np.unique(high)) == 1 << 16
    mixed = (low[:, None] ^ zero)[::257] ^ high[None, ::251]
    words = np.arange(1 << 16, dtype=np.uint32)[::257, None] | (np.arange(1 << 16, dtype=np.uint32) << 16)[None, ::251]
    assert np.array_equal(layouts_float.arrange(words, form), mixed)
    assert np.array_equal(layouts_float.restore(mixed, form), words)


def test_words_of_integers_are_left() -> None:
    words = np.arange(8, dtype=np.uint32)
    assert layouts_float.arrange(words, "int4") is words
    assert layouts_float.restore(words, "f8e4m3") is words


def _rotated(words: NDArray[np.uint32], turn: int) -> NDArray[np.uint32]:
    return words if not turn else (words >> np.uint32(turn)) | (words << np.uint32(32 - turn))


@pytest.mark.parametrize("form", layouts_float.E2M1_FORMS)
def test_a_rotation_brings_a_pair_of_e2m1_to_its_bits(form: str) -> None:
    """Expected values: ml_dtypes for the codes, and the bits of bfloat16 for 2^-126 of them."""
    natural = np.random.default_rng(1).integers(0, 1 << 32, 1000, dtype=np.uint32)
    words = layouts_float.arrange(natural, form)
    for pair, turns in enumerate(layouts_float.E2M1_TURNS):
        found = np.zeros_like(words)
        for target, turn in zip(layouts_float.E2M1_TARGETS, turns, strict=True):
            found |= _rotated(words, turn) & np.uint32((1 << target) * 0x10001)
        for half in range(2):
            code = ((natural >> np.uint32(16 * half + 4 * pair)) & np.uint32(15)).astype(np.uint8)
            bits = ((found >> np.uint32(16 * half)) & np.uint32(0xFFFF)).astype(np.uint16)
            assert np.array_equal(
                bits.view(ml_dtypes.bfloat16).astype(np.float64) * 2.0**126,
                code.view(ml_dtypes.float4_e2m1fn).astype(np.float64),
            )


@pytest.mark.parametrize("bf16", [True, False])
def test_the_table_of_nf4_is_rounded_to_nearest(bf16: bool) -> None:
    bits = np.array(layouts_float.nf4_bits(bf16), np.uint16)
    short: type = ml_dtypes.bfloat16 if bf16 else np.float16
    values = bits.view(short) if bf16 else bits.view(np.float16) * layouts_float.NF4_FACTOR
    assert np.array_equal(
        values.astype(np.float32), NF4[list(layouts_float.NF4_ORDER)].astype(short).astype(np.float32)
    )


@pytest.mark.parametrize("bf16", [True, False])
def test_two_lookups_of_eight_make_one_of_sixteen(bf16: bool) -> None:
    bits = layouts_float.nf4_bits(bf16)
    for byte, tables in enumerate(layouts_float.prmt_tables(bits)):
        for nibble in range(16):
            found = 0
            for table, name in zip(tables, (nibble, nibble ^ 8), strict=True):
                octet = table >> (8 * (name & 7)) & 0xFF
                found ^= octet if name < 8 else 0xFF * (octet >> 7)
            assert found == bits[nibble] >> (8 * byte) & 0xFF


@pytest.mark.parametrize(("group", "kind"), [(32, np.uint8), (16, ml_dtypes.float8_e4m3fn)])
@given(n=st.integers(1, 130), k=st.integers(1, 300))
def test_scales_of_one_byte_come_back(group: int, kind: type, n: int, k: int) -> None:
    scales = np.random.default_rng(n).integers(0, 127, (n, -(-k // group)), dtype=np.uint8).view(kind)
    laid = layouts.pack_scales(scales, n, k, group)
    assert laid.shape == (layouts.scale_rows(k, group), layouts.padded(n, 64))
    back = layouts.unpack_scales(laid, n, k, group)
    assert np.array_equal(back.view(np.uint8), scales.view(np.uint8))


def test_the_bytes_of_a_row_and_tile_lie_together() -> None:
    """Of rows 0 and 1 and 256 columns, by hand: NVFP4 takes even groups of a tile first, MXFP4 all in order."""
    fours = np.arange(16, dtype=np.uint8).reshape(2, 8)
    assert layouts.pack_scales(fours, 2, 256, 32).reshape(-1)[:8].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    eights = np.arange(32, dtype=np.uint8).reshape(2, 16)
    held = layouts.pack_scales(eights, 2, 256, 16).reshape(2, 64, 8)
    assert held[0, 1].tolist() == [16, 18, 20, 22, 17, 19, 21, 23]
    assert held[1, 0].tolist() == [8, 10, 12, 14, 9, 11, 13, 15]


def test_scales_of_one_byte_have_small_groups() -> None:
    with pytest.raises(InputError, match="groups of 16"):
        layouts.pack_scales(np.zeros((4, 2), np.uint8), 4, 128, 64)
