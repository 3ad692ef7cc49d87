"""Where stores of a kernel go, what they hold, and how wide its loads are, traced back to the kernel's arguments.

Stores are read from Triton's IR, loads from LLVM's, where their width stands in the instruction. Both are
conservative: a value derives from every operand of what made it, through loops, branches, block arguments and calls,
so a pointer that could come from an argument is counted as coming from it.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORES = {
    "tt.store": (0, 1),
    "tt.atomic_rmw": (0, 1),
    "tt.atomic_cas": (0, 2),
    "tt.atomic_store": (0, 1),
    "tt.descriptor_store": (0, 1),
    "tt.descriptor_reduce": (0, 1),
    "tt.descriptor_scatter": (0, 3),
    "tt.experimental_descriptor_store": (0, 1),
}
"""Operations that write to global memory: which operands are the pointer and the value."""
SUMS = frozenset({"tt.dot", "tt.dot_scaled", "tt.reduce", "tt.scan"})
"""Operations behind which an element is no longer itself but part of a sum or a product."""
_HEADER = re.compile(r"tt\.func public @[\w$.]+\((.*)$", re.MULTILINE)
_TILE = re.compile(r"tensor<([0-9x]+)x(?:!tt\.ptr<)?(\w+)")
_STATIC = ("tt.print", "tt.assert", "tt.call", "tt.return", "scf.yield", "scf.condition", "cf.br", "cf.cond_br")


@dataclass(frozen=True)
class Store:
    """``targets``: pointer arguments it may write to; ``holds``: pointer arguments whose elements it may hold with
    neither a sum nor a product in between; ``tile``: shape and type of what it writes, ``64x128xbf16``."""

    operation: str
    targets: frozenset[str]
    holds: frozenset[str]
    tile: str


@dataclass(frozen=True)
class Load:
    """Of global memory: the pointer arguments it may read, and how many bytes one thread reads at once."""

    sources: frozenset[str]
    bytes: int


@dataclass
class _Values:
    """Values of a module by number: what made each, from which operands, and whether it is a pointer."""

    made_by: dict[int, str] = field(default_factory=dict)
    comes_from: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    pointers: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)

    def feed(self, targets: list[int], sources: list[int]) -> None:
        for target, source in zip(targets, sources, strict=False):
            self.comes_from[target].append(source)

    def roots(self, start: int, as_pointer: bool) -> frozenset[str]:
        """Arguments that ``start`` derives from: along pointers, or along everything but sums."""
        seen: set[int] = set()
        stack = [start]
        found: set[str] = set()
        while stack:
            number = stack.pop()
            if number in seen:
                continue
            seen.add(number)
            if number in self.names:
                found.add(self.names[number])
            if as_pointer or self.made_by.get(number) not in SUMS:
                stack += [s for s in self.comes_from[number] if not as_pointer or s in self.pointers]
        return frozenset(found)


def _is_pointer(kind: str) -> bool:
    return "!tt.ptr" in kind or "tensordesc" in kind


class _Reader:
    """One walk over a module; children come before the operation that holds them."""

    def __init__(self, names: list[str]) -> None:
        self.values = _Values()
        self.stores: list[tuple[str, int, int, str]] = []
        self.unknown: list[str] = []
        self.ends: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)  # by region
        self.blocks: defaultdict[int, dict[int, list[int]]] = defaultdict(dict)  # by region, then block: arguments
        self.functions: dict[str, tuple[list[int], list[list[int]]]] = {}
        self.calls: list[tuple[str, list[int], list[int]]] = []
        self.names = names

    def note(self, value: Any) -> int:
        number = int(value.id())
        if _is_pointer(str(value.get_type())):
            self.values.pointers.add(number)
        return number

    def visit(self, op: Any) -> None:
        name = str(op.get_name())
        operands = [self.note(op.get_operand(i)) for i in range(op.get_num_operands())]
        results = [self.note(op.get_result(i)) for i in range(op.get_num_results())]
        regions = [int(op.get_region(i).id()) for i in range(op.get_num_regions())]
        for result in results:
            self.values.made_by[result] = name
        block = op.get_block()
        if block is not None and name not in ("tt.func", "builtin.module"):
            region = int(block.get_parent().id())
            arguments = [self.note(block.arg(i)) for i in range(block.get_num_arguments())]
            self.blocks[region].setdefault(int(block.id()), arguments)
            if name in ("scf.yield", "scf.condition", "tt.return", "cf.br", "cf.cond_br"):
                self.ends[region].append((name, operands))
        if name in STORES:
            pointer, value = STORES[name]
            kind = str(op.get_operand(value).get_type())
            self.stores.append((name, operands[pointer], operands[value], kind))
        elif not results and name not in _STATIC and not regions and any(o in self.values.pointers for o in operands):
            self.unknown.append(name)
        self._connect(name, op, operands, results, regions)

    def _connect(self, name: str, op: Any, operands: list[int], results: list[int], regions: list[int]) -> None:
        if name == "tt.func":
            self._function(op, regions[0])
        elif name == "tt.call":
            self.calls.append((str(op.get_flat_symbol_ref_attr("callee")), operands, results))
        elif name == "scf.for":
            self._loop(regions[0], operands[3:], results)
        elif name == "scf.while":
            self._while(regions, operands, results)
        elif name == "scf.if":
            for region in regions:
                self._ends(region, "scf.yield", results)
        else:
            for result in results:
                self.values.comes_from[result] += operands

    def _entry(self, region: int) -> list[int]:
        return next(iter(self.blocks[region].values()), [])

    def _ends(self, region: int, name: str, *targets: list[int], skip: int = 0) -> None:
        for end, values in self.ends[region]:
            for into in targets:
                if end == name:
                    self.values.feed(into, values[skip:])

    def _loop(self, region: int, initial: list[int], results: list[int]) -> None:
        carried = self._entry(region)[1:]
        self.values.feed(carried, initial)
        self.values.feed(results, initial)
        self._ends(region, "scf.yield", carried, results)

    def _while(self, regions: list[int], initial: list[int], results: list[int]) -> None:
        before, after = (self._entry(r) for r in regions)
        self.values.feed(before, initial)
        self._ends(regions[0], "scf.condition", results, after, skip=1)
        self._ends(regions[1], "scf.yield", before)

    def _function(self, op: Any, region: int) -> None:
        """Arguments of inner blocks may come from any branch of the function."""
        blocks = list(self.blocks[region].values())
        entry = blocks[0] if blocks else []
        jumps = [v for name, values in self.ends[region] if name.startswith("cf.") for v in values]
        for arguments in blocks[1:]:
            for argument in arguments:
                self.values.comes_from[argument] += jumps
        returned = [values for name, values in self.ends[region] if name == "tt.return"]
        self.functions[str(op.get_str_attr("sym_name"))] = (entry, returned)
        if len(entry) == len(self.names) and op.get_str_attr("sym_visibility") == "public":
            for number, name in zip(entry, self.names, strict=True):
                if number in self.values.pointers:
                    self.values.names[number] = name

    def link(self) -> None:
        """Calls, once all functions are known."""
        for callee, operands, results in self.calls:
            arguments, returned = self.functions.get(callee, ([], []))
            self.values.feed(arguments, operands)
            for values in returned:
                self.values.feed(results, values)


def argument_names(ttir: str) -> list[str]:
    """Of the kernel, in order, without those that are constants of the compilation."""
    header = _HEADER.search(ttir)
    return [pointer_name(n) for n in re.findall(r"%([\w.$]+):", header[1])] if header is not None else []


def pointer_name(name: str) -> str:
    """Claims call an argument ``codes_ptr``, also where a kernel takes its tensor descriptor, ``codes_tiles``."""
    return re.sub(r"_tiles$", "_ptr", name)


def read_stores(ttir: str) -> tuple[tuple[Store, ...], tuple[str, ...]]:
    """All stores of a module of Triton's IR, and the operations that write to a pointer in a way unknown here."""
    from triton._C.libtriton import ir, nvidia

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    reader = _Reader(argument_names(ttir))
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(ttir, encoding="utf-8")
        module = ir.parse_mlir_module(str(path), context)
        module.walk(reader.visit)
    reader.link()
    found = []
    for name, pointer, value, kind in reader.stores:
        tile = _TILE.search(kind)
        shape = f"{tile[1]}x{tile[2]}" if tile is not None else kind
        targets = reader.values.roots(pointer, as_pointer=True)
        found.append(Store(name, targets, reader.values.roots(value, as_pointer=False), shape))
    return tuple(found), tuple(reader.unknown)


_LLVM_NAME = r"%[\w.$\-]+|%\"[^\"]+\""
_DEFINE = re.compile(r"^define\s[^@\n]*@[\w$.]+\((.*)$", re.MULTILINE)
_ASSIGN = re.compile(rf"^\s*({_LLVM_NAME})\s*=\s*(.*)$")
_POINTER_USE = re.compile(rf"ptr(?: addrspace\(1\))?(?: \w+| \w+\([^)]*\))*? ({_LLVM_NAME})")
_ASSEMBLY = re.compile(r'asm (?:sideeffect )?"((?:[^"\\]|\\.)*)"')
_LD = re.compile(r"(?<![a-zA-Z])ld(?:\.\w+)*\.global[\w.:]*?(?:\.v(\d+))?\.[a-z](\d+)\b")
_CP = re.compile(r"(?<![a-zA-Z])cp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)")
_TMA = re.compile(r"(?<![a-zA-Z])cp\.async\.bulk\.tensor[\w.:]*\.global\b")
_NATIVE = re.compile(
    r"\bload (?:volatile |atomic )?(?:<(\d+) x )?(i|half|bfloat|float|double|ptr)(\d*)>?, ptr addrspace\(1\)"
)
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
WHOLE_TILE = 1 << 10
"""Bytes noted for a load by the tensor memory accelerator, which moves tiles."""


def read_loads(llir: str, names: list[str]) -> tuple[Load, ...]:
    """All loads of global memory in LLVM's IR of a kernel whose arguments are called ``names``."""
    header = _DEFINE.search(llir)
    if header is None:
        return ()
    formal = [p.rpartition(" ")[2] for p in _parameters(header[1])]
    known = dict(zip(formal, names, strict=False))
    made: dict[str, list[str]] = {}
    loads: list[tuple[list[str], int]] = []
    for line in llir[header.end() :].splitlines():
        if line.startswith("}"):
            break
        match = _ASSIGN.match(line)
        body = match[2] if match else line
        if match is not None:
            pointers = [] if body.startswith("phi") else _POINTER_USE.findall(body)
            made[match[1]] = pointers or re.findall(_LLVM_NAME, body.split(", !dbg")[0])
        if (size := _load_bytes(body)) is not None:
            loads.append((_POINTER_USE.findall(body), size))
    return tuple(Load(_llvm_roots(pointers, made, known), size) for pointers, size in loads)


def _parameters(text: str) -> list[str]:
    """Split at commas outside parentheses, up to the closing one."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        if letter == "(":
            depth += 1
        elif letter == ")":
            if depth == 0:
                parts.append(text[start:index].strip())
                break
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return parts


def _load_bytes(body: str) -> int | None:
    """What a thread reads by this line, None where it reads no global memory."""
    assembly = _ASSEMBLY.search(body)
    if assembly is not None:
        if (found := _LD.search(assembly[1])) is not None:
            return int(found[1] or 1) * int(found[2]) // 8
        if (found := _CP.search(assembly[1])) is not None:
            return int(found[1], 0)
        return WHOLE_TILE if _TMA.search(assembly[1]) else None
    if (found := _NATIVE.search(body)) is not None:
        width = int(found[3]) if found[2] == "i" else _BITS[found[2]]
        return int(found[1] or 1) * width // 8
    return None


def _llvm_roots(start: list[str], made: dict[str, list[str]], known: dict[str, str]) -> frozenset[str]:
    seen: set[str] = set()
    stack = list(start)
    found: set[str] = set()
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in known:
            found.add(known[name])
        stack += made.get(name, [])
    return frozenset(found)
