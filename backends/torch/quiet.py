"""Run torch's exporters without their chatter, and turn their exceptions into one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

from qcompiler.backends.torch.stack import source_line
from qcompiler.errors import Error, InputError

_HINTS = {
    "transformers::grouped_mm_fallback": "build the model with experts_implementation='batched_mm'",
    "has no attribute 'name'": "its results must all be tensors",
    "data-dependent": "a branch or a size depends on a tensor's values; write it with torch.cond or torch.where",
}
_OVERLOAD = re.compile(r"<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")
_NOISE = ("#", "Traceback", "During handling", "The above exception", "Failed to export", "Failed to convert")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back what is printed, warned and logged inside; all of it is process-wide, so not for threads."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def one_sentence(doing: str) -> Iterator[None]:
    """Run quietly; a failure inside becomes ``InputError("<doing>: <cause>")``, the innermost cause."""
    try:
        with quietly():
            yield
    except (Error, KeyboardInterrupt, MemoryError):
        raise
    except Exception as e:
        raise InputError(f"{doing}: {sentence_of(e)}") from e


def sentence_of(error: BaseException) -> str:
    """The innermost cause of ``error`` in one line: its first telling one, ops as ``namespace::op``, a hint."""
    deepest = error
    seen = {id(error)}
    while (inner := deepest.__cause__ or deepest.__context__) is not None and id(inner) not in seen:
        # A context that a later error replaced on purpose (a suppressed one) is no cause.
        if deepest.__cause__ is None and deepest.__suppress_context__:
            break
        seen.add(id(inner))
        deepest = inner
    told = _telling(str(deepest)) or _telling(str(error)) or type(deepest).__name__
    told = _OVERLOAD.sub(lambda m: m[1].replace(".", "::", 1) + _overload(m[2]), told)
    told = re.split(r"\. Failure message:| \(unhinted", told)[0].rstrip(" .:!")
    if "data-dependent" in told and (place := source_line(str(deepest))):
        told = f"{told} at {place}"
    hint = next((h for op, h in _HINTS.items() if op in told), None)
    return f"{told}; {hint}" if hint else told


def _overload(name: str) -> str:
    return "" if name == "default" else f".{name}"


def _telling(text: str) -> str:
    """The first line that says something, with the first bullet under it when it announces a list."""
    lines = [s for line in text.splitlines() if (s := line.strip()) and not s.startswith(_NOISE)]
    if not lines:
        return ""
    first = lines[0].split(" For more information, run with TORCH_LOGS")[0]
    bullet = next((s for s in lines[1:4] if s.startswith("- ")), None)
    if bullet is not None and ("violated" in first or first.endswith(":")):
        first = f"{first} {bullet[2:]}"
    return first[:400]
