"""nn.Module -> ExportedProgram: the first step of every torch target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompiler.backends.torch.dims import refuse_fixed
from qcompiler.backends.torch.quiet import one_sentence, sentence_of
from qcompiler.errors import InputError


def export_program(
    module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None, kwargs: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """``torch.export.export`` without noise and without decompositions, in the module's own training mode.

    A condition on sizes that torch cannot prove for the whole range becomes an assertion in the program; a size that
    the model fixes is refused. Raises InputError, one sentence that names the cause, with the user's line where torch
    tells it.
    """
    doing = f"cannot export {type(module).__name__}"
    keywords = dict(kwargs or {})
    with one_sentence(doing):
        try:
            return torch.export.export(module, args, keywords, dynamic_shapes=dynamic_shapes)
        except Exception as e:
            if "Constraints violated" not in str(e):
                raise
            first = e
        # torch 2.11 cannot prove min(8 * s, 16 * s) == 8 * s, which grouped-query attention asks for.
        try:
            program = torch.export.export(
                module, args, keywords, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
            )
            refuse_fixed(program, module.forward, args, dynamic_shapes)
        except Exception:
            raise InputError(f"{doing}: {sentence_of(first)}") from first
        return program
