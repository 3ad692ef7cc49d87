"""Our torch operators are there as soon as torch is, in whichever order the two are imported.

Artifacts call operators such as ``qcompiler::qlinear``; ``import qcompiler`` is all that loading them takes, and it
does not load torch. So a finder waits for the import of torch and registers them behind it. This module imports nothing
that ``import qcompiler`` would feel: ``importlib.abc`` alone takes longer than all the rest.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HOMES = ("qcompiler.backends.torch.ops", "qcompiler.backends.triton.ops")
"""The modules that register the operators; their import needs torch and loads nothing else of weight."""


def wait_for_torch() -> None:
    """Register the operators now where torch is loaded, else when it will be. Raises nothing."""
    torch = sys.modules.get("torch")
    if torch is None:
        _wait()
    elif not getattr(getattr(torch, "__spec__", None), "_initializing", False):
        _register()
    # else torch imports us while it loads; what of ours calls an operator imports its home by itself


def _wait() -> None:
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from importlib import import_module

    try:
        for home in HOMES:
            if not _importing(home.rpartition(".")[0]):
                import_module(home)
    except Exception as e:  # a fault of ours must not break the import of torch
        import warnings

        warnings.warn(
            f"qcompiler cannot register its operators with this torch ({type(e).__name__}: {e}); files that call "
            "qcompiler:: operators will not load",
            RuntimeWarning,
            stacklevel=2,
        )


def _importing(package: str) -> bool:
    """Whether a module of ``package`` imports torch at this moment: the others may need what it has not defined yet.

    It registers its own operators; whoever calls those of another module imports that.
    """
    loading = [m for name, m in list(sys.modules.items()) if name.startswith(f"{package}.")]
    return package.endswith(".triton") and any(getattr(m.__spec__, "_initializing", False) for m in loading)


class _Finder:
    """Finds torch as the others do, and has its loader tell when it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads torch by ``inner``, which takes its place before anybody sees it, then registers the operators."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        self.inner.exec_module(module)
        # Only now: an import that failed may be tried again.
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
