"""The code that inductor generates: a buffer of floats that holds a whole weight is found, in Python and in C++."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompiler.backends.torch.evidence import verify_file
from qcompiler.backends.torch.generated import Expanded, inductor_expands, judge_package
from qcompiler.backends.torch.kernels import target

CPU = target("torch-cpu")
N, K = 96, 128

# What torch 2.13 writes for linear(x, w.float() * s), shortened.
PYTHON = """
cpp_fused__to_copy_mul_0 = async_compile.cpp_pybinding(['const int8_t*', 'const float*', 'float*'], r'''
''')
cpp_fused_relu_1 = async_compile.cpp_pybinding(['const float*', 'float*'], r'''
''')
    def call(self, args):
        buf0 = empty_strided_cpu((96, 128), (128, 1), torch.float32)
        cpp_fused__to_copy_mul_0(arg0_1, arg1_1, buf0)
        buf1 = empty_strided_cpu((s77, 96), (96, 1), torch.float32)
        extern_kernels.mm(arg3_1, reinterpret_tensor(buf0, (128, 96), (1, 128), 0), out=buf1)
        buf2 = empty_strided_cpu((128, 96), (96, 1), torch.float32)
        cpp_fused_relu_1(buf1, buf2)
"""
CPP = """
    constants_info_[0].name = "w";
    constants_info_[0].dtype = cached_torch_dtype_int8;
    constants_info_[0].shape = {96, 128};
    constants_info_[0].original_fqn = "layer.w";
    constants_info_[1].name = "s";
    constants_info_[1].dtype = cached_torch_dtype_float32;
    constants_info_[1].shape = {96, 1};
    static constexpr int64_t int_array_0[] = {96L, 128L};
    static constexpr int64_t int_array_1[] = {128L, 1L};
    CHECK(aoti_torch_empty_strided(2, int_array_0, int_array_1, cached_torch_dtype_bfloat16, cpu, 0, &buf0_handle));
    RAIIAtenTensorHandle buf0(buf0_handle);
    cpp_fused__to_copy_mul_0((const int8_t*)(w.data_ptr()), (const float*)(s.data_ptr()), (float*)(buf0.data_ptr()));
    const int64_t int_array_2[] = {s77, 96L};
    CHECK(aoti_torch_empty_strided(2, int_array_2, int_array_1, cached_torch_dtype_float32, cpu, 0, &buf1_handle));
"""


def test_a_weight_in_the_python_wrapper() -> None:
    (found,) = inductor_expands(PYTHON, [(N, K)])
    assert (found.buffer, found.shape, found.dtype, found.bytes) == ("buf0", (96, 128), "float32", 4 * N * K)
    assert not inductor_expands(PYTHON, [(N, K + 1)])


@pytest.mark.parametrize("shape", [(K, N), (N, 4, K // 4), (N * K,), (2, N // 2, K)])
def test_a_weight_moved_is_the_same_weight(shape: tuple[int, ...]) -> None:
    text = PYTHON.replace("(96, 128), (128, 1)", f"({', '.join(map(str, shape))},), (1,)")
    assert [e.shape for e in inductor_expands(text, [(N, K)])] == [shape]


def test_sizes_that_only_multiply_to_the_same() -> None:
    text = PYTHON.replace("(96, 128), (128, 1)", "(48, 256), (256, 1)")
    assert not inductor_expands(text, [(N, K)])


def test_a_weight_in_the_cpp_wrapper() -> None:
    (found,) = inductor_expands(CPP, [(N, K)])
    assert found == Expanded("buf0", (96, 128), "bfloat16", found.line, (96, 128))


def test_a_dequantizing_operator_that_is_left() -> None:
    (found,) = inductor_expands("    buf3 = torch.ops.torchao.dequantize_affine.default(a, b)\n", [])
    assert found.buffer == "buf3"


def package(path: Path, **texts: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"model/data/aotinductor/model/{name.replace('_', '.')}", text)
    return path


def test_a_package_is_judged_by_its_code(tmp_path: Path) -> None:
    judged = verify_file(package(tmp_path / "model.pt2", a_cpp=CPP), CPU)
    assert [(f.code, f.op) for f in judged.findings] == [("QC101", "layer.w")]
    assert [(s.name, s.n, s.k, s.status) for s in judged.sites] == [("layer.w", N, K, "unfused")]
    fine = CPP.replace("const int8_t*", "const float*") + "\n aoti_torch_cpu__weight_int4pack_mm_for_cpu(x);\n"
    judged = verify_file(package(tmp_path / "model.pt2", a_cpp=fine), CPU)
    assert not judged.findings
    assert "_weight_int4pack_mm_for_cpu" in judged.evidence.notes[-1]


def test_a_package_that_calls_a_dequantize(tmp_path: Path) -> None:
    calls = '{"nodes": [{"target": "torchao::dequantize_affine"}]}'
    judged = judge_package(package(tmp_path / "model.pt2", a_cpp="", b_json=calls))
    assert judged is not None
    assert [f.op for f in judged.findings] == ["torchao::dequantize_affine"]


class Scaled(nn.Module):
    """A dequantize in all but name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(N, K, dtype=torch.int8))
        self.register_buffer("s", torch.ones(N, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.float() * self.s)


@pytest.mark.slow
def test_inductor_itself() -> None:
    utils = pytest.importorskip("torch._inductor.utils")
    with torch.no_grad():
        _, codes = utils.run_and_get_code(torch.compile(Scaled(), dynamic=True), torch.randn(4, K))
    assert [e.shape for code in codes for e in inductor_expands(code, [(N, K)])] == [(N, K)]


@pytest.mark.slow
def test_aotinductor_itself(tmp_path: Path) -> None:
    dims = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(Scaled(), (torch.randn(4, K),), dynamic_shapes=dims)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    judged = verify_file(Path(path), CPU)
    assert [(f.code, f.op) for f in judged.findings] == [("QC101", "w")]
