"""A program run op by op on a GPU: the kernels that each low-bit call launched, what it allocated beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.quiet import quietly
from qcompiler.backends.torch.running import Interpreter
from qcompiler.backends.torch.watching import Watched
from qcompiler.dtypes import Array
from qcompiler.ir import Op, Value


class OnDevice(Watched):
    """As :class:`Watched`, on ``device``: a GPU, or the CPU, where nothing is told of memory and kernels."""

    watching = False
    highest = 0
    """Bytes that the allocator held at most, up to the last time its own mark was set back."""

    @classmethod
    def of(cls, path: Path, at: str | None) -> OnDevice:
        """The program in the file at ``path``, on the CPU; raises InputError."""
        with quietly():
            return cls(load(path), at)

    def on(self, device: str) -> OnDevice:
        """Move what the program stores there."""
        self.device = torch.device(device)
        self.constants = {v: t.to(self.device) for v, t in self.constants.items()}
        return self

    def _fed(self, given: Mapping[str, Array]) -> dict[Value, Any]:
        found = super()._fed(given)
        return {v: t.to(self.device) if isinstance(t, torch.Tensor) else t for v, t in found.items()}

    def measured(self, feed: Mapping[str, Array]) -> dict[str, Any]:
        """As :meth:`Watched.measured`; ``peak`` is what the allocator held at most beyond the weights."""
        self.seen, self.watching = {}, False
        self(feed)  # kernels are compiled here
        held, self.highest, self.watching = self._mark(), 0, True
        self(feed)
        self._mark()
        return {"peak": max(0, self.highest - held), "ops": {op.label: facts for op, facts in self.seen.items()}}

    def _results(self, op: Op, known: Mapping[Value, Any]) -> list[Any]:
        if op not in self.nodes or not self.watching:
            return Interpreter._results(self, op, known)
        before = self._mark()
        with quietly(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            results = Interpreter._results(self, op, known)
            if self._gpu:
                torch.cuda.synchronize(self.device)
        kept = sum(r.untyped_storage().nbytes() for r in results if isinstance(r, torch.Tensor))
        most = torch.cuda.max_memory_allocated(self.device) if self._gpu else before + kept
        facts = self.seen.setdefault(op, {"off": None})
        facts |= {"ran": _kernels(found), "temp": max(0, int(most) - before - kept)}
        self._note(self.nodes[op], known, results)
        return results

    @property
    def _gpu(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _mark(self) -> int:
        """Bytes that are held now; the allocator's mark of the most starts anew from here."""
        if not self._gpu:
            return 0
        self.highest = max(self.highest, int(torch.cuda.max_memory_allocated(self.device)))
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.memory_allocated(self.device))


def _kernels(found: Any) -> list[str]:
    """Names of the kernels that ran on a GPU; where none did, of the operators on the CPU."""
    events = list(found.profiler.kineto_results.events())
    names = [e.name() for e in events if str(e.device_type()).endswith("CUDA")]
    return list(dict.fromkeys(names or [e.name() for e in events if "::" in e.name()]))
