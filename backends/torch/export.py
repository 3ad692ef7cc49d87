"""nn.Module -> ExportedProgram: the first step of every torch target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompiler.backends.torch.quiet import one_sentence


def export_program(
    module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None, kwargs: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """``torch.export.export`` without noise and without decompositions, in the module's own training mode.

    Raises InputError, one sentence that names the cause and the user's line where torch tells it.
    """
    with one_sentence(f"cannot export {type(module).__name__}"):
        return torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
