"""Operators ``qcompiler::*`` of this folder: a schema, a fake, a reference on CPUs and the launch on GPUs.

Written against the dispatcher directly, which costs 5 us a call (``torch.library.custom_op``: 80 us). They are opaque
to compilers on purpose: the same graph traces, exports and runs with and without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "qcompiler"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What activations and results may be."""
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any]) -> None:
    """Register ``qcompiler::<schema>``.

    ``reference`` runs on CPU tensors and needs torch alone; ``fake`` gives empty results of the right type and shape
    and raises InputError for arguments that do not fit; ``cuda`` imports triton when it is first called.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
