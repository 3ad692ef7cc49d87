"""Recipes: a tuple of frozen passes, as TOML or as one line of text, which prints back as it is written.

One line: ``insert-qdq{weights = "int4 g128 asym", skip = ["lm_head"]}, fold-constants, fuse-linear``. Options that keep
their default are not printed. Unknown passes and unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from qcompiler.errors import Error, RecipeError
from qcompiler.ir import Attr
from qcompiler.passes import catalogue
from qcompiler.pipeline import Pass
from qcompiler.reader import parse_attrs
from qcompiler.scheme import Alternatives, Scheme, parse_alternatives, parse_scheme
from qcompiler.text import show_attr

_STEP = re.compile(r"\s*([a-z0-9][a-z0-9-]*)\s*")


@dataclass(frozen=True)
class Recipe:
    """A named list of passes. ``text`` is its canonical one line, ``hash`` the first 16 hex digits of its SHA-256."""

    name: str
    passes: tuple[Pass, ...]
    description: str = ""

    @cached_property
    def text(self) -> str:
        return ", ".join(map(show_pass, self.passes))

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def toml(self) -> str:
        """The recipe as TOML; :func:`parse_toml` reads it back."""
        lines = [f'description = "{self.description}"', ""] if self.description else []
        for item in self.passes:
            lines += ["[[pass]]", f'pass = "{item.name}"']
            lines += [f"{key} = {_toml_value(value)}" for key, value in options(item).items()] + [""]
        return "\n".join(lines)


def options(item: Pass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults, schemes as text."""
    out = {}
    for f in dataclasses.fields(item):  # type: ignore[arg-type]  # every pass is a dataclass
        value = getattr(item, f.name)
        if f.default is dataclasses.MISSING or value != f.default:
            out[f.name] = value.text if isinstance(value, Scheme | Alternatives) else value
    return out


def show_pass(item: Pass) -> str:
    """``name`` or ``name{key = value, ...}``."""
    given = options(item)
    inner = ", ".join(f"{key} = {show_attr(value)}" for key, value in given.items())
    return f"{item.name}{{{inner}}}" if given else item.name


def _toml_value(value: Any) -> str:
    return show_attr(value)  # strings, numbers, booleans and lists are spelled alike in both


# -- building a pass from options ----------------------------------------------------------------------------


def make_pass(name: str, given: Mapping[str, Any]) -> Pass:
    """The pass ``name`` with options ``given``; raises RecipeError for an unknown name or key or a wrong type."""
    known = catalogue()
    if name not in known:
        raise RecipeError(f"unknown pass {name!r}; known: {', '.join(known)}")
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            takes = ", ".join(fields) or "no options"
            raise RecipeError(f"pass {name} has no option {key!r}; it takes {takes}")
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in given:
            raise RecipeError(f"pass {name} needs its option {key!r}")
    return cls(**{key: _convert(name, key, hints[key], value) for key, value in given.items()})


def _convert(name: str, key: str, hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if Alternatives in kinds and isinstance(value, str):
            kinds = [Alternatives] if "|" in value else [k for k in kinds if k is not Alternatives]
        reasons = []
        for kind in kinds:
            try:
                return _convert(name, key, kind, value)
            except RecipeError as e:
                reasons.append(str(e))
        raise RecipeError("; or ".join(reasons))
    if hint is Scheme:
        if isinstance(value, Scheme):
            return value
        if isinstance(value, str):
            return parse_scheme(value)
    elif hint is Alternatives:
        if isinstance(value, Alternatives):
            return value
        if isinstance(value, str):
            return parse_alternatives(value)
    elif origin is typing.Literal:
        if value in args:
            return value
        raise RecipeError(f"{name}.{key} is one of {', '.join(map(repr, args))}, not {value!r}")
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, Sequence):
            return tuple(_convert(name, key, args[0], v) for v in items)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise RecipeError(f"{name}.{key} takes a {wanted}, not {value!r}")


# -- reading -------------------------------------------------------------------------------------------------


def parse_line(text: str, name: str = "text") -> Recipe:
    """Read the one-line form; raises RecipeError with the place where it is wrong."""
    passes: list[Pass] = []
    at = 0
    while True:
        m = _STEP.match(text, at)
        if m is None:
            raise RecipeError(f"recipe text, column {at + 1}: expected the name of a pass, got {text[at : at + 12]!r}")
        at = m.end()
        given: dict[str, Attr] = {}
        if text[at : at + 1] == "{":
            end = _closing(text, at)
            try:
                given = parse_attrs(text[at:end])
            except Error as e:
                raise RecipeError(f"options of pass {m[1]}: {e}") from None
            at = end
        passes.append(make_pass(m[1], given))
        rest = text[at:].lstrip()
        at = len(text) - len(rest)
        if not rest:
            return Recipe(name, tuple(passes))
        if rest[0] not in ",;":
            raise RecipeError(f"recipe text, column {at + 1}: expected ',' between passes, got {rest[:12]!r}")
        at += 1


def _closing(text: str, at: int) -> int:
    """The index after the brace that closes the one at ``at``; braces in strings do not count."""
    for m in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}]', text[at:]):
        if m[0] == "}":
            return at + m.end()
    raise RecipeError(f"recipe text, column {at + 1}: the brace is never closed")


def parse_toml(text: str, name: str) -> Recipe:
    """Read the TOML form: an optional description and ``[[pass]]`` tables."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise RecipeError(f"recipe {name}: {e}") from None
    for key in data:
        if key not in ("pass", "description"):
            raise RecipeError(f"recipe {name}: unknown key {key!r}; a recipe has 'description' and [[pass]] tables")
    passes = []
    for table in data.get("pass", []):
        if not isinstance(table, dict) or not isinstance(table.get("pass"), str):
            raise RecipeError(f'recipe {name}: each [[pass]] table names its pass: pass = "insert-qdq"')
        passes.append(make_pass(table["pass"], {k: v for k, v in table.items() if k != "pass"}))
    if not passes:
        raise RecipeError(f"recipe {name} has no [[pass]] table")
    return Recipe(name, tuple(passes), str(data.get("description", "")))


def names() -> list[str]:
    """The recipes in the package."""
    folder = files("qcompiler") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(source: str | Path | Recipe) -> Recipe:
    """A recipe by name, by path of a TOML file, or from one line of text; raises RecipeError."""
    if isinstance(source, Recipe):
        return source
    text = str(source)
    if text in names():
        return parse_toml((files("qcompiler") / "recipes" / f"{text}.toml").read_text("utf-8"), text)
    if text.endswith(".toml"):
        try:
            return parse_toml(Path(text).read_text("utf-8"), Path(text).stem)
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"recipe file {text!r} cannot be read: {e}") from None
    if re.fullmatch(r"[\w.-]+", text) and text not in catalogue():
        raise RecipeError(f"unknown recipe {text!r}; known: {', '.join(names())}, a .toml file, or one line of passes")
    return parse_line(text)


def adjusted(recipe: Recipe, settings: Mapping[str, Any], skip: Sequence[str] = ()) -> Recipe:
    """``recipe`` with options changed (``{"pass.key": value}``) and site globs added to ``insert-qdq.skip``.

    A value given as text is read as in the one-line form where it can be, else taken as the text itself. Raises
    RecipeError for a pass that the recipe does not have or an option that the pass does not have.
    """
    passes = list(recipe.passes)
    changes: list[tuple[str, str, Any]] = []
    for path, value in settings.items():
        name, dot, key = path.partition(".")
        if not dot or not key:
            raise RecipeError(f"--set takes pass.key=value, not {path!r}")
        changes.append((name, key, _read_value(value)))
    if skip:
        had = next((p.skip for p in passes if p.name == "insert-qdq"), ())  # type: ignore[attr-defined]
        changes.append(("insert-qdq", "skip", (*had, *skip)))
    for name, key, value in changes:
        places = [i for i, p in enumerate(passes) if p.name == name]
        if not places:
            has = ", ".join(dict.fromkeys(p.name for p in passes))
            raise RecipeError(f"recipe {recipe.name} has no pass {name!r}; it has {has}")
        for i in places:
            passes[i] = make_pass(name, {**options(passes[i]), key: value})
    return Recipe(recipe.name, tuple(passes), recipe.description)


def _read_value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_attrs(f"{{v = {value}}}")["v"]
    except Error:
        return value
