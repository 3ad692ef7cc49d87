"""Layouts lose nothing: every one has an inverse, and ONNX Runtime's own packer writes the same bytes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from qcompiler.backends.onnx import layouts
from qcompiler.dtypes import Array
from qcompiler.errors import InputError

BITS = st.sampled_from([2, 4, 8])
BLOCKS = st.sampled_from([16, 32, 64, 128, 256])
FEW = settings(max_examples=60, deadline=None)


def codes(n: int, k: int, bits: int, *, signed: bool, seed: int = 0) -> Array:
    """Random codes ``[n, k]``, the least and the greatest among them."""
    low = -(1 << (bits - 1)) if signed else 0
    out = np.random.default_rng(seed).integers(low, low + (1 << bits), (n, k))
    out.flat[0], out.flat[-1] = low, low + (1 << bits) - 1
    return out.astype(np.int8 if signed else np.uint8)


@FEW
@given(st.integers(1, 40), st.integers(1, 300), BITS, BLOCKS, st.booleans(), st.integers(0, 9))
def test_blocks_and_their_inverse(n: int, k: int, bits: int, block: int, signed: bool, seed: int) -> None:
    c = codes(n, k, bits, signed=signed, seed=seed)
    packed = layouts.blocks(c, bits, block)
    assert packed.shape == (n, -(-k // block), block * bits // 8)
    np.testing.assert_array_equal(layouts.unblocks(packed, bits, k, signed=signed), c)
    tail = layouts.unblocks(packed, bits, packed.shape[1] * block, signed=False)[:, k:]
    assert set(tail.flat) <= {1 << (bits - 1)}, "the padding is the middle code"


@FEW
@given(st.integers(1, 40), st.integers(1, 300), BITS, st.booleans(), st.integers(0, 9))
def test_rows_and_their_inverse(n: int, k: int, bits: int, signed: bool, seed: int) -> None:
    c = codes(n, k, bits, signed=signed, seed=seed)
    packed = layouts.rows(c, bits)
    assert packed.shape == (n, -(-k * bits // 8))
    np.testing.assert_array_equal(layouts.unrows(packed, bits, k, signed=signed), c)


@FEW
@given(st.integers(1, 40), st.integers(1, 20), BITS, st.booleans(), st.integers(0, 9))
def test_zeros_and_their_inverses(n: int, g: int, bits: int, signed: bool, seed: int) -> None:
    z = codes(n, g, bits, signed=signed, seed=seed)
    packed = layouts.pack_zeros(z, bits)
    assert packed.shape == (n, -(-g * bits // 8))
    np.testing.assert_array_equal(layouts.unpack_zeros(packed, bits, g, signed=signed), z)
    stored = layouts.byte_zeros(z, bits)
    assert stored.shape == (n, g, 1)
    np.testing.assert_array_equal(layouts.unbyte_zeros(stored, bits, signed=signed), z)


@FEW
@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 2, 8]), st.sampled_from("GCT"))
def test_spread_and_its_inverse(n: int, count: int, each: int, granularity: str) -> None:
    shape = {"G": (n, -(-count // each)), "C": (n, 1), "T": (1, 1)}[granularity]
    s = np.random.default_rng(n).standard_normal(shape).astype(np.float32)
    wide = layouts.spread(s, n, count, each)
    assert wide.shape == (n, count)
    np.testing.assert_array_equal(layouts.unspread(wide, shape, each), s)
    at = [0 if shape[1] == 1 else b // each for b in range(count)]
    np.testing.assert_array_equal(wide, np.broadcast_to(s[:, at], (n, count)))


def test_unspread_refuses_what_was_not_repeated() -> None:
    with pytest.raises(InputError, match="do not come from"):
        layouts.unspread(np.arange(6.0).reshape(2, 3), (2, 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 18])
def test_the_size_of_a_chunk_does_not_show(bits: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = codes(33, 129, bits, signed=True)
    whole = layouts.blocks(c, bits, 32)
    monkeypatch.setattr(layouts, "CHUNK_CODES", chunk)
    np.testing.assert_array_equal(layouts.blocks(c, bits, 32), whole)
    np.testing.assert_array_equal(layouts.blocks(np.asfortranarray(c), bits, 32), whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_bytes_are_those_of_the_runtime_s_own_packer(bits: int, block: int) -> None:
    """On weights that are their own codes (-2^(bits-1) in each block makes the scale 1) both write the same."""
    n, k = 5, 3 * block
    c = codes(n, k, bits, signed=True, seed=bits)
    c.reshape(n, -1, block)[:, :, 0] = -(1 << (bits - 1))
    packer = getattr(ort_state, f"quantize_matmul_{bits}bits")
    packed = np.zeros((n, 3, block * bits // 8), np.uint8)
    scale, zero = np.zeros((n, 3), np.float32), np.zeros((n, -(-3 * bits // 8)), np.uint8)
    packer(packed, np.ascontiguousarray(c.T.astype(np.float32)), scale, zero, block, n, k, True)
    np.testing.assert_array_equal(scale, np.ones((n, 3), np.float32))
    np.testing.assert_array_equal(layouts.blocks(c, bits, block), packed)


def test_packed_zeros_by_hand() -> None:
    z = np.array([[-8, 7, 0], [1, -1, 2]], np.int8)
    np.testing.assert_array_equal(layouts.pack_zeros(z, 4), [[0xF0, 0x08], [0x79, 0x0A]])


@pytest.mark.parametrize("bad", [np.zeros((2, 2), np.int16), np.zeros(4, np.int8)])
def test_what_is_no_matrix_of_codes_is_refused(bad: Array) -> None:
    with pytest.raises(InputError, match="int8 or uint8"):
        layouts.blocks(bad, 4, 16)
    with pytest.raises(InputError, match="2, 4 or 8"):
        layouts.blocks(np.zeros((2, 2), np.int8), 3, 16)


def test_packing_is_not_the_slow_part() -> None:
    """A thousand million weights should pack in seconds: 200 million a second, a tenth of what one core does."""
    c = codes(2048, 4096, 4, signed=True)
    best = min(_seconds(c) for _ in range(5))
    assert c.size / best > 200e6


def _seconds(c: Array) -> float:
    start = time.perf_counter()
    layouts.blocks(c, 4, 128)
    return time.perf_counter() - start


@FEW
@given(st.integers(1, 40), st.integers(1, 60), st.booleans(), st.booleans(), st.integers(0, 9))
def test_columns_and_kernels_and_their_inverses(n: int, k: int, signed: bool, flip: bool, seed: int) -> None:
    c = codes(n, k, 8, signed=signed, seed=seed)
    stored = layouts.columns(c, flip=flip)
    assert stored.shape == (k, n)
    assert stored.dtype == (np.uint8 if flip or not signed else np.int8)
    np.testing.assert_array_equal(layouts.uncolumns(stored, signed=signed), c)
    four = c.reshape(n, 1, k, 1)
    np.testing.assert_array_equal(layouts.unkernels(layouts.kernels(four, flip=flip), signed=signed), four)
    if flip and signed:
        np.testing.assert_array_equal(stored.T.astype(np.int16) - 128, c)


def test_codes_stored_higher_keep_their_shape() -> None:
    for array in (np.asarray(np.int8(-128)), np.asarray([-1, 0, 127], np.int8), np.asarray(np.uint8(3))):
        stored = layouts.higher(array)
        assert stored.shape == array.shape
        np.testing.assert_array_equal(layouts.lower(stored, signed=array.dtype == np.int8), array)
