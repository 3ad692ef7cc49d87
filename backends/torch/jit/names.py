"""What dynamo's placeholders stand for: parameters and buffers by qualified name, arguments by the user's words.

Dynamo says where a placeholder comes from as an expression: ``L['self']._modules['a']._parameters['weight']``. Names
are those of the outermost module that is being called through torch.compile, so that the parts of a model that a graph
break has cut apart use the names of the whole.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from qcompiler.errors import InputError

_HELD = re.compile(r"(?P<owner>.*)\._(?P<role>parameter|buffer)s\['(?P<leaf>[^']*)'\]\Z")
_CHAIN = re.compile(r"(?P<root>.*?)(?P<chain>(?:\._modules\['[^']*'\])*)\Z")
_WORD = re.compile(r"\['([^']*)'\]|\[(-?\d+)\]|\.(\w+)(?:\(\))?")
_SCOPE = re.compile(r"@\d+")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_CALLERS = ("_wrapped_call_impl", "_call_impl")


@dataclass(frozen=True)
class Held:
    """A parameter or buffer that a graph reads. ``owner`` is dynamo's expression of the module that has it, ``root``
    the part of that before the modules inside each other, ``inside`` its name from there on."""

    ref: weakref.ref[torch.Tensor]
    name: str
    role: str
    owner: str
    root: str
    inside: str

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor; raises InputError when the model is gone."""
        tensor = self.ref()
        if tensor is None:
            raise InputError(f"parameter {self.name!r} is gone, and the graph that reads it was called")
        return tensor


@dataclass
class Names:
    """Names for one graph of dynamo; it keeps no tensor alive. ``held`` and ``inputs`` are by the position of the
    placeholder, ``roots`` are the qualified names of what dynamo's expressions begin with."""

    held: dict[int, Held] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    home: weakref.ref[nn.Module] | None = None

    @property
    def module(self) -> nn.Module | None:
        """The module that is called, where it was found."""
        return None if self.home is None else self.home()

    @property
    def training(self) -> bool:
        """Whether that module as a whole is in training mode."""
        module = self.module
        return module is not None and module.training

    def rebound(self, tensors: Mapping[int, torch.Tensor]) -> Names:
        """The same for other ``tensors`` in the places of those that are held: another module, the same code."""
        new = Names({}, self.inputs, dict(self.roots), self.home)
        known = _qualified(self.module)
        for i, held in self.held.items():
            tensor = tensors[i]
            name = known.get(id(tensor), held.name)
            if name.endswith(held.inside) and id(tensor) in known:
                new.roots[held.root] = name.removesuffix(held.inside).removesuffix(".")
            new.held[i] = replace(held, ref=weakref.ref(tensor), name=name)
        return new

    def scope(self, text: str) -> str:
        """The qualified name of the module that dynamo calls ``text`` (``L['self'].layers[0]``)."""
        text = _SCOPE.sub("", text)
        for root in sorted(self.roots, key=len, reverse=True):
            if text.startswith(root):
                prefix, rest = self.roots[root], plain(text[len(root) :])
                return ".".join(part for part in (prefix, rest) if part)
        return plain(text.partition("]")[2]) if text.startswith(("L[", "G[")) else plain(text)


def source_of(node: fx.Node) -> str:
    """Dynamo's expression of where the placeholder ``node`` comes from; empty where it does not say."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def plain(text: str) -> str:
    """An expression without quotes and brackets: ``._modules['a'].blocks[0]`` is ``a.blocks.0``."""
    words = [next(w for w in m if w) for m in _WORD.findall(text) if any(m)]
    return ".".join(w for w in words if w not in ("_modules", "_parameters", "_buffers"))


def name_placeholders(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Names:
    """Names for the placeholders of dynamo's graph ``module``, whose values are ``example_inputs``."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    sources = {i: source_of(n) for i, n in enumerate(nodes)}
    tensors = {i: v for i, v in enumerate(example_inputs) if isinstance(v, torch.Tensor)}
    found = Names()
    for i, tensor in tensors.items():
        if (part := _HELD.match(sources[i])) is not None and (chain := _CHAIN.fullmatch(part["owner"])) is not None:
            inside = ".".join(w for w in (plain(chain["chain"]), part["leaf"]) if w)
            held = Held(weakref.ref(tensor), inside, part["role"], part["owner"], chain["root"], inside)
            found.held[i] = held
    found.roots = _prefixes(sorted({h.root for h in found.held.values()}))
    for i, held in found.held.items():
        found.held[i] = replace(held, name=".".join(w for w in (found.roots[held.root], held.inside) if w))
    called = called_module([tensors[i] for i in found.held])
    found.inputs = {i: _argument(s, nodes[i].name, called) for i, s in sources.items() if i not in found.held}
    found.home = None if called is None else weakref.ref(called)
    return found.rebound({i: tensors[i] for i in found.held})


def _argument(source: str, fallback: str, module: nn.Module | None) -> str:
    """What the user calls an argument: ``L['kwargs']['input_ids']`` is ``input_ids``."""
    words = plain(source[1:] if source.startswith(("L[", "G[")) else source)
    if words.startswith("kwargs."):
        return words.removeprefix("kwargs.")
    number = re.match(r"args\.(\d+)", words)
    if number is None or module is None:
        return words or fallback
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in _POSITIONAL]
    return words if int(number[1]) >= len(taken) else taken[int(number[1])].name + words[number.end() :]


def _prefixes(roots: Sequence[str]) -> dict[str, str]:
    """What to write before names inside each root; nothing where there is one root."""
    if len(roots) < 2:
        return dict.fromkeys(roots, "")
    words = {r: plain(r[1:]).split(".") for r in roots}
    shared, shortest = 0, min(map(len, words.values()))
    while shared + 1 < shortest and len({tuple(w[: shared + 1]) for w in words.values()}) == 1:
        shared += 1
    return {r: ".".join(w[shared:]) for r, w in words.items()}


def _qualified(module: nn.Module | None) -> dict[int, str]:
    """The first name of each parameter and buffer of ``module``, by identity."""
    names: dict[int, str] = {}
    if module is not None:
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                names.setdefault(id(tensor), name)
    return names


def called_module(tensors: Sequence[torch.Tensor]) -> nn.Module | None:
    """The outermost module that is being called through torch.compile and holds one of ``tensors``, if any."""
    wanted = {id(t) for t in tensors}
    candidates: list[nn.Module] = []
    outermost = 0
    for module, compiled in _modules_on_the_stack():
        candidates.append(module)
        if compiled:
            outermost = len(candidates)
    for module in reversed(candidates[:outermost]):
        inner = getattr(module, "_orig_mod", module)
        if not wanted or not wanted.isdisjoint(_qualified(inner)):
            return inner
    return None


def _modules_on_the_stack() -> Iterator[tuple[nn.Module, bool]]:
    """Modules that callers run, the innermost first, and whether torch.compile itself calls them there."""
    frame = sys._getframe(1)
    while frame is not None:
        code, found, compiled = frame.f_code, None, False
        if code.co_filename.endswith("eval_frame.py") and "fn" in (*code.co_freevars, *code.co_varnames):
            called = frame.f_locals.get("fn")
            found, compiled = getattr(called, "__self__", None), True
            if found is None:  # a module of torch's own is called through a function around it
                inside = getattr(called, "__wrapped__", None)
                found = inside if isinstance(inside, nn.Module) else getattr(inside, "__self__", None)
        elif code.co_name in _CALLERS and code.co_filename.endswith("module.py"):
            found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            yield found, compiled
        elif compiled:
            yield nn.Module(), True
        frame = frame.f_back  # type: ignore[assignment]


def owners_in_training(names: Names) -> list[str]:
    """Qualified names of the parameters whose module is in training mode."""
    scopes, known = _scopes(), {} if names.module is None else dict(names.module.named_modules())
    found: list[str] = []
    for held in names.held.values():
        owner = known.get(held.name.rpartition(".")[0]) or _evaluated(held.owner, scopes)
        if owner is not None and owner.training:
            found.append(held.name)
    return found


def _evaluated(expression: str, scopes: Mapping[str, Any] | None) -> nn.Module | None:
    """The module that dynamo's ``expression`` means where dynamo reads; None where it cannot be told."""
    if scopes is None:
        return None
    try:
        found: Any = eval(expression, {"__builtins__": {}}, dict(scopes))
    except Exception:
        return None
    return found if isinstance(found, nn.Module) else None


def _scopes() -> dict[str, Any] | None:
    """The local and global names of the frame that dynamo compiles, as its expressions call them."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        return {"L": output.local_scope, "G": output.global_scope}
    except (ImportError, AttributeError):
        return None
