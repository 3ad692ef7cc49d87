"""The passes, one file each. :func:`catalogue` finds them; adding a file is adding a pass."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from qcompiler.pipeline import Pass


@cache
def catalogue() -> dict[str, type[Pass]]:
    """Pass name, as recipes write it -> its class, from every module of this package."""
    found: dict[str, type[Pass]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Pass) and item.__module__ == module.__name__:
                found[item.name] = item
    return dict(sorted(found.items()))
