"""Recipes: two spellings of one tuple of passes, both read back; what is wrong with one is said by name."""

from __future__ import annotations

import pytest

from qcompiler import recipe
from qcompiler.errors import RecipeError
from qcompiler.passes import catalogue
from qcompiler.scheme import parse_scheme


@pytest.mark.parametrize("name", recipe.names())
def test_a_named_recipe_reads_back_from_both_forms(name: str) -> None:
    found = recipe.load(name)
    assert found.description
    line = recipe.parse_line(found.text)
    assert line.passes == found.passes
    assert line.text == found.text
    toml = recipe.parse_toml(found.toml, name)
    assert toml == found
    assert toml.hash == found.hash
    assert len(found.hash) == 16


def test_options_have_their_types() -> None:
    (item,) = recipe.parse_line('insert-qdq{weights = "int4 g64 sym", match = "a.*", skip = ["b", "c"]}').passes
    assert item == catalogue()["insert-qdq"](  # type: ignore[call-arg]
        weights=parse_scheme("int4 g64 sym"), match=("a.*",), skip=("b", "c")
    )
    assert recipe.show_pass(item) == 'insert-qdq{weights = "int4 g64 sym", match = ["a.*"], skip = ["b", "c"]}'


def test_a_scheme_may_be_spelled_as_the_ir_spells_it() -> None:
    a = recipe.parse_line("insert-qdq{weights = <int4 g64 sym>}")
    b = recipe.parse_line('insert-qdq{weights = "int4 g64 sym"}')
    assert a == b


def test_settings_change_one_pass_and_the_hash() -> None:
    base = recipe.load("w4a16")
    changed = recipe.adjusted(base, {"insert-qdq.weights": "int8 channel sym", "insert-qdq.clip": "mse"}, ["lm_head"])
    assert 'weights = "int8 channel sym"' in changed.text
    assert 'skip = ["lm_head"]' in changed.text
    assert 'clip = "mse"' in changed.text
    assert changed.hash != base.hash
    assert recipe.adjusted(base, {}) == base


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("insert-qdq", "needs its option 'weights'"),
        ("nonsense, dce", "unknown pass 'nonsense'; known: "),
        ("dce{speed = 1}", "has no option 'speed'; it takes no options"),
        ('insert-qdq{weights = "int4 g64", clip = "max"}', "clip is one of 'absmax', 'mse', not 'max'"),
        ('insert-qdq{weights = "int4 g64", skip = [1]}', "skip takes a str, not 1"),
        ("insert-qdq{weights = 4}", "weights takes a Scheme, not 4"),
        ('insert-qdq{weights = "int4 g64"', "the brace is never closed"),
        ("dce dce", "expected ',' between passes"),
        ("dce,", "expected the name of a pass"),
    ],
)
def test_what_is_wrong_is_said(text: str, why: str) -> None:
    with pytest.raises(RecipeError) as e:
        recipe.parse_line(text)
    assert why in str(e.value)
