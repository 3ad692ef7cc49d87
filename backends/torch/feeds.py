"""Inputs made up for a program that nobody gave data for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qcompiler.backends.torch.calling import Call
from qcompiler.backends.torch.workload import guesses
from qcompiler.dtypes import Array
from qcompiler.ir import Graph


def made_up(graph: Graph, seed: int) -> Iterator[Mapping[str, Array]]:
    """Candidate inputs of ``graph``, the likeliest first: sizes by what its symbols stand for, values by where they go
    (ids below the smallest table, masks of ones); arguments that are part of the program as they were captured.

    Nothing where a type is not made up.
    """
    for feed in guesses(graph, seed):
        constants = {s.name: np.asarray(s.value) for s in Call.of(graph).slots if s.constant}
        yield constants | feed
