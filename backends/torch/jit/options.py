"""The ``options`` of ``torch.compile(model, backend="qcompiler", options={...})``, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcompiler import recipe as recipes
from qcompiler.errors import RecipeError
from qcompiler.recipe import Recipe
from qcompiler.report.model import Report
from qcompiler.target import PHASES, Phase

KNOWN = (
    "recipe",
    "target",
    "skip",
    "settings",
    "phases",
    "calibration",
    "inner",
    "on_reject",
    "release_weights",
    "report",
)
INNER = ("inductor", "eager")
ON_REJECT = ("error", "float")


@dataclass(frozen=True)
class Options:
    """What a compilation was asked for. ``target`` and ``inner`` are None where the graph and the machine decide."""

    recipe: Recipe
    target: str | None = None
    phases: tuple[Phase, ...] = PHASES
    calibration: Any = None
    inner: Literal["inductor", "eager"] | None = None
    on_reject: Literal["error", "float"] = "error"
    release_weights: bool = False
    report: list[Report] | Callable[[Report], Any] | None = None

    def deliver(self, report: Report) -> None:
        """Hand ``report`` to whoever asked for it."""
        if isinstance(self.report, list):
            self.report.append(report)
        elif self.report is not None:
            self.report(report)


def read_options(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """``given`` as options; raises RecipeError for an unknown key or a value that means nothing."""
    if mode is not None:
        raise RecipeError(f"backend='qcompiler' has no mode {mode!r}; give options={{'recipe': ...}} instead")
    given = dict(given or {})
    for key in given:
        if key not in KNOWN:
            raise RecipeError(f"backend='qcompiler' has no option {key!r}; it takes {', '.join(KNOWN)}")
    _one_of("inner", given.get("inner"), (None, *INNER))
    _one_of("on_reject", given.get("on_reject", "error"), ON_REJECT)
    release = given.get("release_weights", False)
    if not isinstance(release, bool):
        raise RecipeError(f"the option 'release_weights' is True or False, not {release!r}")
    report = given.get("report")
    if report is not None and not isinstance(report, list) and not callable(report):
        raise RecipeError(f"the option 'report' is a list or a function that takes a Report, not {report!r}")
    return Options(
        _recipe(given),
        given.get("target"),
        _phases(given.get("phases")),
        given.get("calibration"),
        given.get("inner"),
        given.get("on_reject", "error"),
        release,
        report,
    )


def _one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        words = " or ".join(repr(a) for a in allowed if a is not None)
        raise RecipeError(f"the option {key!r} is {words}, not {value!r}")


def _recipe(given: Mapping[str, Any]) -> Recipe:
    source = given.get("recipe", "w4a16")
    if not isinstance(source, str | Path | Recipe):
        raise RecipeError(f"the option 'recipe' is a name, a .toml file or one line of passes, not {source!r}")
    settings, skip = given.get("settings") or {}, given.get("skip") or ()
    if not isinstance(settings, Mapping):
        raise RecipeError(f"the option 'settings' maps 'pass.key' to a value, it is no {type(settings).__name__}")
    for path in settings:
        if str(path).startswith("emit."):
            raise RecipeError(f"torch.compile writes no file, so the setting {path!r} means nothing here; leave it out")
    globs = (skip,) if isinstance(skip, str) else tuple(skip)
    return recipes.adjusted(recipes.load(source), settings, globs)


def _phases(given: Any) -> tuple[Phase, ...]:
    """Phases from a mapping name -> M, or as they are."""
    if given is None:
        return PHASES
    if isinstance(given, Mapping):
        return tuple(Phase(str(name), int(m)) for name, m in given.items())
    if all(isinstance(p, Phase) for p in given):
        return tuple(given)
    raise RecipeError(f"the option 'phases' maps names to M, as in {{'decode': 1, 'prefill': 512}}, not {given!r}")
