"""A quantization compiler: a model goes in, fused low-bit kernels come out, and what is left unfused is refused.

``compile``, ``verify``, ``plan`` and the errors are loaded when they are first asked for, so importing this costs
milliseconds and loads neither torch nor onnx. ``qcompiler.verify`` is also a package (``qcompiler.verify.findings``);
it is one object that can be called and imported from. The torch operators that artifacts call are registered as soon
as torch is there (:mod:`qcompiler.operators`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompiler.operators import wait_for_torch

if TYPE_CHECKING:
    from qcompiler.api import Artifact, compile, plan, verify
    from qcompiler.backends.torch.jit.reports import compiled_reports
    from qcompiler.benching import bench
    from qcompiler.errors import CalibrationError, Error, InputError, RecipeError, RejectedError
    from qcompiler.evaluating import evaluate
    from qcompiler.planning import Plan
    from qcompiler.report.model import Report
else:
    from types import ModuleType

    from qcompiler import verify

    class _CallablePackage(ModuleType):
        """The package ``qcompiler.verify``, called as :func:`qcompiler.api.verify`."""

        def __call__(self, *args: Any, **options: Any) -> Any:
            return _load("verify")(*args, **options)

    verify.__class__ = _CallablePackage

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "CalibrationError",
    "Error",
    "InputError",
    "Plan",
    "RecipeError",
    "RejectedError",
    "Report",
    "__version__",
    "bench",
    "compile",
    "compiled_reports",
    "evaluate",
    "plan",
    "verify",
]

_HOMES = {
    **dict.fromkeys(("Artifact", "compile", "plan", "verify"), "qcompiler.api"),
    **dict.fromkeys(("CalibrationError", "Error", "InputError", "RecipeError", "RejectedError"), "qcompiler.errors"),
    "Plan": "qcompiler.planning",
    "bench": "qcompiler.benching",
    "evaluate": "qcompiler.evaluating",
    "Report": "qcompiler.report.model",
    "compiled_reports": "qcompiler.backends.torch.jit.reports",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded from where it is defined and kept."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    value = globals()[name] = _load(name)
    return value


def _load(name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


wait_for_torch()
