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


def judge_package(path: Path) -> Judged | None:
    """The verdict on a package of AOTInductor, by its generated code; None for any other file.

    Raises InputError where the package holds no code to read.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any("/aotinductor/" in n for n in names) or any(n.endswith("models/model.json") for n in names):
                return None
            sources = [archive.read(n).decode(errors="replace") for n in names if n.endswith(".cpp")]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
        raise InputError(f"{path.name} is damaged: {e}") from e
    if not sources:
        raise InputError(
            f"{path.name} is a package of AOTInductor without its source code; give the .pt2 of torch.export"
        )
    return _judge_sources(sources)


def _judge_sources(sources: Sequence[str]) -> Judged:
    result = EvidenceResult("static", notes=["a package of AOTInductor: judged by the code that inductor generated"])
    sites: list[Site] = []
    for source in sources:
        kernels = sorted(set(_KERNELS.findall(source)))
        if kernels:
            result.notes.append(f"low-bit operators that it calls: {', '.join(kernels)}")
        for name, codes, shape in _constants(source):
            n, k = shape[0], math.prod(shape[1:])
            halves = [(n, 2 * k)] if codes == "uint8" else []
            buffers = inductor_expands(source, [shape, (n, k), *halves])
            if not buffers:
                continue
            at = buffers[0]
            message = f"'{name}', {codes}{list(shape)}, is expanded to {at.dtype}{list(at.shape)}, {at.bytes} bytes"
            reason = f"inductor writes it to {at.buffer} on each call (line {at.line} of its wrapper)"
            result.findings.append(Finding("QC101", name, message, reason, FIX))
            result.nodes.append(NodeEvidence(name, "inductor", "dequant", facts={"buffer": at.buffer}))
            sites.append(Site(name, "linear", n, k, n * k * 4, codes, "unfused", reason))
    return Judged(sites, list(result.findings), result)


def _constants(source: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each constant of at most 8 bits and two axes or more."""
    known: dict[str, dict[str, str]] = {}
    for m in _CONSTANT.finditer(source):
        known.setdefault(m[1], {})[m[2]] = m[3]
    for entry in known.values():
        kind = _CODES.get(entry.get("dtype", "").removeprefix("cached_torch_dtype_"), "")
        shape = _numbers(entry.get("shape", "").strip("{} "))
        if kind and shape is not None and len(shape) >= 2 and math.prod(shape) > 1:
            name = entry.get("original_fqn") or entry.get("name", "?")
            yield name.strip('" '), kind, shape
