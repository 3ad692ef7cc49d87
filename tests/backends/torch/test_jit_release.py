"""Option release_weights: memory goes, guards hold, touching what is gone is one clear sentence."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.backends.torch.jit import releasing as jit_release
from qcompiler.report.model import Report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.norm(self.a(x)))
        return out


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(
        model, backend="qcompiler", options={"inner": "eager", "recipe": "w8a16", "release_weights": True, **options}
    )


def test_the_packed_weights_are_freed_and_everything_goes_on() -> None:
    reports: list[Report] = []
    x, kept = torch.randn(3, 64), Net().eval()
    expected = torch.compile(kept, backend="qcompiler", options={"inner": "eager", "recipe": "w8a16"})(x)
    model = Net().eval()
    run = compiled(model, report=reports)
    assert torch.equal(run(x), expected)
    assert [n for n, p in model.named_parameters() if jit_release.is_freed(p)] == ["a.weight", "b.weight"]
    assert model.a.weight.shape == (64, 64)
    assert torch.equal(run(x), expected)
    assert len(reports) == 1  # the guards of dynamo hold
    assert run(torch.randn(5, 64)).shape == (5, 32)
    assert run(torch.randn(7, 64)).shape == (7, 32)
    assert len(reports) == 2
    assert torch.equal(run(x), expected)


def test_compilers_that_are_reset_find_what_was_packed() -> None:
    model, x = Net().eval(), torch.randn(3, 64)
    expected = compiled(model)(x)
    torch.compiler.reset()
    with pytest.raises(qcompiler.InputError, match="was freed"):
        model(x)
    assert torch.equal(compiled(model)(x), expected)
    with pytest.raises(qcompiler.InputError, match="was freed"):
        model(x)


def test_a_freed_weight_that_another_recipe_needs_is_a_clear_error() -> None:
    model, x = Net().eval(), torch.randn(3, 64)
    compiled(model)(x)
    with pytest.raises(qcompiler.InputError, match=r"'a.weight' was freed .* needs its values again"):
        compiled(model, recipe="w4a16")(x)
    torch.compiler.reset()
    with pytest.raises(qcompiler.InputError, match=r"'a\.weight' was freed"):
        compiled(model, skip=["a"])(x)


TOUCHES: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m(torch.ones(1, 64)),
    "state_dict": lambda m: m.state_dict(),
    "save": lambda m: torch.save(m, io.BytesIO()),
    "deepcopy": lambda m: copy.deepcopy(m),
    "half": lambda m: m.half(),
    "sum": lambda m: m.a.weight.sum(),  # type: ignore[union-attr,operator]
    "numpy": lambda m: m.a.weight.numpy(),  # type: ignore[union-attr,operator]
    "data_ptr": lambda m: m.a.weight.data_ptr(),  # type: ignore[union-attr,operator]
    "item": lambda m: m.a.weight[0, 0],  # type: ignore[union-attr,index]
    "copy": lambda m: m.load_state_dict(Net().state_dict()),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_touching_a_freed_weight_names_it_and_the_option(touch: str) -> None:
    model = Net().eval()
    compiled(model)(torch.ones(3, 64))
    with pytest.raises((qcompiler.InputError, RuntimeError), match=r"'a.weight' was freed .* release_weights=True"):
        TOUCHES[touch](model)
    assert "a.weight" in repr(model.a.weight)
    assert "Linear" in repr(model)


def test_what_is_read_in_float_and_what_others_share_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(64, 64), nn.Linear(64, 64)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.up(self.table(ids)) @ self.table.weight.t() + self.table.weight.sum()
            return out

    model = Tied().eval()
    compiled(model)(torch.zeros(2, 3, dtype=torch.long))
    assert [n for n, p in model.named_parameters() if jit_release.is_freed(p)] == ["up.weight"]
    model = Net().eval()  # type: ignore[assignment]
    view = model.a.weight.detach()  # type: ignore[union-attr,operator]
    before = view.clone()
    compiled(model)(torch.ones(3, 64))
    assert torch.equal(view, before)  # a tensor on the same storage keeps it


def test_assigned_parameters_are_used() -> None:
    model, x = Net().eval(), torch.randn(3, 64)
    run = compiled(model)
    run(x)
    other = {k: torch.randn(v.shape) for k, v in Net().state_dict().items()}
    model.load_state_dict(other, assign=True)
    fresh = Net().eval()
    fresh.load_state_dict(other)
    # 8-bit weights and bf16 activations, two layers.
    assert float((run(x) - fresh(x)).detach().norm() / fresh(x).detach().norm()) < 0.04


MEMORY = """
import torch, resource
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
m = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(8)]).eval()
f = torch.compile(m, backend="qcompiler", options={"inner": "eager", "release_weights": True})
torch.compile(torch.nn.Linear(64, 64).eval(), backend="qcompiler", options={"inner": "eager"})(torch.ones(1, 64))
before = resident()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.no_grad(): f(torch.ones(1, 2048))
print(before - resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak)
"""


def test_resident_memory_falls_and_the_peak_is_one_weight() -> None:
    """Eight weights of 16 MiB in float leave, 2.25 MiB each in codes come; a weight at a time."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    fallen, rise = map(int, done.stdout.split())
    assert fallen > 90 << 20, done.stderr
    assert rise < 64 << 20, done.stderr
