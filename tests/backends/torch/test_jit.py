"""torch.compile(backend="qcompiler"): sites, bits, graph breaks, options, refusals; eager underneath."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import weights
from qcompiler.backends.torch.jit import cache as jit_cache
from qcompiler.report.model import Report
from qcompiler.rtn import quantize_weight

IDS = torch.randint(0, 50, (2, 3), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A table that an output layer shares, a norm, two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.layers = nn.ModuleList([nn.Linear(96, 64)])
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers[0](self.norm(torch.relu(self.up(self.table(ids))))))
        return out


class Broken(nn.Module):
    """Two layers of one class whose forward dynamo cannot read as a whole."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.q(x))
            torch._dynamo.graph_break()
            out: Tensor = self.o(y)
            return out

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test."""
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each weight that was quantized."""
    seen: list[str] = []

    def counted(weight: Any, scheme: Any, **options: Any) -> Any:
        seen.append(scheme.text)
        return quantize_weight(weight, scheme, **options)

    monkeypatch.setattr(weights, "quantize_weight", counted)
    return seen


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="qcompiler", options={"inner": "eager", **options})


BOUND = 0.02
"""What 8-bit weights (steps of 1/127 of the largest, 0.7 % of the output) and bf16 activations (0.2 %) may lose."""


def distance(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, in parts of that of ``wanted``."""
    return float((got - wanted.detach()).norm() / wanted.detach().norm())


def statuses(report: Report) -> dict[str, str]:
    return {s.name: s.status for s in report.sites}


# -- what comes out ------------------------------------------------------------------------------------------


def test_every_site_is_fused_and_the_numbers_are_those_of_the_quantized_weights() -> None:
    model, reports = Net().eval(), list[Report]()
    out = compiled(model, recipe="w8a16", report=reports)(IDS)
    (report,) = reports
    assert report.accepted
    assert report.source.kind == "torch.compile"
    assert statuses(report) == dict.fromkeys(["table", "up", "layers.0", "head"], "fused")
    assert report.sites[3].tied_to == "table"
    assert all(s.sqnr_db is not None and s.sqnr_db > 35 for s in report.sites)
    expected = Net().eval()
    for module in (expected.table, expected.up, expected.layers[0]):
        found = quantize_weight(module.weight.detach().numpy(), _scheme("int8 channel sym"))
        module.weight.data = torch.from_numpy(found.codes * found.scale[:, None])
    # The kernels take activations in bf16, whose steps are 2^-8: four of them in a row.
    torch.testing.assert_close(out, expected(IDS), rtol=0, atol=4 * 2**-8 * float(out.abs().max()))


def _scheme(text: str) -> Any:
    from qcompiler.scheme import parse_scheme

    return parse_scheme(text).with_axis(0)


def test_both_roads_fuse_the_same_sites(tmp_path: Any) -> None:
    reports: list[Report] = []
    compiled(Net().eval(), recipe="w4a16", report=reports)(IDS)
    artifact = qcompiler.compile(Net().eval(), args=(IDS,), target="torch-cpu", recipe="w4a16", out=tmp_path / "m.pt2")
    ahead = {(s.name, s.op, s.scheme, s.status): s.kernel for s in artifact.report.sites}
    assert {(s.name, s.op, s.scheme, s.status): s.kernel for s in reports[0].sites} == ahead
    assert {s.name: s.bytes for s in reports[0].sites} == {s.name: s.bytes for s in artifact.report.sites}


def test_a_fresh_process_finds_the_backend_by_name() -> None:
    code = (
        "import torch; assert 'qcompiler' in torch.compiler.list_backends();"
        "m = torch.nn.Linear(64, 32).eval();"
        "f = torch.compile(m, backend='qcompiler', options={'inner': 'eager'});"
        "print(tuple(f(torch.ones(2, 64)).shape), f(torch.ones(2, 64)).requires_grad);"
        "import qcompiler; print([s.status for r in qcompiler.compiled_reports() for s in r.sites])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(2, 32) False", "['fused']"], done.stderr


def test_grad_mode_no_grad_and_inference_mode_give_the_same() -> None:
    model = Net().eval()
    run = compiled(model)
    plain = run(IDS)
    with torch.no_grad():
        quiet = run(IDS)
    with torch.inference_mode():
        inference = run(IDS)
    assert not plain.requires_grad
    assert torch.equal(plain, quiet)
    assert torch.equal(plain, inference)


def test_a_graph_without_weights_runs_and_has_no_report() -> None:
    reports: list[Report] = []
    run = torch.compile(lambda x: torch.sin(x) + 1, backend="qcompiler", options={"inner": "eager", "report": reports})
    assert torch.equal(run(torch.ones(3)), torch.sin(torch.ones(3)) + 1)
    assert reports == []


def test_a_buffer_that_is_written_to_keeps_what_was_written() -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("count", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            out: Tensor = self.linear(x) + self.count
            return out

    model = Counting().eval()
    run = compiled(model)
    with torch.no_grad():
        first, second = run(torch.ones(2, 64)), run(torch.ones(2, 64))
    torch.testing.assert_close(second, first + 1)
    assert torch.equal(model.count, torch.full((64,), 2.0))


# -- shapes and shared weights -------------------------------------------------------------------------------


def test_sizes_open_after_the_second_and_nothing_is_quantized_twice(quantized: list[str]) -> None:
    reports: list[Report] = []
    run = compiled(Net().eval(), report=reports)
    shapes = [run(torch.zeros(2, n, dtype=torch.long)).shape[1] for n in (3, 5, 7, 11)]
    assert shapes == [3, 5, 7, 11]
    assert len(reports) == 2
    assert len(quantized) == 3  # the table serves its layer too
    assert [s.sqnr_db for s in reports[1].sites] == [s.sqnr_db for s in reports[0].sites]


def test_dynamic_true_compiles_once(quantized: list[str]) -> None:
    reports: list[Report] = []
    run = torch.compile(Net().eval(), backend="qcompiler", dynamic=True, options={"inner": "eager", "report": reports})
    for shape in ((2, 3), (4, 9), (3, 2)):
        assert run(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 50)
    assert len(reports) == 1


def test_another_compilation_of_the_same_model_packs_nothing(quantized: list[str]) -> None:
    model = Net().eval()
    first = compiled(model)(IDS)
    torch.compiler.reset()
    assert torch.equal(compiled(model)(IDS), first)
    assert len(quantized) == 3
    compiled(model, recipe="w8a16")(IDS)
    assert len(quantized) == 5  # the two linears in other codes; the table is the same


def test_what_was_packed_dies_with_the_model() -> None:
    model = Net().eval()
    run = compiled(model)
    run(IDS)
    parameter = weakref.ref(model.up.weight)
    before = len(jit_cache._results)
    del model, run
    gc.collect()
    assert parameter() is None
    assert len(jit_cache._results) <= before - 6


def test_graph_breaks_name_sites_as_the_model_does_and_each_layer_has_its_own_weights(quantized: list[str]) -> None:
    model, reports = Broken().eval(), list[Report]()
    x = torch.randn(2, 64)
    run = compiled(model, recipe="w8a16", report=reports, skip=["layers.1.o"])
    out = run(x)
    found = [statuses(r) for r in reports]
    names = ["layers.0.q", "layers.0.o", "layers.1.q", "layers.1.o"]
    assert sorted(n for f in found for n in f) == sorted(names)
    assert {n: s for f in found for n, s in f.items()} == dict.fromkeys(names, "fused") | {"layers.1.o": "skipped"}
    assert len(quantized) == 3
    assert torch.equal(run(x), out)
    assert len(reports) == 4
    assert len(quantized) == 3
    assert distance(out, model(x)) < BOUND


def test_a_glob_in_vain_is_an_error_in_a_part_of_a_model_too() -> None:
    with pytest.raises(qcompiler.RecipeError, match=r"QC402: insert-qdq\.skip = 'nothing' matched nothing"):
        compiled(Broken().eval(), skip=["nothing"])(torch.randn(2, 64))
    torch.compiler.reset()
    with pytest.raises(qcompiler.RecipeError, match=r"QC402: insert-qdq\.skip = 'nothing' matched nothing"):
        compiled(Net().eval(), skip=["nothing"])(IDS)


# -- changed parameters --------------------------------------------------------------------------------------


def test_a_parameter_written_in_place_is_packed_anew(quantized: list[str]) -> None:
    model = nn.Linear(64, 64).eval()
    x, run = torch.randn(3, 64), compiled(model, recipe="w8a16")
    run(x)
    with torch.no_grad():
        model.weight.mul_(2)
    twice = run(x)
    assert len(quantized) == 2
    assert distance(twice, model(x)) < BOUND


def test_a_parameter_that_was_replaced_is_packed_anew(quantized: list[str]) -> None:
    model = nn.Linear(64, 64).eval()
    x, run = torch.randn(3, 64), compiled(model, recipe="w8a16")
    run(x)
    model.weight = nn.Parameter(torch.randn(64, 64))
    other = run(x)
    assert len(quantized) == 2
    assert distance(other, model(x)) < BOUND


def test_biases_and_norms_are_read_at_each_call(quantized: list[str]) -> None:
    model = Net().eval()
    run = compiled(model)
    before = run(IDS)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
    assert not torch.equal(run(IDS), before)
    assert len(quantized) == 3


# -- refusals ------------------------------------------------------------------------------------------------


def test_training_mode_is_refused_in_one_sentence() -> None:
    with pytest.raises(qcompiler.InputError, match=r"inference, and the module of '[\w.]+' is in training mode; call"):
        compiled(Net())(IDS)
    model = Net()
    run = torch.compile(lambda ids: model(ids), backend="qcompiler", options={"inner": "eager"})
    with pytest.raises(qcompiler.InputError, match="is in training mode"):
        run(IDS)


def test_a_model_that_goes_back_to_training_is_refused() -> None:
    model = Net().eval()
    run = compiled(model)
    out = run(IDS)
    model.train()
    with pytest.raises(qcompiler.InputError, match=r"is in training mode|was put in training mode since"):
        run(IDS)
    assert torch.equal(compiled(model.eval())(IDS), out)


def test_an_input_that_needs_gradients_is_refused_by_name() -> None:
    run = compiled(nn.Linear(64, 64).eval())
    with pytest.raises(qcompiler.InputError, match="its input 'input' needs gradients; detach it"):
        run(torch.randn(2, 64, requires_grad=True))
    with torch.no_grad():
        assert run(torch.randn(2, 64, requires_grad=True)).shape == (2, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipes": "w4a16"}, "no option 'recipes'; it takes recipe, target, skip, settings"),
        ({"inner": "triton"}, "'inner' is 'inductor' or 'eager', not 'triton'"),
        ({"on_reject": "ignore"}, "'on_reject' is 'error' or 'float', not 'ignore'"),
        ({"release_weights": "yes"}, "'release_weights' is True or False, not 'yes'"),
        ({"recipe": "w5a16"}, "unknown recipe 'w5a16'"),
        ({"recipe": 4}, "a name, a .toml file or one line of passes, not 4"),
        ({"settings": {"emit.external": True}}, "torch.compile writes no file"),
        ({"settings": {"insert-qdq.wieghts": "int4"}}, "has no option 'wieghts'"),
        ({"phases": ["decode"]}, "maps names to M"),
        ({"report": 3}, "a list or a function"),
    ],
)
def test_options_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(qcompiler.RecipeError, match=told):
        compiled(nn.Linear(64, 64).eval(), **options)(torch.ones(2, 64))


def test_recipes_settings_skips_and_phases_are_those_of_compile() -> None:
    text = 'normalise, insert-qdq{weights = "int8 channel sym"}, fold-constants, fuse-linear, choose-layout, dce'
    reports: list[Report] = []
    options = {"recipe": text, "settings": {"insert-qdq.weights": "int4 g32 sym"}, "phases": {"decode": 1}}
    compiled(Net().eval(), **options, skip="layers.*", report=reports.append)(IDS)
    schemes = {s.name: (s.scheme, s.status) for s in reports[0].sites}
    assert schemes["up"] == ("int4 g32 sym", "fused")
    assert schemes["layers.0"] == ("", "skipped")
    assert schemes["table"] == ("", "skipped")
    assert reports[0].phases == {"decode": 1}
    assert {tuple(s.kernel) for s in reports[0].sites if s.status == "fused"} == {("decode",)}


def test_a_rejected_graph_raises_with_its_report_or_runs_in_float_and_says_so_once() -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(2, 64)
    with pytest.raises(qcompiler.RejectedError, match="QC201") as caught:
        compiled(model, recipe="w2a16")(x)
    assert [s.status for s in caught.value.report.sites] == ["unfused"]
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = compiled(Net().eval(), recipe="w2a16", on_reject="float")
        assert torch.equal(run(IDS), Net().eval()(IDS))
        run(torch.zeros(2, 9, dtype=torch.long))
    texts = [str(w.message) for w in told if "runs in float" in str(w.message)]
    assert len(texts) == 1
    assert "up, layers.0" in texts[0]


def test_weights_that_hold_nan_are_a_rejection() -> None:
    model = nn.Linear(64, 64).eval()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(qcompiler.RejectedError, match="QC301"):
        compiled(model)(torch.ones(2, 64))


def test_the_codes_are_those_of_the_other_road() -> None:
    """One set of bits: a packed weight is a lossless layout of the codes that every target gets."""
    model = nn.Linear(64, 64, bias=False).eval()
    out = compiled(model, recipe="w8a16")(torch.eye(64))
    found = quantize_weight(model.weight.detach().numpy(), _scheme("int8 channel sym"))
    # A row of the identity picks one code: its product with 1 is exact in bf16, and the scale is multiplied in f32.
    np.testing.assert_array_equal(out.numpy().T, found.codes.astype(np.float32) * found.scale[:, None])
