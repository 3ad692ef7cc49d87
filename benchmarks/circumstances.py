"""What every result file says of the run that made it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from typing import Any


def circumstances(script: str, *packages: str, **settings: Any) -> dict[str, Any]:
    """The command (``script`` and its arguments), commit, machine, versions of ``packages``, ``settings``."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": shlex.join(["python", *script.split(), *sys.argv[1:]]),
        "commit": done.stdout.strip(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "settings": settings | {"load_average": round(os.getloadavg()[0], 1)},
    }
