"""Registers every operator of this folder. Importing it needs torch alone and loads nothing else of weight."""

from __future__ import annotations

from qcompiler.backends.triton import embedding, grouped, kv_cache, quantizing, scaled, weight_only

FAMILIES = (weight_only, quantizing, scaled, embedding, kv_cache, grouped)
"""The modules whose import registers operators."""
