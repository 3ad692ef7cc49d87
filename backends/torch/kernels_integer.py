"""Rows of torch's CPU kernels that compute on codes of activations."""

from __future__ import annotations

from qcompiler.target import KernelRow

INTEGER_ROWS: tuple[KernelRow, ...] = ()
