"""A float .pt2 file and a compiled one side by side: results and sites by name, and what does not match."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.export import export_program
from qcompiler.backends.torch.pairing import TorchPair
from qcompiler.backends.torch.sitewise import site_taps
from qcompiler.errors import InputError
from qcompiler.evaluating import evaluate
from qcompiler.reader import parse
from tests.backends.torch.measured import K, Lowered, net, written

X = np.random.default_rng(3).standard_normal((6, K), np.float32)
IDS = np.random.default_rng(4).integers(0, 12, (3, 8))


def test_results_and_sites(tmp_path: Path) -> None:
    """The reference's figure is that of the int8 weights alone, by NumPy: bf16 activations add little to it."""
    model = net()
    reference, compiled = written(model, tmp_path / "float.pt2"), written(Lowered(model), tmp_path / "compiled.pt2")
    found = evaluate(compiled, reference, {"x": X}, per_site=True, output="scores")
    assert found.samples == 6
    assert found.top1 is not None
    assert found.top1.rows == 6
    assert "outputs that are no floats are not compared: best" in found.notes
    with torch.no_grad():
        want = model(torch.from_numpy(X))["scores"].double()
        lowered = Lowered(model).fc
        xb = torch.from_numpy(X).bfloat16().double()
        got = xb @ (lowered.codes.double() * lowered.weight_scales[:, None].double()).T + lowered.bias.double()
    expected = float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))
    # the kernel also rounds its result to bf16, 8 bits: it may lose a few dB, and gain none
    assert expected - 6 < (found.outputs["scores"].sqnr_db or 0) < expected + 1
    (site,) = found.sites
    assert (site.name, site.op, site.reason) == ("fc", "linear", "")
    assert site.sqnr_db == pytest.approx(found.outputs["scores"].sqnr_db, abs=1e-6)


class _Speaker(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids))
        return out


def test_perplexity_of_a_language_model(tmp_path: Path) -> None:
    paths = []
    for name, scale in (("float", 1.0), ("compiled", 0.5)):
        shapes = ({0: Dim("batch", max=8), 1: Dim("sequence", max=16)},)
        program = export_program(_Speaker(scale).eval(), (torch.zeros(2, 4, dtype=torch.long),), shapes)
        paths.append(tmp_path / f"{name}.pt2")
        torch.export.save(program, paths[-1])
    found = evaluate(paths[1], paths[0], {"input_ids": IDS}, metrics=["ppl", "kl", "top1"])
    assert found.perplexity is not None
    assert found.perplexity.tokens == 21
    for scale, figure in ((1.0, found.perplexity.reference), (0.5, found.perplexity.compiled)):
        ids = torch.from_numpy(IDS)
        with torch.no_grad():
            logits = _Speaker(scale)(ids)[:, :-1].reshape(-1, 12)
        expected = nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)).exp()
        assert figure == pytest.approx(float(expected), rel=1e-5)  # float32 logits
    assert found.kl is not None
    assert found.top1 is not None
    assert found.top1.agreement == 1.0  # halving logits keeps their order


def test_what_does_not_match(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1)

    a, b = written(net(), tmp_path / "a.pt2"), written(Two(), tmp_path / "b.pt2")
    with pytest.raises(InputError, match=r"a.pt2 and b.pt2 have different results.* scores|argmax"):
        TorchPair(a, b)
    with pytest.raises(InputError, match=r"m.onnx is no .pt2 file"):
        TorchPair(tmp_path / "m.onnx", b)
    with closing(TorchPair(a, a)) as pair, pytest.raises(InputError, match=r"a.pt2 does not run on this data"):
        pair.run({"x": X[:, :3]})


def test_a_site_that_is_nowhere() -> None:
    reference = parse(
        """graph @main dialect=aten {
      input %x : f32[2,4]
      const %fc.weight : f32[3,4] = rand:1
      %y : f32[2,3] = aten.linear.default(%x, %fc.weight) {args = [$0, $1]}
      return %y
    }"""
    )
    artifact = parse(
        """graph @main dialect=aten {
      input %x : f32[2,4]
      %y : f32[2,4] = aten.neg.default(%x) {args = [$0]}
      return %y
    }"""
    )
    (tap,) = site_taps(reference, artifact)
    assert tap.name == "fc"
    assert tap.tensor == ""
    assert tap.reason == "no op of the compiled program is called 'fc' or reads a constant called so"
