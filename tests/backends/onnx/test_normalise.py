"""What normalising moves gives the same numbers in the runtime, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompiler.backends.onnx.running import runnable
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.recipe import parse_line

CASES = Path(__file__).parents[2] / "passes" / "cases"


@pytest.mark.parametrize("shape", [(1, 1, 4, 8), (2, 5, 4, 8), (3, 4, 4, 8)])
def test_transposed_keys_are_the_same(shape: tuple[int, ...]) -> None:
    text = (CASES / "normalise_transposed_keys.qir").read_text()
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    before, after = parse(text), run(parse(text), parse_line("normalise, dce").passes, Context())
    assert len(list(after.walk())) < len(list(before.walk()))
    with runnable(before, []) as first, runnable(after, []) as second:
        want, got = first({"x": x}), second({"x": x})
    assert want.keys() == got.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, strict=True)
