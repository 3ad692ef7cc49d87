"""Packed weights: made once, again after a change, gone with the plain ones, alone in a module that asks for it."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qcompiler.backends.torch.packing import PACKED, linear_weight, nbytes_of, pack
from tests.backends.torch.test_ops import F32_STEP, Linear, Net, near


@pytest.fixture
def fresh() -> None:
    gc.collect()
    PACKED.clear()


@pytest.mark.usefixtures("fresh")
def test_a_weight_is_packed_once() -> None:
    layer = Linear(64, 256)
    layer()
    layer()
    assert len(PACKED) == 1
    layer.weight = nn.Parameter(layer.weight, requires_grad=False)  # the same storage under another name
    layer()
    layer.weight = layer.weight.detach()
    layer()
    assert len(PACKED) == 1
    assert PACKED.nbytes == nbytes_of(linear_weight(layer.weight)) <= 1.1 * layer.weight.numel()


@pytest.mark.usefixtures("fresh")
def test_views_of_one_storage_have_copies_of_their_own() -> None:
    both = Linear(24, 16)
    upper, lower = Linear(12, 16, seed=0), Linear(12, 16, seed=0)
    upper.weight, lower.weight = both.weight[:12], both.weight[12:]
    near(upper(), upper.wanted, F32_STEP)
    near(lower(), lower.wanted, F32_STEP)
    assert len(PACKED) == 2


@pytest.mark.usefixtures("fresh")
def test_a_change_in_place_packs_anew() -> None:
    layer = Linear(12, 20)
    before = layer()
    layer.weight.neg_()
    near(layer(), layer.wanted, F32_STEP)
    assert not torch.equal(layer(), before) and len(PACKED) == 1


@pytest.mark.usefixtures("fresh")
def test_a_freed_weight_takes_its_packed_copy_along() -> None:
    layer = Linear(12, 20)
    layer()
    alias = layer.weight.detach()
    del layer
    gc.collect()
    assert len(PACKED) == 1, "the storage still lives"
    del alias
    gc.collect()
    assert len(PACKED) == 0


@pytest.mark.usefixtures("fresh")
def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = Linear(12, 20)
        near(layer(), layer.wanted, F32_STEP)
        layer()
    assert len(PACKED) == 1


@pytest.mark.usefixtures("fresh")
def test_many_threads_pack_once() -> None:
    layer = Linear(64, 64)
    wanted, ready = layer.wanted, threading.Barrier(4)

    def work(_: int) -> torch.Tensor:
        ready.wait()
        return layer()

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(work, range(4)):
            near(y, wanted, F32_STEP)
    assert len(PACKED) == 1


@pytest.mark.usefixtures("fresh")
def test_a_module_that_was_called_is_saved_and_copied_as_before() -> None:
    net = Net().eval()
    net(torch.randn(1, 3, 6, 6))
    out = io.BytesIO()
    torch.save(net.state_dict(), out)
    assert torch.equal(copy.deepcopy(net).weight, net.weight)


@pytest.mark.usefixtures("fresh")
def test_a_module_may_keep_packed_weights_alone() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 6, 6)
    module = torch.export.export(net, (x,)).module()
    assert isinstance(module, torch.fx.GraphModule)
    wanted = net(x)
    plain = weakref.ref(net.weight)
    del net
    PACKED.clear()
    assert pack(module) == 2
    gc.collect()
    assert plain() is None
    assert torch.equal(module(x), wanted)
    assert len(PACKED) == 0 and pack(module) == 0


def test_a_weight_with_other_readers_stays_plain() -> None:
    class Tied(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.weight.sum()

    net, x = Tied().eval(), torch.randn(2, 3, 6, 6)
    module = torch.export.export(net, (x,)).module()
    assert isinstance(module, torch.fx.GraphModule)
    assert pack(module) == 1
    assert module.weight.dtype is torch.int8 and not module.weight.is_mkldnn
    assert torch.equal(module(x), net(x))
