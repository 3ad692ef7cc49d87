"""Programs that torch cannot read here, for want of the library that registers their operators: judged by names."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qcompiler.backends.base import Judged
from qcompiler.errors import InputError
from qcompiler.verify.evidence import EvidenceResult
from qcompiler.verify.findings import Finding

_NAME = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)\Z")
FIX = "compile the float model with qcompiler, whose artifacts need torch alone"


def judge_unreadable(path: Path, error: InputError) -> Judged | None:
    """The verdict on a ``.pt2`` file that names operators which are not registered, or tensor classes that torch does
    not know; None where it is unreadable for another reason."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            nodes = [n for f in names if f.endswith(".json") and "/models/" in f for n in _nodes(archive.read(f))]
            classes = _classes(archive)
    # A damaged file (an unknown compression is a NotImplementedError of zipfile): ``error`` has said so already.
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, NotImplementedError):
        return None
    absent = {target: name for target, name in nodes if _absent(target)}
    if not absent and not classes:
        return None
    result = EvidenceResult("static", notes=[f"torch cannot read the program here: {error}"])
    for fqn, cls in classes:
        message = f"'{fqn}' is a tensor of class {cls}"
        reason = "what its operators do with the codes is up to that library; torch alone cannot even read the file"
        result.findings.append(Finding("QC101", fqn, message, reason, FIX))
    for target, name in absent.items():
        what = target.removeprefix("torch.ops.")
        dequantizes = "dequant" in target
        message = f"{what} '{name}' turns codes to floats" if dequantizes else f"{what} '{name}' is not known to torch"
        reason = "its library is not imported here, and no kernel row of the target is it"
        code = "QC101" if dequantizes else "QC902"
        result.findings.append(Finding(code, name, message, reason, FIX))
    return Judged([], list(result.findings), result)


def _nodes(data: bytes) -> Iterator[tuple[str, str]]:
    """Operator and name of each node of a serialized program, of its subgraphs too."""
    work: list[Any] = [json.loads(data)]
    while work:
        at = work.pop()
        if isinstance(at, dict):
            target = at.get("target")
            if isinstance(target, str) and "inputs" in at and "outputs" in at:
                yield target, _output_of(at["outputs"]) or target
            work.extend(at.values())
        elif isinstance(at, list):
            work.extend(at)


def _output_of(outputs: Any) -> str:
    for out in outputs if isinstance(outputs, list) else []:
        tensor = out.get("as_tensor") if isinstance(out, dict) else None
        if isinstance(tensor, dict) and isinstance(tensor.get("name"), str):
            return str(tensor["name"])
    return ""


def _absent(target: str) -> bool:
    m = _NAME.match(target)
    if m is None or m[1] == "higher_order":
        return False
    packet = getattr(getattr(torch.ops, m[1], None), m[2], None)
    return packet is None or not hasattr(packet, m[3])


def _classes(archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Weights that are stored as pickles of a class outside torch: qualified name and class. Nothing is unpickled."""
    out = []
    for config in (n for n in archive.namelist() if n.endswith(("_weights_config.json", "_constants_config.json"))):
        folder = config.rpartition("/")[0]
        for fqn, entry in json.loads(archive.read(config)).get("config", {}).items():
            if entry.get("use_pickle") and (cls := _class_in(archive.read(f"{folder}/{entry['path_name']}"))):
                out.append((str(fqn), cls))
    return out


def _class_in(data: bytes) -> str:
    """The first class outside torch and the standard library that a saved tensor names; empty where there is none."""
    import io

    with zipfile.ZipFile(io.BytesIO(data)) as saved:
        name = next((n for n in saved.namelist() if n.endswith("data.pkl")), None)
        pickle = b"" if name is None else saved.read(name)
    words: list[str] = []
    for opcode, arg, _ in pickletools.genops(pickle):
        if isinstance(arg, str):
            words.append(arg)
        named = arg if opcode.name == "GLOBAL" else " ".join(words[-2:]) if opcode.name == "STACK_GLOBAL" else ""
        module, _, cls = str(named).partition(" ")
        if cls and module.partition(".")[0] not in ("torch", "collections", "builtins", "_codecs", "functools"):
            return f"{module}.{cls}"
    return ""
