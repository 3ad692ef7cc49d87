"""``wn_linear`` on a CPU with integer codes: its numbers, checks and claims, and how torch traces and exports it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompiler.backends.triton import weight_only, weight_only_integer
from qcompiler.backends.triton.forms import FORMS
from qcompiler.errors import InputError
from qcompiler.scheme import ZeroKind
from tests.backends.triton.weight_cases import ROUNDOFF, Weight, draw

N, K = 70, 300

CASES: list[tuple[str, int, ZeroKind]] = [
    ("int4", 128, "none"),
    ("int4", 64, "float"),
    ("uint4", 32, "int"),
    ("uint4", 128, "float"),
    ("int8", 0, "none"),
    ("uint8", 256, "int"),
    ("int2", 64, "int"),
    ("uint2", 0, "none"),
]


def linear(x: torch.Tensor, weight: Weight, n: int, act: str = "none", **extra: torch.Tensor) -> torch.Tensor:
    rest = [extra.get(name) for name in ("bias", "mul", "residual")]
    y: torch.Tensor = torch.ops.qcompiler.wn_linear(x, *weight.operands, *rest, n, weight.group, weight.form, act)
    return y


@pytest.mark.parametrize(("form", "group", "zero"), CASES)
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_agrees_with_float64(form: str, group: int, zero: ZeroKind, element: torch.dtype) -> None:
    """It rounds f32 activations to bf16 and the result to its type; its sums are f32."""
    weight = draw(form, N, K, group, zero)
    x = torch.randn((2, 3, K), generator=torch.Generator().manual_seed(0)).to(element)
    rounded = (x.bfloat16() if element == torch.float32 else x).double().numpy()
    wanted = rounded @ weight.values.T
    size = np.abs(rounded) @ np.abs(weight.values).T
    y = linear(x, weight, N)
    assert y.shape == (2, 3, N)
    assert y.is_contiguous()
    # K + 8 roundings of f32 in a sum; weights are products of two f32, as are zero points of scales.
    allowed = (K + 8) * 2.0**-24 * size + ROUNDOFF[element] * np.abs(wanted) + 2.0**-20 * weight.steps.max()
    assert (np.abs(y.double().numpy() - wanted) <= allowed).all()


def test_few_weights_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw("int4", 200, K, 32, "int")
    x = torch.randn((3, K), generator=torch.Generator().manual_seed(0))
    whole = linear(x, weight, 200)
    monkeypatch.setattr(weight_only, "CHUNK", 1)
    torch.testing.assert_close(linear(x, weight, 200), whole, rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("act", weight_only.ACTIVATIONS)
def test_what_follows_the_product(act: str) -> None:
    weight, g = draw("int4", N, K, 128), torch.Generator().manual_seed(0)
    x, bias = torch.randn((3, K), generator=g), torch.randn(N, generator=g)
    mul, residual = torch.randn((1, N), generator=g), torch.randn((3, N), generator=g)
    sums = linear(x, weight, N).double() + bias.double()
    functions: dict[str, Any] = {
        "none": lambda v: v,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }
    wanted = functions[act](sums) * mul.double() + residual.double()
    y = linear(x, weight, N, act, bias=bias, mul=mul, residual=residual)
    torch.testing.assert_close(y.double(), wanted, rtol=2.0**-20, atol=2.0**-20)  # some roundings of f32


def arguments(**changed: Any) -> tuple[Any, ...]:
    weight = draw("int4", N, K, 128, "int")
    given = {
        "x": torch.zeros(2, K),
        "codes": weight.codes,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "global_scale": None,
        "bias": None,
        "mul": None,
        "residual": None,
        "n": N,
        "group": 128,
        "form": "int4",
        "act": "none",
    }
    return tuple((given | changed).values())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "x": (
        {"x": torch.zeros(2, K, dtype=torch.int8)},
        r"takes x \[.., K\] in f32, f16 or bf16, not torch.int8\[2, 300\]",
    ),
    "form": ({"form": "int3"}, "no form of codes is called 'int3'"),
    "codes": (
        {"x": torch.zeros(2, 400)},
        r"codes of a weight \[70, 400\] are int32\[4, 128, 16\], not .*\[3, 128, 16\]",
    ),
    "group": ({"group": 96}, "groups are .*, not 96"),
    "scales": ({"scales": torch.zeros(3, 70)}, r"scales are .* of shape \[3, 128\], not torch.float32\[3, 70\]"),
    "zeros": ({"zeros": torch.zeros(3, 128, dtype=torch.uint8)}, r"zeros are torch.int16 or .*, not torch.uint8"),
    "global": ({"global_scale": torch.zeros(2)}, r"one torch.float32, not torch.float32\[2\]"),
    "act": ({"act": "tanh"}, "knows the activations none, relu, .*, not 'tanh'"),
    "bias": ({"bias": torch.zeros(71)}, r"bias of 70 features has shape \[70\], not \[71\]"),
    "mul": ({"mul": torch.zeros(3, 70)}, r"mul \[3, 70\] does not broadcast to the result \[2, 70\]"),
    "residual": ({"residual": torch.zeros(70, dtype=torch.int32)}, "residual is f32, f16 or bf16, not torch.int32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    """In the same words where it runs and where it is traced."""
    changed, match = WRONG[case]
    with pytest.raises(InputError, match=match):
        torch.ops.qcompiler.wn_linear(*arguments(**changed))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InputError, match=match):
        torch.ops.qcompiler.wn_linear(*arguments(**changed))


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_the_operator_keeps_its_promises(form: str) -> None:
    weight = draw(form, N, K, 128, "int")
    for element in (torch.float32, torch.bfloat16):
        x, mul = torch.randn(2, 3, K, dtype=element), torch.randn(3, N)
        given = (x, *weight.operands, None, mul, None, N, 128, form, "silu")
        torch.library.opcheck(torch.ops.qcompiler.wn_linear.default, given)


class Layer(torch.nn.Module):
    def __init__(self, weight: Weight) -> None:
        super().__init__()
        for name in ("codes", "scales", "zeros"):
            self.register_buffer(name, getattr(weight, name))
        self.group, self.form = weight.group, weight.form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.qcompiler.wn_linear(
            x + 1, self.codes, self.scales, self.zeros, None, None, None, None, N, self.group, self.form, "relu"
        )
        return y * 2


def test_it_compiles_and_exports_as_one_node_with_any_number_of_rows() -> None:
    layer, x = Layer(draw("int4", N, K, 128, "int")), torch.randn(4, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(
        layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}}
    ).run_decompositions()
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls.count("qcompiler.wn_linear.default") == 1
    more = torch.randn(9, K)
    torch.testing.assert_close(exported.module()(more), layer(more))


@pytest.mark.parametrize("sm", [80, 89, 90, 100])
def test_every_row_claims_something_for_every_architecture(sm: int) -> None:
    integers = [f for f, known in FORMS.items() if known.kind == "integer"]
    rows = {claim.row for claim in weight_only_integer.claims(sm)}
    assert rows == {f"torch-cuda/wn.{how}.{form}" for how in ("gemv", "gemm") for form in integers}
