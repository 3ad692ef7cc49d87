"""The fast quantizer: the bits of the reference in every orientation, tiling and number of threads; memory; figures."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import quantize_matmul_4bits

from qcompiler import clipping, numerics, rtn, tiling
from qcompiler.clipping import best_factor
from qcompiler.dtypes import BF16, F16, F32, F64, INT4, DType, dtype_of, unpack_bits
from qcompiler.errors import BadWeights, InputError
from qcompiler.payload import FilePayload, Payload, RandomPayload
from qcompiler.rtn import RtnResult, quantize_weight
from qcompiler.scheme import Scheme, parse_scheme

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(7)


def scheme_of(text: str, axis: int | None) -> Scheme:
    return parse_scheme(text).with_axis(axis)


def same_bits(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def same_result(found: RtnResult, codes: Array, scale: Array, zero: Array | None) -> bool:
    return same_bits(found.codes, codes) and same_bits(found.scale, scale) and same_bits(found.zero, zero)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Scheme, Any]:
    name = draw(st.sampled_from(["int4", "uint4", "int8", "uint8", "int2", "uint2"]))
    zero = draw(st.sampled_from(["asym", "asymf"] if name.startswith("u") else ["sym", "asym", "asymf"]))
    granularity = draw(st.sampled_from(["g16", "g16", "g32", "g128", "channel", "tensor"]))
    axis = None if granularity == "tensor" else draw(st.integers(0, 1))
    element = draw(st.sampled_from([F32, F16, BF16, F64]))
    shape = draw(st.tuples(st.integers(0, 150), st.integers(0, 150)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.0, 1e-44, 1e-38, 1e-7, 0.02, 1.0, 6e4, 1e30, 3e38]))
    x = rng.standard_normal(shape).clip(-3, 3) / 3 * size
    if draw(st.booleans()):
        x = np.rint(x / (size or 1) * 20) / 2 * (size or 1) / 10  # ties
    x[rng.random(shape) < draw(st.sampled_from([0.0, 0.7]))] = -0.0
    limit = 65504.0 if element is F16 else np.inf
    clip = draw(st.sampled_from(["absmax", "absmax", "mse"]))
    return x.clip(-limit, limit).astype(element.storage), scheme_of(f"{name} {granularity} {zero}", axis), clip


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of a few rows or columns, so that every small matrix takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn, "TILE", 700)
        patch.setattr(rtn, "COLUMNS", 20)
        yield


@given(cases(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_bits_are_those_of_the_reference(case: tuple[Array, Scheme, Any], threads: int) -> None:
    x, scheme, clip = case
    scale, zero = numerics.choose_qparams(x, scheme, clip)
    codes = numerics.quantize(x, scale, zero, scheme)
    with small_tiles():
        assert same_result(quantize_weight(x, scheme, clip=clip, threads=threads), codes, scale, zero)


def flipped(scheme: Scheme) -> Scheme:
    return scheme if scheme.axis is None else scheme.with_axis(1 - scheme.axis)


@given(cases(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_orientation_changes_no_bit(case: tuple[Array, Scheme, Any], contiguous: bool) -> None:
    """[K, N] under axis 0 gives the transposes of [N, K] under axis 1, directly or with ``transpose``."""
    x, scheme, clip = case
    if scheme.granularity == "tensor":
        clip = "absmax"  # a tie between two ranges of a whole tensor may go either way
    here = quantize_weight(x, scheme, clip=clip, threads=1)
    turned = np.ascontiguousarray(x.T) if contiguous else x.T
    with small_tiles():
        there = quantize_weight(turned, flipped(scheme), clip=clip, threads=2)
        back = quantize_weight(turned, flipped(scheme), clip=clip, threads=2, transpose=True)
    codes, scale, zero = parts(here)
    assert same_result(there, codes.T, scale.T, None if zero is None else zero.T)
    assert same_result(back, *parts(here))
    assert back.codes.flags.c_contiguous
    assert back.scale.flags.c_contiguous


def parts(found: RtnResult) -> tuple[Array, Array, Array | None]:
    return found.codes, found.scale, found.zero


@pytest.mark.parametrize(
    ("text", "axis", "shape"),
    [
        ("int4 g128 asym", 1, (700, 4096 + 40)),
        ("int4 g128 asym", 0, (4096 + 40, 700)),
        ("int4 g32 sym", 1, (3, 600_000)),
        ("int8 g1024 asym", 0, (3000, 1100)),
        ("int8 channel sym", 0, (300, 5000)),
        ("int8 channel sym", 1, (5000, 300)),
        ("uint8 tensor asym", None, (2100, 600)),
    ],
)
@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_tiles_of_their_real_size(text: str, axis: int | None, shape: tuple[int, int], clip: Any) -> None:
    if clip == "mse" and min(shape) < 10:
        shape = (shape[0], 40_000)
    x = RNG.standard_normal(shape).astype(np.float32)
    scheme = scheme_of(text, axis)
    scale, zero = numerics.choose_qparams(x, scheme, clip)
    codes = numerics.quantize(x, scale, zero, scheme)
    found = quantize_weight(x, scheme, clip=clip, threads=2)
    assert same_result(found, codes, scale, zero)
    turned = quantize_weight(x, scheme, clip=clip, threads=2, transpose=True)
    assert same_bits(turned.codes, codes.T)


@pytest.mark.parametrize(("text", "axis"), [("int4 channel sym", 1), ("int4 tensor asym", None)])
def test_sums_of_errors_are_the_same_bits_however_the_rows_are_cut(text: str, axis: int | None) -> None:
    """Not only the choice between ranges, which rarely hangs on the last bit."""
    x = RNG.standard_normal((3000, 70)).astype(np.float32)
    seen: list[bytes] = []

    def note(errors: Array) -> Array:
        seen.append(errors.tobytes())
        return best_factor(errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn, "best_factor", note)
        patch.setattr(numerics, "best_factor", note)
        patch.setattr(clipping, "best_factor", note)
        patch.setattr(clipping, "STRIP", 1 << 30)
        numerics.choose_qparams(x, scheme_of(text, axis), "mse")
        for tile in (700, 1 << 17, 1 << 20):
            patch.setattr(rtn, "TILE", tile)
            quantize_weight(x, scheme_of(text, axis), clip="mse", threads=2)
    assert len(seen) == 4
    assert len(set(seen)) == 1


# -- the same as others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "block"), [(256, 64, 32), (200, 48, 64), (512, 96, 128)])
def test_asymmetric_4_bits_agree_with_onnx_runtime(k: int, n: int, block: int) -> None:
    """ORT's packer has the same law in float32, but for the 8 significant bits of a scale, so each group's range is 15
    times such a scale. Then scales agree within one unit in the last place, and a code or zero point differs by one
    only where the quotient is within 1e-4 of a tie (it multiplies with the reciprocal)."""
    w = RNG.standard_normal((k, n)).astype(np.float32)
    steps = RNG.uniform(0.1, 0.5, (-(-k // block), n)).astype(BF16.storage).astype(np.float32)
    lows = -steps * (2 * RNG.integers(80, 160, steps.shape) + 1).astype(np.float32) / 32  # no tie is at an end
    for group, (low, step) in enumerate(zip(lows, steps, strict=True)):
        part = w[group * block : (group + 1) * block]
        np.clip(part, low, low + 15 * step, out=part)
        part[0], part[-1] = low, low + 15 * step
    found = quantize_weight(w, scheme_of(f"uint4 g{block} asym", 0), transpose=True)
    groups = -(-k // block)
    packed = np.zeros((n, groups, block // 2), np.uint8)
    scales, zeros = np.zeros((n, groups), np.float32), np.zeros((n, (groups + 1) // 2), np.uint8)
    padded = np.pad(w, ((0, groups * block - k), (0, 0)))
    quantize_matmul_4bits(packed, padded, scales, zeros, block, n, k, False)
    assert found.zero is not None
    assert (np.abs(scales - found.scale) <= np.spacing(scales)).all()
    exact = -np.minimum(minima(w, block), 0).T / found.scale
    ort_zero = np.stack([unpack_bits(row, 4, groups, signed=False) for row in zeros])
    off = ort_zero.astype(int) - found.zero
    assert (np.abs(off) <= 1).all()
    assert (np.abs(exact % 1 - 0.5)[off != 0] < 1e-4).all()
    ort_codes = unpack_bits(packed, 4, packed.size * 2, signed=False).reshape(n, -1)[:, :k]
    wide = np.repeat(found.scale, block, axis=1)[:, :k]
    same_zero = np.repeat(off == 0, block, axis=1)[:, :k]
    differs = (ort_codes.astype(int) - found.codes != 0) & same_zero
    assert (np.abs(np.abs(w.T / wide) % 1 - 0.5)[differs] < 1e-4).all()
    assert differs.mean() < 1e-3


def minima(w: Array, block: int) -> Array:
    return np.stack([w[at : at + block].min(axis=0) for at in range(0, len(w), block)])


# -- payloads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 6, 4096])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_file_at_any_offset(tmp_path: Path, element: DType, offset: int, axis: int) -> None:
    x = RNG.standard_normal((300, 290)).astype(element.storage)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(offset) + x.tobytes() + b"tail")
    payload = FilePayload(path, offset, element, (300, 290))
    scheme = scheme_of("int4 g32 asym", axis)
    assert same_result(
        quantize_weight(payload, scheme, transpose=True), *parts(quantize_weight(x, scheme, transpose=True))
    )


class Counted(Payload):
    """Notes what was asked for."""

    def __init__(self, values: Array) -> None:
        self.values, self.dtype, self.shape = values, dtype_of(values.dtype), values.shape
        self.asked: list[tuple[int, int]] = []

    def array(self) -> Array:
        raise AssertionError("the whole tensor was asked for")

    def rows(self, start: int, stop: int) -> Array:
        self.asked.append((start, stop))
        return self.values[start:stop]


@pytest.mark.parametrize(
    ("text", "axis", "times"), [("int4 g32 sym", 1, 1), ("int4 g128 asym", 0, 1), ("int8 channel sym", 1, 2)]
)
def test_a_payload_with_rows_is_read_in_parts(text: str, axis: int, times: int) -> None:
    """Once, or twice where a group spans the parts; never more than two tiles' worth at a time."""
    payload = Counted(RNG.standard_normal((4096, 512)).astype(np.float32))
    quantize_weight(payload, scheme_of(text, axis), threads=1)
    assert sum(stop - start for start, stop in payload.asked) == times * 4096
    assert max(stop - start for start, stop in payload.asked) * 512 <= 2 * tiling.TILE


def test_a_payload_without_rows_is_computed_once() -> None:
    class Slow(RandomPayload):
        count = 0

        def array(self) -> Array:
            self.count += 1
            return super().array()

    payload = Slow(3, F32, (2048, 512))
    quantize_weight(payload, scheme_of("int8 tensor sym", None))
    assert payload.count == 1


CHILD = """
import re, sys
from pathlib import Path
from qcompiler.dtypes import F32, F16
from qcompiler.payload import FilePayload
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import parse_scheme
path, text, axis, transpose = sys.argv[1:]
scheme = parse_scheme(text).with_axis(int(axis))
small = FilePayload(Path(path), 0, F32, (512, 512))
quantize_weight(small, scheme, threads=2, transpose=transpose == "1")
# ru_maxrss would start at the size of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
found = quantize_weight(FilePayload(Path(path), 0, F32, (16384, 4096)), scheme, threads=2, transpose=transpose == "1")
print((peak() - before) * 1024 - found.codes.nbytes - found.scale.nbytes * 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("text", "axis", "transpose"),
    [("int4 g128 asym", 1, 0), ("int4 g128 asym", 0, 1), ("int8 g1024 sym", 0, 1), ("int8 channel sym", 1, 1)],
)
def test_memory_is_the_codes_and_a_few_tiles(tmp_path: Path, text: str, axis: int, transpose: int) -> None:
    """A mapped matrix of 256 MiB: beside 64 MiB of codes at most 24 MiB, mapped pages included."""
    path = tmp_path / "weights.bin"
    with path.open("w+b") as f:
        f.truncate(16384 * 4096 * 4)
        while f.read(1 << 24):  # into the page cache: only pages there are mapped around the one asked for
            pass
    command = [sys.executable, "-c", CHILD, str(path), text, str(axis), str(transpose)]
    extra = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert extra <= 24 << 20


# -- figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int4 g32 asym", "int4 g32 sym", "int8 g32 asym", "int2 g32 asymf", "int8 channel sym"]
)
@pytest.mark.parametrize("element", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_sums_are_those_of_all_weights(text: str, element: DType, axis: int) -> None:
    """Against float64. Float32 sums of at most 600 squares: 1e-4 is far above their error, far below what shows."""
    x = (RNG.standard_normal((600, 530)) * 0.02).astype(element.storage)
    scheme = scheme_of(text, axis)
    found = quantize_weight(x, scheme, threads=2)
    wide = x.astype(np.float64)
    lost = wide - numerics.dequantize(found.codes, found.scale, found.zero, scheme, F64)
    assert found.stats["weights"] == x.size
    assert found.stats["sum_sq"] == pytest.approx((wide**2).sum(), rel=1e-4)
    assert found.stats["sum_sq_error"] == pytest.approx((lost**2).sum(), rel=1e-4)
    assert found.stats["scale_min"] == found.scale.astype(np.float64).min()
    assert found.stats["scale_max"] == found.scale.astype(np.float64).max()
    assert found.stats["groups"] == found.scale.size
    assert found.stats["zero_groups"] == 0
    assert found.stats["all_scales_equal"] is False


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e19, 1e37])
def test_the_sums_neither_overflow_nor_vanish(size: float) -> None:
    x = (RNG.standard_normal((64, 64)).clip(-3, 3) * size).astype(np.float32)
    stats = quantize_weight(x, scheme_of("int8 g32 asym", 1)).stats
    assert stats["sum_sq"] == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-4)
    assert 30 < 10 * np.log10(stats["sum_sq"] / stats["sum_sq_error"]) < 60


def test_weights_on_the_grid_lose_nothing() -> None:
    x = RNG.integers(-8, 8, (64, 128)).astype(np.float32) / 4
    x[:, 0::32], x[:, 1::32] = -2.0, 1.75
    stats = quantize_weight(x, scheme_of("int4 g32 asym", 1)).stats
    assert (stats["sum_sq_error"], stats["scale_min"], stats["scale_max"]) == (0.0, 0.25, 0.25)
    assert stats["all_scales_equal"] is True


def test_groups_of_zeros_are_counted_and_left_out_of_the_scales() -> None:
    x = np.zeros((4, 128), np.float32)
    x[1, 40], x[2, 100] = 7.5, 15.0
    found = quantize_weight(x, scheme_of("int4 g32 sym", 1))
    assert found.stats["zero_groups"] == 14
    assert (found.stats["scale_min"], found.stats["scale_max"]) == (1.0, 2.0)
    empty = quantize_weight(np.zeros((4, 128), np.float32), scheme_of("int4 channel asym", 0))
    assert empty.stats["zero_groups"] == 4
    assert (empty.stats["scale_min"], empty.stats["sum_sq"], empty.stats["sum_sq_error"]) == (1.0, 0.0, 0.0)
    assert (empty.codes == INT4.qmin).all()


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4 g32 asym", "int8 channel sym", "int8 tensor sym"])
@pytest.mark.parametrize("element", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_infinity_are_counted_over_all_tiles(text: str, element: DType, axis: int) -> None:
    x = RNG.standard_normal((90, 110)).astype(element.storage)
    x[0, 0], x[50, 70], x[89, 109], x[89, 0] = np.nan, np.inf, -np.inf, -np.nan
    scheme = scheme_of(text, None if "tensor" in text else axis)
    with small_tiles(), pytest.raises(BadWeights, match="4 of 9900 values are NaN or infinite") as caught:
        quantize_weight(x, scheme, threads=2)
    assert caught.value.count == 4


@pytest.mark.parametrize(
    ("weight", "text", "axis", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), "int4 g32 sym", 1, r"only float matrices .* not f32\[2, 3, 4\]"),
        (np.zeros((2, 3), np.int8), "int4 g32 sym", 1, r"only float matrices .* not int8\[2, 3\]"),
        (np.zeros((2, 3), np.float32), "f16 channel sym", 1, "not f16"),
        (-np.ones((2, 3), np.float32), "uint4 g32 sym", 1, "values down to -1 have no code in uint4"),
    ],
)
def test_misfits_are_named(weight: Array, text: str, axis: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_weight(weight, scheme_of(text, axis))
