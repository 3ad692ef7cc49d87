"""The child process that times one ``.pt2`` file in torch: the jobs of :mod:`qcompiler.backends.onnx.stopwatch`.

``python -m qcompiler.backends.torch.stopwatch``. An ``open`` job holds ``path``, ``threads`` and ``call``, how the
program is called; nothing but the module that a user calls is opened here, so that the memory is that of a user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompiler.backends.onnx.stopwatch import Stopwatch, peak_bytes, serve


class TorchStopwatch(Stopwatch):
    """One opened program, and its arguments by the name of their job."""

    def prepared(self, job: dict[str, Any]) -> int:
        import torch

        torch.set_num_threads(job["threads"])
        from qcompiler.backends.torch import calling, program  # noqa: F401

        return peak_bytes()

    def open(self, job: dict[str, Any]) -> None:
        from qcompiler.backends.torch.calling import Call
        from qcompiler.backends.torch.program import open_module

        self.call = Call.from_json(job["call"])
        self.session = open_module(Path(job["open"]))

    def fed(self, job: dict[str, Any], arrays: list[Any]) -> Any:
        """Positional and keyword arguments, as tensors."""
        return self.call.arguments(dict(zip(job["inputs"], arrays, strict=True)))

    def run(self, feed: Any) -> None:
        import torch

        args, kwargs = feed
        with torch.inference_mode():
            self.session(*args, **kwargs)


if __name__ == "__main__":
    serve(TorchStopwatch())
