"""Registers every operator of this folder. Importing it needs torch alone and loads nothing else of weight."""

from __future__ import annotations

import importlib
import importlib.util

FAMILIES = ("weight_only", "quantizing", "scaled", "embedding", "kv_cache", "grouped")

for _name in FAMILIES:
    if importlib.util.find_spec(f"qcompiler.backends.triton.{_name}") is not None:
        importlib.import_module(f"qcompiler.backends.triton.{_name}")
