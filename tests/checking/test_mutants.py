"""Wrong passes are caught by ``--check``, whatever their kind, and the first op that diverges is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from qcompiler import recipe as recipes
from qcompiler.backends import backend_of
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import open_data
from qcompiler.checking import CheckedPass, CheckFailed, CheckHook
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.pipeline import Context, Pass, run
from tests.checking.mutants import MUTANTS, Mutant
from tests.checking.nets import samples, small

BACKEND = backend_of("ort-cpu")


@dataclass(frozen=True)
class Broken(Pass):
    """What ``right`` does, then what the mutant does to it; it claims to be of the mutant's kind."""

    mutant: Any = None
    right: tuple[Pass, ...] = ()
    name = "broken"  # type: ignore[misc]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return str(self.mutant.kind)

    def run(self, graph: Graph, ctx: Context) -> None:
        for item in self.right:
            item.run(graph, ctx)
        if self.mutant.breaks is not None:
            self.mutant.breaks(graph)


def compiled(graph: Graph, passes: list[Pass]) -> list[CheckedPass]:
    """Run ``passes``, checked on all the data that ranges are taken from."""
    ctx = Context(BACKEND.target("ort-cpu"))
    ctx.calibration = Calibrator(open_data(samples()), BACKEND.runner)
    hook = CheckHook(BACKEND.runner, samples(), BACKEND.kernel_error, complete=True)
    run(graph, passes, ctx, [hook])
    return hook.results


def steps(text: str) -> list[Pass]:
    return list(recipes.parse_line(text).passes) if text else []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_wrong_pass_is_caught_and_its_op_named(mutant: Mutant) -> None:
    broken = Broken(mutant, tuple(steps(mutant.right)))
    with pytest.raises(CheckFailed) as caught:
        compiled(small(), [*steps(mutant.before), broken])
    finding = caught.value.finding
    assert caught.value.item is broken
    assert finding.code == "QC303"
    assert finding.op == mutant.culprit, str(finding)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_pass_is_right_without_the_mutation(mutant: Mutant) -> None:
    sound = Mutant(mutant.name, mutant.before, mutant.right, mutant.kind, lambda g: None, "")
    results = compiled(small(), [*steps(mutant.before), Broken(sound, tuple(steps(mutant.right)))])
    assert results[-1].name == "broken"
    assert results[-1].error <= results[-1].bound


def test_inputs_on_which_nothing_runs_are_told() -> None:
    from qcompiler.checking import running_feeds

    with pytest.raises(InputError, match="no inputs on which the model runs"):
        running_feeds(BACKEND.runner, small(), lambda graph, seed: iter([{"other": samples(1)[0]["x"]}]))
