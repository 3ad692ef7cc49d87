"""What a compilation or a verification found, as one value with the JSON form of the public contract.

``Report.from_json(report.to_json()) == report`` for every report. The verdict and the totals are computed from the
sites and findings, never stored beside them, so a report cannot contradict itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qcompiler.checking import CheckedPass
from qcompiler.errors import InputError, StructureError
from qcompiler.fileio import Staged
from qcompiler.report.sums import Totals, totals
from qcompiler.sites import Site, Status
from qcompiler.verify.findings import Finding, Severity

SCHEMA = 1
EXACT_DB = 999.0
"""The signal-to-noise ratio that stands for "no error at all": JSON has no infinity."""

Verdict = Literal["accepted", "rejected"]


@dataclass(frozen=True)
class RecipeInfo:
    """The recipe that was run: its name, its full text, and the hash of that text; all empty when none was."""

    name: str = ""
    text: str = ""
    hash: str = ""


@dataclass(frozen=True)
class Source:
    """What went in. ``sha256`` is empty where the source is no file (a function, a graph in memory)."""

    kind: str
    path: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Timing:
    """Wall seconds of each step; ``passes_s`` by pass name."""

    capture_s: float = 0.0
    passes_s: Mapping[str, float] = field(default_factory=dict)
    emit_s: float = 0.0
    evidence_s: float = 0.0


@dataclass(frozen=True)
class OutputQuality:
    """One output, compiled against float on the same inputs. A figure is None where it is not finite (an output holds
    NaN, or one side of the cosine is all zeros); no error at all is :data:`EXACT_DB`."""

    cosine: float | None
    sqnr_db: float | None
    max_abs: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cosine", _finite(self.cosine))
        object.__setattr__(self, "sqnr_db", _decibel(self.sqnr_db))
        object.__setattr__(self, "max_abs", _finite(self.max_abs))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of the float model and of the compiled one on the same tokens."""

    float_model: float
    compiled: float


@dataclass(frozen=True)
class Quality:
    """How near the compiled model is to the float one. ``metric`` names the figure that the recipe is judged by."""

    metric: str
    outputs: Mapping[str, OutputQuality] = field(default_factory=dict)
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class ArtifactInfo:
    """What was written: the main path, the bytes of all files together, and their names."""

    path: str
    bytes: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The outcome of ``compile`` or ``verify``. ``phases`` maps a phase to its M; ``peak_rss_bytes`` is of the process.

    The sites are copied when the report is made: what happens to them later does not change it. Raises StructureError
    for a site that is still pending, because nothing may end without a status (law L2).
    """

    target: str
    source: Source
    recipe: RecipeInfo = RecipeInfo()
    findings: tuple[Finding, ...] = ()
    sites: tuple[Site, ...] = ()
    timing: Timing = Timing()
    peak_rss_bytes: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)
    quality: Quality | None = None
    artifact: ArtifactInfo | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checks: tuple[CheckedPass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", tuple(self.checks))
        object.__setattr__(self, "findings", tuple(self.findings))
        object.__setattr__(self, "sites", tuple(map(_snapshot, self.sites)))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "phases", dict(self.phases))
        object.__setattr__(self, "versions", dict(self.versions))

    @property
    def accepted(self) -> bool:
        """True when no finding is an error and no site is left unfused."""
        errors = any(f.severity == "error" for f in self.findings)
        return not errors and all(s.status != "unfused" for s in self.sites)

    @property
    def verdict(self) -> Verdict:
        return "accepted" if self.accepted else "rejected"

    @property
    def totals(self) -> Totals:
        """Computed from the sites by :func:`qcompiler.report.sums.totals`."""
        return totals(self.sites)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, keys in the order of the contract; every number is finite."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "target": self.target,
            "recipe": asdict(self.recipe),
            "source": asdict(self.source),
            "findings": [f.to_json() for f in self.findings],
            "sites": [s.to_json() for s in self.sites],
            "totals": asdict(self.totals),
            "timing": asdict(self.timing) | {"passes_s": dict(self.timing.passes_s)},
            "peak_rss_bytes": self.peak_rss_bytes,
            "phases": dict(self.phases),
            "quality": _quality_json(self.quality),
            "artifact": None if self.artifact is None else asdict(self.artifact) | {"files": list(self.artifact.files)},
            "versions": dict(self.versions),
            "notes": list(self.notes),
            **({"checks": [c.to_json() for c in self.checks]} if self.checks else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Read what :meth:`to_json` wrote; keys it does not know are left out. Raises InputError on anything else."""
        found = data.get("schema") if isinstance(data, Mapping) else None
        if found != SCHEMA:
            raise InputError(
                f"not a report of schema {SCHEMA} (its schema is {found!r}); write it anew with this version"
            )
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            what = f"key {e} is missing" if isinstance(e, KeyError) else str(e)
            raise InputError(f"the report is damaged: {what}; write it anew with 'qcompiler verify'") from None

    def text(self) -> str:
        """The JSON text that ``--json`` prints and :meth:`save` writes: strict JSON, ASCII, one final newline."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`text` to ``path``, whole or not at all; raises InputError when it cannot be written."""
        with Staged(Path(path)) as staged:
            staged.main.write_text(self.text(), encoding="utf-8", newline="\n")
            staged.commit()
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report file; raises InputError when it is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"there is no report {path}") from None
        except (OSError, ValueError) as e:
            raise InputError(f"{path} is no report: {e}") from None
        return cls.from_json(data)


def _finite(x: float | None) -> float | None:
    return float(x) if x is not None and math.isfinite(x) else None


def _decibel(db: float | None) -> float | None:
    """Bounded by :data:`EXACT_DB` on both sides; NaN, which is no ratio, becomes None."""
    return None if db is None or math.isnan(db) else max(-EXACT_DB, min(EXACT_DB, float(db)))


def _snapshot(site: Site) -> Site:
    if site.status == "pending":
        raise StructureError(f"site '{site.name}' ended neither fused, skipped nor unfused")
    sizes = {"codes": 0, "scales": 0, "zeros": 0} | {part: int(size) for part, size in site.bytes.items()}
    n, k, before = int(site.n), int(site.k), int(site.before)  # NumPy's numbers are not JSON's
    db = _decibel(site.sqnr_db)
    out = replace(site, n=n, k=k, before=before, bytes=sizes, kernel=dict(site.kernel), sqnr_db=db)
    out.weight, out.stats = None, {}  # a report keeps no graph alive
    out.tied_to = site.tied_to or None
    return out


def _quality_json(quality: Quality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    outputs = {name: asdict(q) for name, q in quality.outputs.items()}
    perplexity = None if quality.perplexity is None else asdict(quality.perplexity)
    return {"metric": quality.metric, "outputs": outputs, "perplexity": perplexity}


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``data`` that ``cls`` has a field for."""
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in data.items() if k in names}


def _one_of(value: Any, allowed: Iterable[str], what: str) -> Any:
    if value not in (known := tuple(allowed)):
        raise ValueError(f"{what} is {value!r}, not one of {', '.join(known)}")
    return value


def site_from_json(data: Mapping[str, Any]) -> Site:
    """Inverse of :meth:`qcompiler.sites.Site.to_json`; raises KeyError, TypeError or ValueError."""
    _one_of(data["status"], get_args(Status), f"the status of site {data['name']!r}")
    sizes = dict(data["bytes"])
    before = int(sizes.pop("before"))
    keys = ("name", "op", "n", "k", "scheme", "status", "reason", "evidence", "sqnr_db", "tied_to")
    values = {key: data[key] for key in keys if key in data} | {"kernel": dict(data["kernel"])}
    return Site(**values, before=before, bytes={part: int(size) for part, size in sizes.items()})


def _finding_from_json(data: Mapping[str, Any]) -> Finding:
    _one_of(data["severity"], get_args(Severity), f"the severity of {data['code']}")
    return Finding(**_known(Finding, data))


def _quality_from_json(data: Mapping[str, Any] | None) -> Quality | None:
    if data is None:
        return None
    outputs = {name: OutputQuality(**_known(OutputQuality, q)) for name, q in data["outputs"].items()}
    found = data.get("perplexity")
    perplexity = None if found is None else Perplexity(**_known(Perplexity, found))
    return Quality(data["metric"], outputs, perplexity)


def _read(data: Mapping[str, Any]) -> Report:
    artifact = data.get("artifact")
    if artifact is not None:
        artifact = ArtifactInfo(**_known(ArtifactInfo, artifact) | {"files": tuple(artifact["files"])})
    return Report(
        target=data["target"],
        source=Source(**_known(Source, data["source"])),
        recipe=RecipeInfo(**_known(RecipeInfo, data["recipe"])),
        findings=tuple(map(_finding_from_json, data["findings"])),
        sites=tuple(map(site_from_json, data["sites"])),
        timing=Timing(**_known(Timing, data["timing"])),
        peak_rss_bytes=data["peak_rss_bytes"],
        phases=dict(data.get("phases", {})),
        quality=_quality_from_json(data.get("quality")),
        artifact=artifact,
        versions=dict(data.get("versions", {})),
        notes=tuple(data.get("notes", ())),
        checks=tuple(CheckedPass(**_known(CheckedPass, c)) for c in data.get("checks", ())),
    )
