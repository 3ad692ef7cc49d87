"""What the assembler made of a kernel: registers, stack, instructions and loops, by the tools that triton carries."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_PTX_LABEL = re.compile(r"^(\$L__BB\w+):")
_PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
MATRIX = re.compile(r"^(UTC[A-Z]*MMA|[A-Z]GMMA|[HIQOBDF]MMA)\b")
"""Tensor-core instructions of every architecture, as ``nvdisasm`` prints them."""
_PTX_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
SERIALIZED = re.compile(r"^.*(?:C7510|C7515|wgmma.*serializ).*$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Disassembly:
    """Of one kernel. ``registers`` of a thread; ``stack`` bytes of a thread, more than 0 where registers spill;
    ``instructions``: opcodes in order; ``loop``: those of the main loop (innermost with products, else the longest),
    ``unrolled``: how many turns of the source's loop one turn of it holds."""

    registers: int
    stack: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]
    unrolled: int

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return sum(i.startswith(("LDL", "STL")) for i in self.instructions)

    @property
    def matrix(self) -> tuple[str, ...]:
        return tuple(i for i in self.instructions if MATRIX.match(i))


def tool(name: str) -> Path:
    """``cuobjdump``, ``nvdisasm`` or an assembler, out of the installed triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise InputError(f"this triton ({triton.__version__}) carries no {name}; install triton from PyPI")
    return path


def output_of(name: str, *arguments: str) -> str:
    """What a tool prints; raises InputError with its last line where it fails."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InputError(f"{name} failed with status {done.returncode}: {' '.join(tail)}")
    return done.stdout


def _loops(lines: list[tuple[str, str]], label: re.Pattern[str], branch: re.Pattern[str]) -> list[tuple[int, int]]:
    """Ranges of lines between a label and a branch back to it; ``lines`` are (label or "", text)."""
    where: dict[str, int] = {}
    found = []
    for index, (name, text) in enumerate(lines):
        if name:
            where[name] = index
        for target in branch.findall(text):
            if target in where and where[target] < index - 1:
                found.append((where[target], index))
    return found


def _main(loops: list[list[str]], matrix: re.Pattern[str]) -> list[str]:
    """The shortest loop with products in it, else the longest."""
    with_products = [body for body in loops if any(matrix.search(line) for line in body)]
    if with_products:
        return max(with_products, key=lambda body: (sum(bool(matrix.search(line)) for line in body), -len(body)))
    return max(loops, key=len, default=[])


def sass_loop(sass: str) -> list[str]:
    """Opcodes of the main loop; empty where there is none."""
    lines: list[tuple[str, str]] = []
    for line in sass.splitlines():
        name = _LABEL.match(line)
        if name is not None:
            lines.append((name[1], ""))
        elif (found := _INSTRUCTION.match(line)) is not None:
            lines.append(("", f"{found[2]} {found[3]}"))
    bodies = [
        [text.split(" ", 1)[0] for _, text in lines[first : last + 1] if text]
        for first, last in _loops(lines, _LABEL, _TARGET)
    ]
    return _main(bodies, MATRIX)


def ptx_products(ptx: str) -> int:
    """Tensor-core instructions in the main loop of PTX, which no assembler has unrolled yet."""
    lines: list[tuple[str, str]] = []
    for line in ptx.splitlines():
        name = _PTX_LABEL.match(line)
        lines.append((name[1] if name else "", line.split("//")[0]))
    bodies = [[text for _, text in lines[first : last + 1]] for first, last in _loops(lines, _PTX_LABEL, _PTX_BRANCH)]
    return sum(bool(_PTX_MATRIX.search(line)) for line in _main(bodies, _PTX_MATRIX))


def disassemble(cubin: bytes, ptx: str) -> Disassembly:
    """Read a compiled kernel."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = output_of("cuobjdump", "-res-usage", str(path))
        sass = output_of("nvdisasm", "-c", "-ndf", str(path))
    resources = [re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK")]
    if resources[0] is None or resources[1] is None:
        raise InputError(f"cuobjdump reports no registers and no stack for a kernel: {usage.strip()!r}")
    opcodes = tuple(m[1] for m in _INSTRUCTION.findall(sass))
    loop = sass_loop(sass)
    products = ptx_products(ptx)
    held = sum(bool(MATRIX.match(i)) for i in loop)
    unrolled = max(1, held // products) if products else 1
    return Disassembly(int(resources[0][1]), int(resources[1][1]), opcodes, tuple(loop), unrolled)


@functools.lru_cache(maxsize=256)
def assembler_log(ptx: str, sm: int) -> str:
    """What the assembler of this architecture says of the kernel under ``-v``."""
    import triton.backends.nvidia.compiler as compiler

    module: Any = compiler
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        name = f"--gpu-name={module.sm_arch_from_capability(sm)}"
        command = [module.get_ptxas(sm).path, "-v", name, str(path), "-o", str(path.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
