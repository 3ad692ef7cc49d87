"""The page of each finding code: what it is, why it costs, how to fix it, an example."""

from __future__ import annotations

from importlib.resources import files

from qcompiler.errors import InputError
from qcompiler.verify.findings import CODES


def explanation(code: str) -> str:
    """The page of ``code``, in Markdown; upper and lower case, and a missing ``QC``, are all the same.

    Raises InputError that lists the codes.
    """
    wanted = code.strip().upper()
    wanted = f"QC{wanted}" if wanted.isdigit() else wanted
    if wanted not in CODES:
        raise InputError(f"there is no finding code {code!r}; known: {', '.join(CODES)}")
    return (files("qcompiler") / "verify" / "explain" / f"{wanted}.md").read_text(encoding="utf-8")
