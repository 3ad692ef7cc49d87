"""What travels inside a ``.pt2`` file beside the program: our metadata, and the names of its symbolic sizes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.ir import Graph, TensorType

FILE = "qcompiler.json"
"""Name of the extra file, as ``torch.export.save(..., extra_files=...)`` takes it."""


@dataclass(frozen=True)
class Notes:
    """``metadata`` is what :meth:`Backend.annotate` was given; ``sizes`` maps an input to the text of its shape."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> Notes:
        """Those of a graph."""
        sizes = {
            v.name: tuple(str(d) for d in v.type.shape)
            for v in graph.inputs
            if v.payload is None and isinstance(v.type, TensorType) and v.type.shape is not None
        }
        return Notes({str(k): str(v) for k, v in graph.meta.get("metadata", ())}, sizes)

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps({"metadata": dict(self.metadata), "sizes": self.sizes}, sort_keys=True)

    @staticmethod
    def inside(path: Path) -> Notes:
        """Those in the archive at ``path``; none where there is no such file in it, or another tool's."""
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/extra/{FILE}")), None)
            found = {} if name is None else json.loads(archive.read(name))
        if not isinstance(found, dict):
            return Notes()
        metadata, sizes = (_mapping(found.get(key)) for key in ("metadata", "sizes"))
        return Notes(
            {k: v for k, v in metadata.items() if isinstance(v, str)},
            {k: tuple(map(str, v)) for k, v in sizes.items() if isinstance(v, list)},
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
