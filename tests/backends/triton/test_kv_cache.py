"""The operators of the KV cache on CPUs: their laws, attention against float64, and what compilers make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import kv_codes
from qcompiler.backends.triton.kv_cache import QuantizedCache
from qcompiler.errors import InputError

FORMS = tuple(kv_codes.FORMS)
STEP = {"int8": 0.5 / 127, "f8e4m3": 2.0**-4, "int4": 1.0 / 15}
"""Largest error of a value, of the largest magnitude: half a step; of e4m3 half a unit in the last place at the top; of
int4 half a step for the code and half for the zero point, of a range of at most twice the magnitude."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(form: str, heads: int = 2, head_dim: int = 64, count: int = 9, length: int = 12) -> QuantizedCache:
    cache = QuantizedCache.allocate(2, heads, length, head_dim, form)
    cache.write(drawn(2, heads, count, head_dim, seed=1), drawn(2, heads, count, head_dim, seed=2))
    return cache


def held(cache: QuantizedCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as the cache has them, float64."""
    keys = kv_codes.dequantized(cache.k_codes, cache.k_scales, cache.k_zeros, cache.form)
    values = kv_codes.dequantized(cache.v_codes, cache.v_scales, cache.v_zeros, cache.form)
    return keys.double().numpy(), values.double().numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_comes_back_within_half_a_step(form: str, dtype: torch.dtype) -> None:
    x = drawn(3, 2, 7, 80, dtype=dtype) * 10 ** drawn(3, 2, 7, 1, seed=1)
    x[0, 0, 0] = 0.0
    back = kv_codes.dequantized(*kv_codes.quantized(x, form), form)
    top = x.float().abs().amax(-1, keepdim=True)
    assert ((back - x.float()).abs() <= STEP[form] * (1 + 1e-5) * top).all()


def test_the_laws_by_hand() -> None:
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([-3.0, 12.0, 0.4, -0.6])
    codes, scale, zero = kv_codes.quantized(row, "int4")  # steps of 1 from -3 to 12: 0 has the code 3
    assert (scale.item(), zero.item()) == (1.0, 3)
    assert codes[0, :3].tolist() == [0 | 15 << 4, 3 | 2 << 4, 3 | 3 << 4]
    row[0, :4] = torch.tensor([-127.0, 0.5, 1.5, -2.5])  # ties go to the even code
    codes, scale, _ = kv_codes.quantized(row, "int8")
    assert scale.item() == 1.0 and codes[0, :4].tolist() == [-127, 0, 2, -2]
    row[0, :4] = torch.tensor([448.0, 17.0, 2.0**-9, -(2.0**-10)])
    codes, scale, _ = kv_codes.quantized(row, "f8e4m3")
    assert scale.item() == 1.0 and codes[0, :4].float().tolist() == [448.0, 16.0, 2.0**-9, -0.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_read_back_as_none(form: str, bad: float) -> None:
    x = drawn(1, 1, 2, 32)
    x[0, 0, 0, 3] = bad
    back = kv_codes.dequantized(*kv_codes.quantized(x, form), form)
    assert back[0, 0, 0].isnan().all() and back[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_attention_is_that_of_what_the_cache_holds(form: str, dtype: torch.dtype, bound: float) -> None:
    cache = filled(form)
    cache.write(drawn(2, 2, 1, 64, seed=5), drawn(2, 2, 1, 64, seed=6), torch.tensor([[9], [3]]))
    assert cache.lengths.tolist() == [10, 9]
    q = drawn(2, 6, 1, 64, seed=7, dtype=dtype)
    y = cache.attend(q)
    keys, values = held(cache)
    for b, length in enumerate(cache.lengths.tolist()):
        for h in range(6):
            scores = keys[b, h // 3, :length] @ q[b, h, 0].double().numpy() / 8
            weights = np.exp(scores - scores.max())
            want = weights / weights.sum() @ values[b, h // 3, :length]
            got = y[b, h, 0].double().numpy()
            assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)  # one rounding to the type of q


@pytest.mark.parametrize("form", FORMS)
def test_long_caches_go_by_chunks_and_empty_ones_give_zeros(form: str) -> None:
    cache = filled(form, count=1100, length=1200)
    assert not QuantizedCache.allocate(2, 2, 8, 64, form).attend(drawn(2, 2, 1, 64)).any()
    assert QuantizedCache.allocate(2, 2, 0, 64, form).attend(drawn(2, 2, 1, 64)).eq(0).all()
    q = drawn(2, 2, 1, 64, seed=3)
    keys, values = (torch.from_numpy(t[:, :, :1100]).float() for t in held(cache))
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(cache.attend(q), want, rtol=1e-4, atol=1e-6)  # f32 sums in another order


def test_a_cache_is_a_quarter_to_an_eighth_of_floats() -> None:
    for form, most in (("int8", 0.29), ("f8e4m3", 0.29), ("int4", 0.17)):  # codes, 4 bytes of scale, 1 of zero point
        cache = QuantizedCache.allocate(1, 8, 64, 128, form)
        assert cache.nbytes <= most * 2 * 8 * 64 * 128 * 4


REFUSED = [
    (lambda: QuantizedCache.allocate(1, 1, 4, 64, "int3"), "form int8, f8e4m3, int4, not 'int3'"),
    (lambda: QuantizedCache.allocate(1, 1, 4, 72), "multiple of 16, not 72"),
    (lambda: filled("int8").write(drawn(2, 2, 4, 64), drawn(2, 2, 4, 64)), "9..12 lie outside a cache of 12"),
    (lambda: filled("int8").write(drawn(2, 3, 1, 64), drawn(2, 3, 1, 64)), "3 heads for a cache of 2 and 2"),
    (lambda: filled("int8").write(drawn(2, 2, 1, 64), drawn(2, 2, 1, 64), torch.arange(2)), r"int64\[1\]"),
    (lambda: filled("int8").attend(drawn(2, 3, 1, 64)), "3 heads for a cache of 2 sequences and 2 heads"),
    (lambda: filled("int8").attend(drawn(2, 2, 2, 64)), r"\[B, H, 1, D\]"),
    (lambda: filled("int4").attend(drawn(2, 2, 1, 64).double()), "not torch.float64"),
]


@pytest.mark.parametrize(("call", "told"), REFUSED)
def test_what_does_not_fit_is_refused(call: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()  # type: ignore[operator]


def test_lengths_beyond_the_cache_are_refused() -> None:
    cache = filled("int8")
    cache.lengths.fill_(13)
    with pytest.raises(InputError, match=r"lengths 13\.\.13 for a cache of 12 tokens"):
        cache.attend(drawn(2, 2, 1, 64))


@pytest.mark.parametrize("form", FORMS)
def test_the_operators_keep_the_rules_of_torch(form: str) -> None:
    cache = filled(form)
    keys = (cache.k_codes, cache.k_scales, cache.k_zeros)
    values = (cache.v_codes, cache.v_scales, cache.v_zeros)
    positions = torch.tensor([0, 4])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if form == "f8e4m3":
        checks.remove("test_schema")  # it compares arguments by allclose, which torch has not for 8-bit floats
    ops = torch.ops.qcompiler
    torch.library.opcheck(ops.kv_write, (*keys, drawn(2, 2, 2, 64), positions, form), test_utils=checks)
    given = (drawn(2, 4, 1, 64), *keys, *values, cache.lengths, 0.125, form)
    torch.library.opcheck(ops.kv_attention, given, test_utils=checks)


class Step(torch.nn.Module):
    """One step of decoding over a cache that the module owns."""

    def __init__(self, form: str) -> None:
        super().__init__()
        cache = QuantizedCache.allocate(1, 2, 8, 32, form)
        self.form = form
        self.register_buffer("k_codes", cache.k_codes)
        self.register_buffer("k_scales", cache.k_scales)
        self.register_buffer("k_zeros", cache.k_zeros)
        self.register_buffer("v_codes", cache.v_codes)
        self.register_buffer("v_scales", cache.v_scales)
        self.register_buffer("v_zeros", cache.v_zeros)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        keys = (self.k_codes, self.k_scales, self.k_zeros)
        values = (self.v_codes, self.v_scales, self.v_zeros)
        torch.ops.qcompiler.kv_write(*keys, k, position, self.form)
        torch.ops.qcompiler.kv_write(*values, v, position, self.form)
        y: torch.Tensor = torch.ops.qcompiler.kv_attention(q, *keys, *values, position + 1, 0.2, self.form)
        return y * 2


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_writes_compiles_and_exports(form: str) -> None:
    eager, compiled, exported = Step(form), Step(form), Step(form)
    inputs = [
        (drawn(1, 4, 1, 32, seed=t), drawn(1, 2, 1, 32, seed=t + 9), drawn(1, 2, 1, 32, seed=t + 20)) for t in (0, 1)
    ]
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    program = torch.export.export(exported, (*inputs[0], torch.tensor([0]))).run_decompositions()
    names = {str(node.target) for node in program.graph.nodes}
    assert any("kv_write" in n or "auto_functionalized" in n for n in names)
    carried = program.module()
    for t, given in enumerate(inputs):
        want = eager(*given, torch.tensor([t]))
        torch.testing.assert_close(run(*given, torch.tensor([t])), want)
        torch.testing.assert_close(carried(*given, torch.tensor([t])), want)
    assert torch.equal(compiled.k_codes.view(torch.uint8), eager.k_codes.view(torch.uint8))
