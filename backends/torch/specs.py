"""The nested structure of arguments and results as text: ``(('*',), {})`` where ``'*'`` stands for a value.

Structures of tuples, lists and dicts are Python literals; those with other registered classes are torch's own JSON.
"""

from __future__ import annotations

import ast

from torch.utils import _pytree as pytree

from qcompiler.errors import InputError

LEAF = "*"
_JSON = "json:"


def spec_text(spec: pytree.TreeSpec, what: str) -> str:
    """``spec`` as text; InputError when it holds a class that cannot be named. ``what`` is for the message."""
    if _plain(spec):
        return repr(pytree.tree_unflatten([LEAF] * spec.num_leaves, spec))
    try:
        return _JSON + pytree.treespec_dumps(spec)
    except NotImplementedError as e:
        raise InputError(f"the structure of the program's {what} cannot be written down: {e}") from e


def parse_spec(text: str) -> pytree.TreeSpec:
    """Inverse of :func:`spec_text`; InputError for text that is no structure of classes known here."""
    try:
        if text.startswith(_JSON):
            return pytree.treespec_loads(text.removeprefix(_JSON))
        return pytree.tree_structure(ast.literal_eval(text))
    except Exception as e:
        raise InputError(f"{text[:60]!r} is no structure of arguments or results that is known here: {e}") from e


def _plain(spec: pytree.TreeSpec) -> bool:
    if spec.is_leaf():
        return True
    if spec.type not in (tuple, list, dict):
        return False
    if spec.type is dict and not all(isinstance(k, (str, int)) for k in spec.context):
        return False
    return all(map(_plain, spec.children()))
