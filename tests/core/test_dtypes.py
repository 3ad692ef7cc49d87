"""Packing is a bijection, and it is the packing of the ONNX package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from qcompiler import dtypes
from qcompiler.dtypes import TABLE, dtype, from_bytes, pack_bits, to_bytes, unpack_bits
from qcompiler.errors import InputError
from qcompiler.payload import BytesPayload, Computation, FilePayload, constant

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)


@given(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.data())
def test_unpack_undoes_pack(bits: int, signed: bool, data: st.DataObject) -> None:
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    codes = np.array(data.draw(st.lists(st.integers(lo, hi), max_size=33)), np.int8 if signed else np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, codes.size, signed=signed), codes)


def test_element_0_sits_in_the_low_bits_and_padding_is_zero() -> None:
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(np.array([-1, -8], np.int8), 4).tolist() == [0x8F]
    assert pack_bits(np.array([1, 2, 3, 0, 2], np.uint8), 2).tolist() == [0b00111001, 0b10]


@given(st.sampled_from(sorted(set(TABLE) - {"string"})), SHAPES, st.randoms(use_true_random=False))
def test_bytes_of_every_type_read_back(name: str, shape: tuple[int, ...], random) -> None:  # type: ignore[no-untyped-def]
    element = dtype(name)
    count = int(np.prod(shape, dtype=np.int64))
    if element.is_integer:
        values = np.array([random.randint(element.qmin, element.qmax) for _ in range(count)], element.storage)
    else:
        values = np.array([random.randint(0, 1) for _ in range(count)]).astype(element.storage)
    data = to_bytes(values.reshape(shape), element)
    assert len(data) == element.nbytes(count)
    back = from_bytes(data, element, shape)
    assert back.shape == shape
    assert back.tobytes() == values.tobytes()


ONNX_TYPES = {
    "int4": onnx.TensorProto.INT4,
    "uint4": onnx.TensorProto.UINT4,
    "int2": onnx.TensorProto.INT2,
    "uint2": onnx.TensorProto.UINT2,
    "f4e2m1": onnx.TensorProto.FLOAT4E2M1,
    "bf16": onnx.TensorProto.BFLOAT16,
    "f8e4m3": onnx.TensorProto.FLOAT8E4M3FN,
    "f8e5m2": onnx.TensorProto.FLOAT8E5M2,
    "f16": onnx.TensorProto.FLOAT16,
}


@pytest.mark.parametrize("name", sorted(ONNX_TYPES))
def test_our_bytes_are_those_of_the_onnx_package(name: str) -> None:
    element = dtype(name)
    raw = np.arange(7) if not element.is_integer else np.arange(element.qmin, element.qmax + 1)
    values = raw.astype(element.storage)
    tensor = onnx.TensorProto(data_type=ONNX_TYPES[name], dims=[len(values)], raw_data=to_bytes(values, element))
    theirs = numpy_helper.to_array(tensor)
    np.testing.assert_array_equal(theirs.astype(np.float64), values.astype(np.float64))


def test_a_short_buffer_and_an_unknown_type_are_refused() -> None:
    with pytest.raises(InputError, match="needs 8 bytes, got 7"):
        from_bytes(b"1234567", dtypes.F32, (2,))
    with pytest.raises(InputError, match="unknown dtype 'float'"):
        dtype("float")
    with pytest.raises(InputError, match="needs 4 bytes, got 3"):
        BytesPayload(b"123", dtypes.F32, ())


# -- payloads ------------------------------------------------------------------------------------------------


def test_a_file_payload_reads_rows_at_any_offset(tmp_path) -> None:  # type: ignore[no-untyped-def]
    values = np.arange(5000, dtype=np.float32).reshape(50, 100)
    file = tmp_path / "w.bin"
    file.write_bytes(b"abc" + values.tobytes())
    p = FilePayload(file, 3, dtypes.F32, (50, 100))
    np.testing.assert_array_equal(p.array(), values)
    np.testing.assert_array_equal(p.rows(7, 9), values[7:9])
    np.testing.assert_array_equal(p.rows(49, 99), values[49:])
    assert b"".join(bytes(c) for c in p.chunks(1000)) == values.tobytes()
    with pytest.raises(InputError, match=r"needs 20004 bytes, the file has 20003|needs"):
        FilePayload(file, 4, dtypes.F32, (50, 100))


def test_a_computation_runs_once_for_results_read_in_order() -> None:
    runs = []

    def fn(p):  # type: ignore[no-untyped-def]
        runs.append(1)
        return p.array().astype(np.int8), p.array()[:1].astype(np.float32)

    c = Computation("f", fn, [constant(np.arange(64.0))], [(dtypes.INT8, (64,)), (dtypes.F32, (1,))])
    codes, scale = c.outputs()
    assert codes.array().sum() == np.arange(64).sum()
    assert scale.array()[0] == 0
    assert len(runs) == 1
    scale.release()
    scale.array()
    assert len(runs) == 2


def test_a_computation_that_breaks_its_word_is_caught() -> None:
    c = Computation("f", lambda p: [p.array()], [constant(np.zeros(4))], [(dtypes.F32, (4,))])
    with pytest.raises(InputError, match="came out as float64"):
        c.outputs()[0].array()
