"""What runs at each call of a compiled graph: the packed weights of the parameters that the call comes with.

Dynamo hands parameters over as arguments, and one compiled graph may serve many modules: the layers of a model whose
forward a graph break has cut. So a graph keeps what it packed for each set of parameters, and packs anew when it meets
other ones, or one that was written to in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.backends.torch.jit import releasing
from qcompiler.backends.torch.jit.capture import arguments_of
from qcompiler.backends.torch.jit.compiling import Order, Variant, make_variant
from qcompiler.errors import InputError

ONLY = "backend='qcompiler' compiles for inference"


class CompiledGraph:
    """What AOTAutograd calls: one list of arguments in, the outputs out. ``after`` gets the outputs of each call and
    gives them back."""

    _boxed_call = True

    def __init__(self, order: Order, examples: Sequence[Any]) -> None:
        self.order, self.examples = order, list(examples)
        sources = enumerate(arguments_of(order.module))
        self.places = [place for place, s in sources if s is not None and s in order.names.held]
        self.quiet = not order.names.training
        self.after: Callable[[Sequence[Any]], Sequence[Any]] | None = None
        self.last = make_variant(order, self.examples, {})
        first = tuple(id(order.names.held[s].tensor) for s in arguments_of(order.module) if s in order.names.held)
        self.variants: dict[tuple[int, ...], Variant] = {first: self.last}

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.quiet and self.order.names.training:
            raise InputError(f"{ONLY}, and the model was put in training mode since; call model.eval() first")
        variant = self.last
        if not variant.fits(args):
            variant = self.last = self._other(args)
        inputs = [args[place] for place in variant.read]
        inputs += variant.constants
        args.clear()
        out = variant.runner(inputs)
        if self.after is not None:
            out = self.after(out)
        return out

    def _key(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(id(args[place]) for place in self.places)

    def _other(self, args: Sequence[Any]) -> Variant:
        """The variant for the parameters in ``args``, made where there is none."""
        key = self._key(args)
        found = self.variants.get(key)
        if found is not None and found.fits(args):
            return found
        for known in [k for k, v in self.variants.items() if not v.alive()]:
            del self.variants[known]
        runners = {v.key: v.runner for v in (self.last, *self.variants.values())}
        with releasing.unveiled():
            found = make_variant(self.order.rebound(args), self.examples, runners)
        self.variants[key] = found
        return found
