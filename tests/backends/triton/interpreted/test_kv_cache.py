"""Kernels of the KV cache in the interpreter: what is written code by code, attention against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompiler.backends.triton import kv_cache, kv_codes
from qcompiler.backends.triton.tiles import Tile

WRITE = Tile(16, 1, 1, 4, 1)
FORMS = tuple(kv_codes.FORMS)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BOUND = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 1.5e-3}
"""Half a unit in the last place of the output, 2^-11 and 2^-8, plus query and weights in float16, 2^-11 each."""


def empty_cache(batch: int, heads: int, tokens: int, head_dim: int, form: str) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zero points of bytes that mean nothing."""
    width = kv_codes.codes_width(head_dim, form)
    codes = torch.full((batch, heads, tokens, width), 0x55, dtype=torch.uint8).view(kv_codes.FORMS[form])
    scales = torch.full((batch, heads, tokens), float("nan"))
    return codes, scales, torch.full((batch, heads, tokens), 200, dtype=torch.uint8)


def drawn(*shape: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers, each last row of a magnitude of its own."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * 10 ** (spread * torch.randn(*shape[:-1], 1, generator=g))


def expected(x: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``[.., D]`` (of fp8: the bytes), f32 scales and zero points by the law, in f32 as the law says."""
    x = x.astype(np.float32)
    if form == "int4":
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        scale = ((high - low) / np.float32(15)).astype(np.float32)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low / scale), 0, 15)
        codes = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, 15).astype(np.uint8)
        return codes, scale, zero.astype(np.uint8)
    scale = (np.abs(x).max(-1) / np.float32(127 if form == "int8" else 448)).astype(np.float32)
    scale[scale == 0] = 1
    ratio = x / scale[..., None]
    if form == "int8":
        codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8).view(np.uint8)
    else:
        codes = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, scale, np.zeros(scale.shape, np.uint8)


def unpacked(codes: torch.Tensor, form: str) -> np.ndarray:
    raw = codes.contiguous().view(torch.uint8).numpy()
    return np.stack((raw & 15, raw >> 4), -1).reshape(*raw.shape[:-1], -1) if form == "int4" else raw


def values_of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: str) -> np.ndarray:
    """What a cache holds, float64."""
    raw = unpacked(codes, form)
    if form == "int4":
        assert zeros is not None
        plain = raw.astype(np.float64) - zeros.numpy().astype(np.float64)[..., None]
    else:
        plain = raw.view(np.int8 if form == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float64)
    return plain * scales.numpy().astype(np.float64)[..., None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("element", FLOATS)
def test_tokens_are_written_by_the_law_and_nothing_else_is_touched(form: str, element: torch.dtype) -> None:
    for head_dim, positions in ((64, [3]), (80, [5, 0, 2]), (128, list(range(18))[::-1])):
        x = drawn(2, 3, len(positions), head_dim, seed=head_dim).to(element)
        x[0, 1, 0] = 0.0
        codes, scales, zeros = empty_cache(2, 3, 20, head_dim, form)
        kv_cache.write_cuda(codes, scales, zeros if form == "int4" else None, x, torch.tensor(positions), form, WRITE)
        want, scale, zero = expected(x.float().numpy(), form)
        np.testing.assert_array_equal(unpacked(codes, form)[:, :, positions], want)
        np.testing.assert_array_equal(scales.numpy()[:, :, positions], scale)
        rest = [t for t in range(20) if t not in positions]
        assert (codes.view(torch.uint8)[:, :, rest] == 0x55).all()
        assert scales[:, :, rest].isnan().all()
        assert (zeros[:, :, rest] == 200).all()
        if form == "int4":
            np.testing.assert_array_equal(zeros.numpy()[:, :, positions], zero)


@pytest.mark.parametrize("form", FORMS)
def test_each_sequence_has_its_positions_and_those_outside_are_skipped(form: str) -> None:
    x = drawn(2, 2, 2, 64, seed=1)
    views = x.transpose(1, 2).contiguous().transpose(1, 2)  # strides of [B, S, H, D]
    codes, scales, zeros = empty_cache(2, 2, 6, 64, form)
    positions = torch.tensor([[1, -1], [6, 4]])
    kv_cache.write_cuda(codes, scales, zeros if form == "int4" else None, views, positions, form, WRITE)
    want, scale, _ = expected(x.numpy(), form)
    np.testing.assert_array_equal(unpacked(codes, form)[0, :, 1], want[0, :, 0])
    np.testing.assert_array_equal(unpacked(codes, form)[1, :, 4], want[1, :, 1])
    np.testing.assert_array_equal(scales.numpy()[1, :, 4], scale[1, :, 1])
    assert int(scales.isfinite().sum()) == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_read_back_as_none(form: str, bad: float) -> None:
    x = drawn(1, 1, 2, 64, seed=2)
    x[0, 0, 0, 5] = bad
    codes, scales, zeros = empty_cache(1, 1, 2, 64, form)
    kv_cache.write_cuda(codes, scales, zeros if form == "int4" else None, x, torch.arange(2), form, WRITE)
    assert scales[0, 0].isnan().tolist() == [True, False]


def attended(q: torch.Tensor, keys: np.ndarray, values: np.ndarray, lengths: list[int], scale: float) -> np.ndarray:
    """``[B, H, D]`` in float64."""
    batch, heads = q.shape[:2]
    group = heads // keys.shape[1]
    out = np.zeros((batch, heads, q.shape[3]))
    for b, length in enumerate(lengths):
        for h in range(heads if length else 0):
            scores = keys[b, h // group, :length] @ q[b, h, 0].double().numpy() * scale
            weights = np.exp(scores - scores.max())
            out[b, h] = weights / weights.sum() @ values[b, h // group, :length]
    return out


CASES = [
    (1, 1, 64, 1, 16, 1),
    (4, 2, 80, 2, 16, 3),
    (20, 1, 96, 2, 16, 1),
    (8, 2, 128, 1, 32, 5),
    (4, 2, 256, 3, 32, 2),
    (40, 2, 64, 1, 32, 2),
]
"""H, H_kv, D, B, rows of a tile, parts."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "batch", "rows", "split"), CASES)
def test_attention_is_that_of_what_the_cache_holds(
    form: str, heads: int, kv_heads: int, head_dim: int, batch: int, rows: int, split: int
) -> None:
    tokens = 70
    lengths = [tokens, 0, 17][:batch]
    element = FLOATS[(heads + split) % 3]
    tile = Tile(rows, 32, 1, 4, 1, split)
    caches = []
    for seed in (1, 2):
        held = empty_cache(batch, kv_heads, tokens, head_dim, form)
        zeros = held[2] if form == "int4" else None
        x = drawn(batch, kv_heads, tokens, head_dim, seed=seed, spread=0.5)
        kv_cache.write_cuda(held[0], held[1], zeros, x, torch.arange(tokens), form, WRITE)
        for b, length in enumerate(lengths):  # what lies beyond a sequence must not be read
            held[1][b, :, length:] = float("nan")
        caches.append((held[0], held[1], zeros))
    q = drawn(batch, heads, 1, head_dim, seed=3, spread=0.2).to(element)
    (k, ks, kz), (v, vs, vz) = caches
    y = kv_cache.attention_cuda(q, k, ks, kz, v, vs, vz, torch.tensor(lengths), head_dim**-0.5, form, tile)
    assert y.dtype == element and y.shape == q.shape
    want = attended(q, values_of(k, ks, kz, form), values_of(v, vs, vz, form), lengths, head_dim**-0.5)
    assert (
        not y[:, :, 0].numpy().astype(np.float64)[[n == 0 for n in lengths]].any() if element != torch.bfloat16 else 1
    )
    got = y[:, :, 0].double().numpy()
    assert not got[[n == 0 for n in lengths]].any()
    assert np.linalg.norm(got - want) <= BOUND[element] * np.linalg.norm(want)
