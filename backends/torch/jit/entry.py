"""``torch.compile(model, backend="qcompiler", options={...})``: quantized when the model is first called.

Dynamo finds this through the entry point group ``torch_dynamo_backends``; nothing has to be imported. Its graphs go
through AOTAutograd's inference road to the same passes as everything else, and what comes out runs under inductor or
eagerly. See :mod:`qcompiler.backends.torch.jit.options` for the options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import ShortenTraceback

from qcompiler.backends.chips import SM
from qcompiler.backends.torch.jit import releasing
from qcompiler.backends.torch.jit.compiling import Order, compile_untouched
from qcompiler.backends.torch.jit.growing import marked
from qcompiler.backends.torch.jit.names import Names, name_placeholders, owners_in_training
from qcompiler.backends.torch.jit.options import Options, read_options
from qcompiler.backends.torch.jit.running import ONLY, CompiledGraph
from qcompiler.errors import Error, InputError


def jit_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile dynamo's graph ``module``; what :class:`qcompiler.Error` says reaches the caller as it is."""
    try:
        return _compiled(module, example_inputs, read_options(options, mode))
    except ShortenTraceback:
        raise
    except Error as e:
        raise _passing(e) from e.__cause__
    finally:
        releasing.veil()


def _compiled(module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    names = name_placeholders(module, example_inputs)
    _check_inference(names, example_inputs)
    target = options.target or _target(example_inputs)

    def compile_aot(aot: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        order = Order(aot, names, options, target)
        if not any(h.tensor.is_floating_point() and h.tensor.ndim > 1 for h in names.held.values()):
            return compile_untouched(order, examples)
        return marked(CompiledGraph(order, examples), aot, names)

    def training(aot: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        raise InputError(f"{ONLY}, and this graph needs gradients; run it under torch.no_grad()")

    # Without gradients AOT takes its inference road, whatever the caller's mode: its runtime turns them off as well.
    with torch.no_grad():
        backend = aot_autograd(
            fw_compiler=training, inference_compiler=compile_aot, keep_inference_input_mutations=True
        )
        compiled: Callable[..., Any] = backend(module, example_inputs)
    return compiled


def _check_inference(names: Names, example_inputs: Sequence[Any]) -> None:
    if training := owners_in_training(names):
        raise InputError(f"{ONLY}, and the module of {training[0]!r} is in training mode; call model.eval() first")
    if not torch.is_grad_enabled():
        return
    for i, value in enumerate(example_inputs):
        if isinstance(value, torch.Tensor) and i not in names.held and _wants_gradients(value):
            name = names.inputs.get(i, str(i))
            raise InputError(
                f"{ONLY}, and its input {name!r} needs gradients; detach it, or run the model under torch.no_grad()"
            )


def _wants_gradients(value: torch.Tensor) -> bool:
    """Whether gradients of ``value`` would reach anything but parameters: those of a model in eval mode are in no use.

    What runs between two graphs computes with the parameters themselves, so its results ask for gradients too.
    """
    if not value.requires_grad:
        return False
    if value.grad_fn is None:
        return not isinstance(value, nn.Parameter)
    seen, stack = {value.grad_fn}, [value.grad_fn]
    while stack:
        step = stack.pop()
        leaf = getattr(step, "variable", None)
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter):
            return True
        for before, _ in step.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)
    return False


def _target(example_inputs: Sequence[Any]) -> str:
    """``torch-cpu``, or ``torch-cuda`` with the newest architecture that has a word and is not newer than the GPU."""
    gpu = next((v.device for v in example_inputs if isinstance(v, torch.Tensor) and v.is_cuda), None)
    if gpu is None:
        return "torch-cpu"
    major, minor = torch.cuda.get_device_capability(gpu)
    known = [sm for sm in SM if sm <= 10 * major + minor]
    return f"torch-cuda:sm_{known[-1]}" if known else "torch-cuda"


def _passing(error: Error) -> Error:
    """``error`` as an exception that dynamo hands to the caller as it is, without its own frames around it."""
    kind = type(error)
    cls = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    made = cls.__new__(cls, *error.args)
    made.__dict__.update(error.__dict__)
    made.args = error.args
    made.first_useful_frame = inspect.currentframe().f_back  # type: ignore[union-attr]
    found: Error = made
    return found
