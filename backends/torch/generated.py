"""What inductor's generated code shows: buffers of floats that are as large as a weight that is stored in few bits.

Read are the Python wrapper of ``torch.compile`` and the C++ wrapper inside a package of AOTInductor. Such a package is
judged without being loaded: it holds machine code.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompiler.backends.base import Judged
from qcompiler.backends.torch.nodes import CANARY
from qcompiler.errors import InputError
from qcompiler.sites import Site
from qcompiler.verify.evidence import EvidenceResult, NodeEvidence
from qcompiler.verify.findings import Finding

_FLOATS = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_PYTHON = re.compile(r"(\w+) = empty_strided_\w+\(\(([^()]*)\), \([^()]*\), torch\.(\w+)\)")
_ARRAY = re.compile(r"int64_t (int_array_\d+)\[\] = \{([^}]*)\}")
_CPP = re.compile(
    r"aoti_torch_empty_strided\w*\(\s*\d+, (int_array_\d+), \w+, cached_torch_dtype_(\w+),[^;]*?&(\w+?)(?:_handle)?\)"
)
_CONSTANT = re.compile(r"constants_info_\[(\d+)\]\.(name|dtype|shape|original_fqn) = ([^;]*);")
_KERNEL = re.compile(r"(\w+) = async_compile\.cpp_pybinding\(\[([^\]]*)\]")
_CALL = re.compile(r"^\s*(\w+)\((.*)\);?\s*$")
_FALLBACK = re.compile(r"(\w+) = torch\.ops\.([\w.]*dequant\w*[\w.]*)\(")
_DEQUANTIZE = re.compile(r"[\w.]+::\w*dequant\w*")
FOLDER = "data/aotinductor/"
"""Where an archive keeps the code."""
_NARROW = re.compile(r"const (?:u?int8_t|at::Float8_\w+|float8\w*)\s*\*")
_CODES = {"int8": "int8", "uint8": "uint8", "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2"}
_KERNELS = re.compile(r"_weight_int4pack_mm_for_cpu|_weight_int8pack_mm|qlinear_pointwise|qconv\w*_pointwise|_int_mm\b")
FIX = "give the fused operator to AOTInductor: compile the float model with qcompiler and --set emit.aot=true"


@dataclass(frozen=True)
class Expanded:
    """A buffer of floats in generated code that has as many elements as a weight: its name, shape, type and line."""

    buffer: str
    shape: tuple[int, ...]
    dtype: str
    line: int
    weight: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size; 4 where the shape is not known."""
        return math.prod(self.shape) * _FLOATS[self.dtype]


def inductor_expands(source_code: str, shapes: Iterable[Sequence[int]]) -> list[Expanded]:
    """Buffers of floats in ``source_code`` (Python or C++, as inductor writes it) that hold a whole weight.

    ``shapes`` are those of weights as floats, ``(N, K)``. A buffer counts in whatever order and grouping it has
    the same sizes, where a generated kernel fills it from elements of 8 bits; one with an open size is an activation.
    A call of a dequantizing operator that inductor left as it is counts too; its shape is not known.
    """
    wanted = {math.prod(s): tuple(int(d) for d in s) for s in shapes if math.prod(s) > 1}
    found = []
    written = _written_from_codes(source_code)
    for name, sizes, dtype, line in _buffers(source_code):
        weight = wanted.get(math.prod(sizes))
        if weight is not None and dtype in _FLOATS and name in written and _fits(sizes, weight):
            found.append(Expanded(name, sizes, dtype, line, weight))
    for number, text in enumerate(source_code.splitlines(), 1):
        for m in _FALLBACK.finditer(text):
            found.append(Expanded(m[1], (), "float32", number, ()))
    return found


def _written_from_codes(source: str) -> frozenset[str]:
    """Names in the calls of generated kernels that read elements of 8 bits: an activation comes of other kernels."""
    narrow = {m[1] for m in _KERNEL.finditer(source) if _NARROW.search(m[2])}
    names: set[str] = set()
    for line in source.splitlines():
        call = _CALL.match(line)
        if call is not None and (call[1] in narrow or _NARROW.search(call[2])):
            names.update(re.findall(r"\w+", call[2]))
    return frozenset(names)


def _fits(sizes: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a buffer of ``sizes`` may be ``weight`` moved: split along its axes, turned, or flat."""
    if len([d for d in sizes if d > 1]) == 1:
        return True
    left = sorted(weight, reverse=True)
    for d in sorted((d for d in sizes if d > 1), reverse=True):
        at = next((i for i, w in enumerate(left) if w % d == 0), None)
        if at is None:
            return False
        left[at] //= d
    return True


def _buffers(source: str) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    arrays: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(source.splitlines(), 1):
        for m in _PYTHON.finditer(line):
            if (sizes := _numbers(m[2])) is not None:
                yield m[1], sizes, m[3], number
        for m in _ARRAY.finditer(line):
            arrays.pop(m[1], None)
            if (sizes := _numbers(m[2])) is not None:
                arrays[m[1]] = sizes
        for m in _CPP.finditer(line):
            if m[1] in arrays:
                yield m[3], arrays[m[1]], m[2], number


def _numbers(text: str) -> tuple[int, ...] | None:
    """``96L, 128L`` as numbers; None where a size is open."""
    words = [w.strip().rstrip("L") for w in text.split(",") if w.strip()]
    return tuple(map(int, words)) if all(w.isdigit() for w in words) else None


# -- packages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """What AOTInductor left of its work in an archive: sources, and what they call outside of torch (as text)."""

    sources: tuple[str, ...]
    calls: tuple[str, ...]
    alone: bool
    """There is no program beside it."""


def code_in(path: Path) -> Code | None:
    """The generated code in the archive at ``path``; None where there is none. Raises InputError for a damaged one."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if f"/{FOLDER}" in n]
            if not inside:
                return None
            texts = {n: archive.read(n).decode(errors="replace") for n in inside if n.endswith((".cpp", ".json"))}
            alone = not any("/models/" in n and n.endswith(".json") for n in archive.namelist())
    # zipfile says NotImplementedError for a compression that it does not know, which no .pt2 has.
    except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
        raise InputError(f"{path.name} is damaged: {e}") from e
    sources = tuple(t for n, t in texts.items() if n.endswith(".cpp"))
    return Code(sources, tuple(t for n, t in texts.items() if n.endswith(".json")), alone)


def judge_package(path: Path) -> Judged | None:
    """The verdict on a package of AOTInductor without a program, by its generated code; None for any other file.

    Raises InputError where the package holds no code to read.
    """
    code = code_in(path)
    if code is None or not code.alone:
        return None
    if not code.sources:
        raise InputError(
            f"{path.name} is a package of AOTInductor without its source code; give the .pt2 of torch.export"
        )
    return judge_code(code)


def judge_code(code: Code) -> Judged:
    """Weights that the code expands, as findings and sites; the low-bit operators that it calls, as a note."""
    result = EvidenceResult("static", notes=["code of AOTInductor is judged by what inductor generated"])
    sites: list[Site] = []
    kernels = sorted({k for source in code.sources for k in _KERNELS.findall(source)})
    if kernels:
        result.notes.append(f"low-bit operators that the code calls: {', '.join(kernels)}")
    for source in code.sources:
        for name, codes, shape in _constants(source):
            n, k = shape[0], math.prod(shape[1:])
            halves = [(n, 2 * k)] if codes == "uint8" else []
            at = next((e for e in inductor_expands(source, [shape, (n, k), *halves]) if e.weight), None)
            if at is None:
                continue
            message = f"'{name}', {codes}{list(shape)}, is expanded to {at.dtype}{list(at.shape)}, {at.bytes} bytes"
            reason = f"inductor writes it to {at.buffer} on each call (line {at.line} of its wrapper)"
            result.findings.append(Finding("QC101", name, message, reason, FIX))
            result.nodes.append(NodeEvidence(name, "inductor", "dequant", facts={"buffer": at.buffer}))
            sites.append(Site(name, "conv" if len(shape) > 2 else "linear", n, k, n * k * 4, codes, "unfused", reason))
    for op in sorted({m[0] for text in code.calls for m in _DEQUANTIZE.finditer(text)}):
        message = f"the code calls {op}"
        result.findings.append(Finding("QC101", op, message, "it turns codes to floats on each call", FIX))
    return Judged(sites, list(result.findings), result)


def _constants(source: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each constant of at most 8 bits and two axes or more."""
    known: dict[str, dict[str, str]] = {}
    for m in _CONSTANT.finditer(source):
        known.setdefault(m[1], {})[m[2]] = m[3]
    for entry in known.values():
        kind = _CODES.get(entry.get("dtype", "").removeprefix("cached_torch_dtype_"), "")
        shape = _numbers(entry.get("shape", "").strip("{} "))
        name = entry.get("original_fqn") or entry.get("name", "?")
        if kind and shape is not None and len(shape) >= 2 and math.prod(shape) > 1 and CANARY not in name:
            yield name.strip('" '), kind, shape
