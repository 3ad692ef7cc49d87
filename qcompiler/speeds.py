"""Which fused kernels are slower than the float ops that they stand for, by their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from qcompiler.sites import Site
from qcompiler.target import Phase, Target

ACTIVATION = "activation"
"""Key in the ``stats`` of a fused site: the element type of what its kernel reads."""


def slower_notes(sites: Iterable[Site], target: Target, phases: Sequence[Phase]) -> list[str]:
    """One sentence a kernel, phase and activation that runs slower than the float op, with the number of sites."""
    found: Counter[tuple[str, str, int, str, float]] = Counter()
    for site in sites:
        element = str(site.stats.get(ACTIVATION, ""))
        for phase in phases if site.status == "fused" and element else ():
            name = site.kernel.get(phase.name, "")
            row = next((r for r in target.rows if r.name == name), None)
            share = None if row is None else row.speed(element, phase.m)
            if share is not None:
                found[name, phase.name, phase.m, element, share] += 1
    return [
        f"{count} site{'' if count == 1 else 's'}: {name} reaches {share:.2g} of the float op's speed at {phase} M={m} "
        f"({element} activations)"
        for (name, phase, m, element, share), count in found.items()
    ]
