"""What dynamo's placeholders stand for: parameters and buffers by qualified name, arguments by the user's words.

Dynamo says where a placeholder comes from as an expression: ``L['self']._modules['a']._parameters['weight']``. Names
are those of the outermost module that is being called through torch.compile, so that the parts of a model that a graph
break has cut apart use the names of the whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

_HELD = re.compile(r"(?P<owner>.*)\._(?P<role>parameter|buffer)s\['(?P<leaf>[^']*)'\]\Z")
_CHAIN = re.compile(r"(?P<root>.*?)(?P<chain>(?:\._modules\['[^']*'\])*)\Z")
_WORD = re.compile(r"\['([^']*)'\]|\[(-?\d+)\]|\.(\w+)(?:\(\))?")
_SCOPE = re.compile(r"@\d+")
_CALLERS = ("_wrapped_call_impl", "_call_impl")


@dataclass(frozen=True)
class Held:
    """A parameter or buffer that a graph reads. ``owner`` is dynamo's expression of the module that has it."""

    tensor: torch.Tensor
    name: str
    role: str
    owner: str = ""


@dataclass
class Names:
    """Names for one graph of dynamo. ``held`` and ``inputs`` are by the position of the placeholder."""

    held: dict[int, Held] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = None

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
    parts = {i: m for i, s in sources.items() if i in tensors and (m := _HELD.match(s)) is not None}
    found = Names(module=called_module([v for i, v in tensors.items() if i in parts]))
    known = _qualified(found.module)
    chains = {i: _CHAIN.fullmatch(m["owner"]) for i, m in parts.items()}
    roots = sorted({c["root"] for c in chains.values() if c is not None})
    found.roots = _prefixes(roots)
    for i, m in parts.items():
        chain = chains[i]
        assert chain is not None
        inside = ".".join(w for w in (plain(chain["chain"]), m["leaf"]) if w)
        name = known.get(id(tensors[i])) or ".".join(w for w in (found.roots[chain["root"]], inside) if w)
        if id(tensors[i]) in known and name.endswith(inside):
            found.roots[chain["root"]] = name.removesuffix(inside).removesuffix(".")
        found.held[i] = Held(tensors[i], name, m["role"], m["owner"])
    found.inputs = {i: _argument(s, nodes[i].name) for i, s in sources.items() if i not in found.held}
    return found


def _argument(source: str, fallback: str) -> str:
    """What the user calls an argument: ``L['kwargs']['input_ids']`` is ``input_ids``."""
    words = plain(source[1:] if source.startswith(("L[", "G[")) else source)
    words = re.sub(r"\A(kwargs|args)\.", "", words)
    return words or fallback


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
            found, compiled = getattr(frame.f_locals.get("fn"), "__self__", None), True
        elif code.co_name in _CALLERS and code.co_filename.endswith("module.py"):
            found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            yield found, compiled
        elif compiled:
            yield nn.Module(), True
        frame = frame.f_back  # type: ignore[assignment]


def owners_in_training(names: Names) -> list[str]:
    """Qualified names of the parameters whose module is in training mode."""
    modules = _scopes()
    found: list[str] = []
    for held in names.held.values():
        owner = _owner(held, names, modules)
        if owner is not None and owner.training:
            found.append(held.name)
    return found


def _owner(held: Held, names: Names, scopes: Mapping[str, Any] | None) -> nn.Module | None:
    if names.module is not None:
        path = held.name.rpartition(".")[0]
        try:
            return names.module.get_submodule(path)
        except AttributeError:
            pass  # the tensor is not the module's own: dynamo's expression says whose it is
    if scopes is None:
        return None
    try:
        owner = eval(held.owner, {"__builtins__": {}}, dict(scopes))
    except Exception:
        return None
    return owner if isinstance(owner, nn.Module) else None


def _scopes() -> dict[str, Any] | None:
    """The local and global names of the frame that dynamo compiles, as its expressions call them."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        return {"L": output.local_scope, "G": output.global_scope}
    except (ImportError, AttributeError):
        return None
