"""Read the text that :mod:`qcompiler.text` prints; errors give line, column and what was expected."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import numpy as np

from qcompiler import dtypes
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Attr, Dim, Graph, Hole, Loc, Op, OpaqueType, TensorType, Type, Value
from qcompiler.payload import ArrayPayload, Payload, RandomPayload, UnreadablePayload
from qcompiler.scheme import parse_scheme

_TOKEN = re.compile(
    r"""[ \t\r\n]*(?:\#[^\n]*\n[ \t\r\n]*)*(?:
      (?P<value>%(?:[A-Za-z0-9_./$~+\-]+|"(?:[^"\\]|\\.)*"))
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<scheme><[^<>\n]*>)
    | (?P<rand>rand:\d+)
    | (?P<number>-inf\b|-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)
    | (?P<word>[A-Za-z_][\w.]*)
    | (?P<punct>[\[\](){},=:?*$@])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)


def parse(text: str) -> Graph:
    """The graph that ``text`` describes; raises InputError with the place where the text is wrong."""
    p = _Parser(text)
    graph = Graph()
    p.graph(graph)
    p.expect("end")
    return graph


def parse_attrs(text: str) -> dict[str, Attr]:
    """``{key = value, ...}`` alone, as recipes write options."""
    p = _Parser(text)
    out = p.attrs()
    p.expect("end")
    return out


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.kind, self.token, self.start = "", "", 0
        self.advance()

    # -- tokens ----------------------------------------------------------------------------------------------

    def advance(self) -> str:
        """Step to the next token; returns the one left behind."""
        left = self.token
        m = _TOKEN.match(self.text, self.at)
        if m is None or m.lastgroup is None:
            self.start = self.at
            self.kind, self.token = "junk", self.text[self.at : self.at + 12].strip()
            self.fail("a token")
        self.kind, self.token = m.lastgroup, m[m.lastgroup]
        self.start, self.at = m.start(m.lastgroup), m.end()
        return left

    def fail(self, expected: str) -> NoReturn:
        line = self.text.count("\n", 0, self.start) + 1
        column = self.start - self.text.rfind("\n", 0, self.start)
        got = "the end of the text" if self.kind == "end" else repr(self.token)
        raise InputError(f"IR text, line {line}, column {column}: expected {expected}, got {got}")

    def accept(self, token: str) -> bool:
        if self.token == token and self.kind in ("punct", "word"):
            self.advance()
            return True
        return False

    def need(self, token: str) -> None:
        if not self.accept(token):
            self.fail(repr(token))

    def expect(self, kind: str) -> str:
        if self.kind != kind:
            self.fail(f"a {kind}")
        if kind == "end":
            return ""
        return self.advance()

    def string(self) -> str:
        return str(json.loads(self.expect("string"), strict=False))

    def word(self) -> str:
        return self.string() if self.kind == "string" else self.expect("word")

    def name(self) -> str:
        raw = self.expect("value")[1:]
        return str(json.loads(raw, strict=False)) if raw.startswith('"') else raw

    # -- types and attributes --------------------------------------------------------------------------------

    def dim(self) -> Dim:
        if self.accept("?"):
            return None
        if self.kind == "number":
            return int(self.advance())
        return self.word()

    def type(self) -> Type:
        if self.kind == "word" and self.token == "opaque":
            self.advance()
            return OpaqueType(self.string())
        return self.tensor_type()

    def tensor_type(self) -> TensorType:
        element = None if self.accept("?") else dtypes.dtype(self.expect("word"))
        self.need("[")
        if self.accept("*"):
            self.need("]")
            return TensorType(element, None)
        shape: list[Dim] = []
        while not self.accept("]"):
            shape.append(self.dim())
            if self.token != "]":
                self.need(",")
        return TensorType(element, tuple(shape))

    def scalar(self) -> Any:
        """A number, boolean or string of a dense literal."""
        if self.kind == "number":
            token = self.advance()
            return int(token) if re.fullmatch(r"-?\d+", token) else float(token)
        if self.kind == "string":
            return self.string()
        word = self.expect("word")
        if word in ("true", "false"):
            return word == "true"
        if word in ("nan", "inf"):
            return float(word)
        self.fail("a number")

    def payload(self, type: TensorType) -> Payload:
        if type.dtype is None or type.static_shape is None:
            self.fail("a constant of known dtype and static shape")
        element, shape = type.dtype, type.static_shape
        if self.kind == "rand":
            return RandomPayload(int(self.advance()[5:]), element, shape)
        if self.accept("@"):
            return UnreadablePayload(self.string(), element, shape)
        self.need("dense")
        self.need("(")
        items: list[Any] = []
        while not self.accept(")"):
            items.append(self.scalar())
            if self.token != ")":
                self.need(",")
        if len(items) != int(np.prod(shape, dtype=np.int64)):
            self.fail(f"{int(np.prod(shape, dtype=np.int64))} values for {element}{list(shape)}, not {len(items)},")
        if element.kind == "string":
            values = np.empty(len(items), object)
            values[:] = items
        else:
            values = np.array(items, np.float64 if element.is_float else None).astype(element.storage)
        return ArrayPayload(values.reshape(shape), element)

    def attr(self) -> Attr:
        if self.kind == "scheme":
            return parse_scheme(self.advance()[1:-1])
        if self.accept("["):
            items = []
            while not self.accept("]"):
                items.append(self.attr())
                if self.token != "]":
                    self.need(",")
            return tuple(items)
        if self.accept("$"):
            return Hole(int(self.expect("number")))
        if self.kind != "word" or self.token in ("true", "false", "nan", "inf"):
            return self.scalar()
        word = self.advance()
        if word == "none":
            return None
        if word == "type":
            self.need("(")
            found = self.type()
            self.need(")")
            return found
        if word == "tensor":
            self.need("(")
            type = self.tensor_type()
            self.need(",")
            payload = self.payload(type)
            self.need(")")
            return payload
        text = self.string()
        if word == "hex":
            return bytes.fromhex(text)
        return dtypes.dtype(text) if word == "dtype" else Atom(word, text)

    def attrs(self) -> dict[str, Attr]:
        self.need("{")
        out: dict[str, Attr] = {}
        while not self.accept("}"):
            key = self.word()
            self.need("=")
            out[key] = self.attr()
            if self.token != "}":
                self.need(",")
        return out

    # -- graphs ----------------------------------------------------------------------------------------------

    def typed(self) -> tuple[str, Type, dict[str, Attr]]:
        name = self.name()
        self.need(":")
        type = self.type()
        return name, type, self.attrs() if self.accept("meta") else {}

    def resolve(self, graph: Graph) -> Value:
        name = self.name()
        value = graph.lookup(name)
        if value is None:
            raise InputError(f"IR text: %{name} is used before it is defined")
        return value

    def graph(self, graph: Graph) -> None:
        self.need("graph")
        self.need("@")
        graph.name = self.word()
        self.need("dialect")
        self.need("=")
        graph.dialect = self.word()
        if self.accept("meta"):
            graph.meta = self.attrs()
        self.need("{")
        while not self.accept("return"):
            if self.kind == "word" and self.token in ("input", "const"):
                self.constant_or_input(graph)
            else:
                self.op(graph)
        if self.kind == "value":
            graph.add_output(self.resolve(graph))
            while self.accept(","):
                graph.add_output(self.resolve(graph))
        self.need("}")

    def constant_or_input(self, graph: Graph) -> None:
        word = self.advance()
        name, type, meta = self.typed()
        if word == "input":
            payload = None
            if self.accept("="):
                payload = self.payload(type if isinstance(type, TensorType) else TensorType(None))
            value = graph.add_input(name, type, payload)
        else:
            self.need("=")
            value = graph.add_const(name, self.payload(type if isinstance(type, TensorType) else TensorType(None)))
        value.meta = meta

    def op(self, graph: Graph) -> Op:
        results: list[tuple[str, Type, dict[str, Attr]]] = []
        if self.kind == "value":
            results.append(self.typed())
            while self.accept(","):
                results.append(self.typed())
            self.need("=")
        name = self.word()
        self.need("(")
        operands: list[Value | None] = []
        while not self.accept(")"):
            operands.append(None if self.accept("none") else self.resolve(graph))
            if self.token != ")":
                self.need(",")
        attrs = self.attrs() if self.kind == "punct" and self.token == "{" else {}
        meta = self.attrs() if self.accept("meta") else {}
        loc = Loc()
        if self.accept("loc"):
            self.need("(")
            parts = []
            while not self.accept(")"):
                parts.append(self.string())
                if self.token != ")":
                    self.need(",")
            loc = Loc(*parts)
        op = graph.create(name, operands, attrs, [(n, t) for n, t, _ in results], loc=loc)
        op.meta = meta
        for value, (_, _, value_meta) in zip(op.results, results, strict=True):
            value.meta = value_meta
        if self.accept("regions"):
            self.need("{")
            while not self.accept("}"):
                key = self.word()
                self.need("=")
                self.graph(graph.add_region(op, key))
        return op
