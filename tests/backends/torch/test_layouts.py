"""Layouts of torch's CPU kernels: bit for bit what torch's own packer makes, and nothing is lost on the way back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends.chips import detect_features
from qcompiler.backends.torch import layouts
from qcompiler.backends.torch.kernels import vector_width
from qcompiler.dtypes import BF16, INT4, UINT4, Array, DType
from qcompiler.errors import InputError
from qcompiler.scheme import parse_scheme

HERE = vector_width(detect_features())
PACKER = "torch.ops.aten._convert_weight_to_int4pack_for_cpu"


def torch_packed(nibbles: Array) -> Array:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(nibbles.astype(np.int32)), 1).numpy()


def test_the_vector_width_is_what_torch_says() -> None:
    assert torch.backends.cpu.get_cpu_capability().lower() == HERE


@pytest.mark.parametrize(
    ("features", "variable", "width"),
    [
        ({"avx2", "avx512"}, {}, "avx512"),
        ({"avx2"}, {}, "avx2"),
        ({"x86_64"}, {}, "default"),
        ({"avx2", "avx512"}, {"ATEN_CPU_CAPABILITY": "AVX2"}, "avx2"),
        ({"avx2", "avx512"}, {"ATEN_CPU_CAPABILITY": "default"}, "default"),
        ({"avx2"}, {"ATEN_CPU_CAPABILITY": "avx512"}, "avx2"),
        ({"avx2", "avx512"}, {"ATEN_CPU_CAPABILITY": "nonsense"}, "avx512"),
    ],
)
def test_the_vector_width_of_a_chip(features: set[str], variable: dict[str, str], width: str) -> None:
    assert vector_width(frozenset(features), variable) == width


sizes = st.tuples(st.integers(1, 13).map(lambda n: 16 * n), st.integers(1, 40).map(lambda k: 2 * k))


@pytest.mark.skipif(HERE not in layouts.ROWS, reason="torch packs in another way without AVX2")
@given(sizes, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_int4pack_is_torchs_own(size: tuple[int, int], seed: int) -> None:
    nibbles = np.random.default_rng(seed).integers(0, 16, size).astype(np.uint8)
    packed = layouts.int4pack(nibbles, HERE)
    assert np.array_equal(packed, torch_packed(nibbles))
    assert np.array_equal(layouts.int4unpack(packed, HERE), nibbles)


@pytest.mark.skipif(HERE != "avx512", reason="torch can be held down to AVX2, not raised to AVX-512")
def test_int4pack_is_torchs_own_on_the_lesser_chip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given_ = {f"{n}x{k}": rng.integers(0, 16, (n, k)).astype(np.uint8) for n in (16, 32, 80, 112, 128) for k in (2, 34)}
    np.savez(tmp_path / "in.npz", **given_)
    script = (
        "import sys, numpy as np, torch\n"
        "found = np.load(sys.argv[1])\n"
        f"pack = {PACKER}\n"
        "out = {k: pack(torch.from_numpy(found[k].astype(np.int32)), 1).numpy() for k in found}\n"
        "np.savez(sys.argv[2], width=torch.backends.cpu.get_cpu_capability(), **out)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, timeout=120)
    made = np.load(tmp_path / "out.npz")
    assert made["width"] == "AVX2"
    for key, nibbles in given_.items():
        assert np.array_equal(layouts.int4pack(nibbles, "avx2"), made[key]), key
        assert np.array_equal(layouts.repacked(made[key], "avx2", "avx512"), layouts.int4pack(nibbles, "avx512"))


@given(sizes, st.sampled_from([("avx2", "avx512"), ("avx512", "avx2"), ("avx2", "avx2")]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_repacking_loses_nothing(size: tuple[int, int], widths: tuple[str, str], seed: int) -> None:
    nibbles = np.random.default_rng(seed).integers(0, 16, size).astype(np.uint8)
    have, want = widths
    assert np.array_equal(
        layouts.repacked(layouts.int4pack(nibbles, have), have, want), layouts.int4pack(nibbles, want)
    )


def test_large_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    nibbles = np.random.default_rng(1).integers(0, 16, (208, 64)).astype(np.uint8)
    whole = {w: layouts.int4pack(nibbles, w) for w in layouts.ROWS}
    monkeypatch.setattr(layouts, "CHUNK_CODES", 1)
    for width, packed in whole.items():
        assert np.array_equal(layouts.int4pack(nibbles, width), packed)
        assert np.array_equal(layouts.int4unpack(packed, width), nibbles)


@pytest.mark.parametrize(("n", "k"), [(24, 32), (16, 33)])
def test_sizes_that_the_kernel_refuses(n: int, k: int) -> None:
    with pytest.raises(InputError, match=rf"N % 16 == 0 and K % 2 == 0, got N={n} K={k}"):
        layouts.int4pack(np.zeros((n, k), np.uint8), "avx2")


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([INT4, UINT4]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_nibbles_and_tables_lose_nothing(n: int, k: int, element: DType, seed: int) -> None:
    signed = element is INT4
    low = -8 if signed else 0
    codes = np.random.default_rng(seed).integers(low, low + 16, (n, k)).astype(np.int8 if signed else np.uint8)
    wide = layouts.nibbles_of(codes, n + 5, k + 3)
    assert (wide[n:] == 8).all()
    assert (wide[:, k:] == 8).all()
    assert np.array_equal(layouts.codes_of(wide, n, k, signed=signed), codes)
    for columns in (k, k + 9):
        stored = layouts.table(codes, columns)
        assert stored.shape == (n, -(-columns // 2))
        assert np.array_equal(layouts.untable(stored, k, signed=signed), codes)


def test_a_table_has_the_first_code_in_the_low_bits() -> None:
    codes = np.array([[1, 2, 15]], np.uint8)
    assert layouts.table(codes, 3).tolist() == [[0x21, 0x8F]]


@pytest.mark.parametrize("k", [16, 17, 70])
def test_int8_codes_lose_nothing(k: int) -> None:
    codes = np.random.default_rng(k).integers(-128, 128, (5, k)).astype(np.int8)
    stored = layouts.int8pack(codes)
    assert stored.shape == (5, layouts.padded(k, 16))
    assert not stored[:, k:].any()
    assert np.array_equal(layouts.int8unpack(stored, k), codes)


# -- scales and zeros ------------------------------------------------------------------------------------------

SCHEMES = [
    "int4 g32 asym",
    "uint4 g64 asym",
    "int4 g128 sym",
    "uint4 channel asym",
    "uint4 channel sym",
    "int4 tensor asym",
]


def parameters(text: str, n: int, k: int, seed: int) -> tuple[Array, Array | None]:
    rng = np.random.default_rng(seed)
    scheme = parse_scheme(text)
    shape = (1, 1) if scheme.granularity == "tensor" else (n, scheme.groups(k))
    scale = np.exp2(rng.uniform(-20, 5, shape)).astype(BF16.storage).astype(np.float32)
    d = scheme.dtype
    return scale, None if scheme.symmetric else rng.integers(d.qmin, d.qmax + 1, shape).astype(d.storage)


@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_scales_and_zeros_lose_nothing(text: str, n: int, k: int, seed: int) -> None:
    """Every zero point of 4 bits comes back, though 3, 5, 6 and 7 steps from the middle are rounded in bf16."""
    scheme = parse_scheme(text)
    scale, zero = parameters(text, n, k, seed)
    for block in (b for b in (32, 64, 128) if b <= (scheme.group_size or 128)):
        stored = layouts.scales_and_zeros(scale, zero, scheme, (n, k, block), "fc")
        assert stored.shape == (-(-k // block), layouts.padded(n, 16), 2)
        assert stored.dtype == BF16.storage
        found, zeros = layouts.parameters_of(stored, scheme, (scale.shape[0], scale.shape[1]), block)
        assert np.array_equal(found, scale)
        assert (zeros is None) == (zero is None)
        if zero is not None and zeros is not None:
            assert zeros.dtype == zero.dtype
            assert np.array_equal(zeros, zero)


def test_scales_by_hand() -> None:
    scale, zero = np.array([[0.5, 2.0]], np.float32), np.array([[3, 8]], np.uint8)
    stored = layouts.scales_and_zeros(scale, zero, parse_scheme("uint4 g32 asym"), (1, 64, 32), "fc").astype(float)
    assert stored[:, 0].tolist() == [[0.5, 2.5], [2.0, 0.0]]  # (8 - 3) * 0.5, (8 - 8) * 2
    signed = layouts.scales_and_zeros(
        scale, zero.astype(np.int8) - np.int8(8), parse_scheme("int4 g32 asym"), (1, 64, 32), "fc"
    )
    assert np.array_equal(signed.astype(float), stored)


def test_scales_that_bf16_does_not_hold_are_refused() -> None:
    scale = np.array([[0.1], [0.5]], np.float32)
    with pytest.raises(InputError, match=r"'fc': 1 of 2 scales, such as 0\.1.*8 significant bits.*QC205"):
        layouts.scales_and_zeros(scale, None, parse_scheme("int4 channel sym"), (2, 32, 32), "fc")


def test_blocks_of_one_group_that_differ_are_no_layout_of_it() -> None:
    stored = np.ones((2, 16, 2), BF16.storage)
    stored[1] = 2
    with pytest.raises(InputError, match="do not come from"):
        layouts.parameters_of(stored, parse_scheme("int4 g64 sym"), (1, 1), 32)


def test_codes_of_another_form_are_refused() -> None:
    for codes in (np.zeros(4, np.int8), np.zeros((2, 2), np.int32)):
        with pytest.raises(InputError, match=r"codes are \[N, K\] in int8 or uint8"):
            layouts.nibbles_of(codes, 16, 32)
