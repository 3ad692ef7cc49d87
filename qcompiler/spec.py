"""What a graph must satisfy: structure, types, and the laws of each ``q.*`` op (law L1). Plus named predicates on ops.

The canonical forms (scales and zeros broadcast over their group; ``value = (code - zero) * scale``)::

    q.quantize(x, s, z?) {scheme} -> codes          q.dequantize(codes, s, z?) {scheme} -> float
    q.linear(x[.., K], codes[N, K], s[N, G], z[N, G]?, bias[N]?) {scheme, site} -> [.., N]
    q.embedding(indices, codes[V, K], s[V, G], z[V, G]?) {scheme, site} -> [.., K]

``G`` is ``ceil(K / group)``, 1 for channel; a tensor scheme has scales ``[1, 1]`` there. In quantize and dequantize the
scale has the tensor's shape with the grouped axis divided (group), ``[C]`` (channel) or ``[]`` (tensor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from qcompiler.errors import StructureError
from qcompiler.ir import Graph, Op, TensorType, Use, Value
from qcompiler.scheme import Scheme
from qcompiler.text import show_op, show_type

# -- named predicates ----------------------------------------------------------------------------------------


def is_pure(op: Op) -> bool:
    """True when an unused result makes the op removable: no in-place update or check, no op without results."""
    if not op.results or "effect" in op.meta:
        return False
    if op.name.startswith(("onnx.", "q.", "com.microsoft.")):
        return True
    base = op.name.split(".")[1] if "." in op.name else op.name
    return op.name.startswith(("aten.", "py.")) and not (base.endswith("_") and not base.startswith("_"))


def is_float_const(value: Value | None) -> bool:
    """A constant, not overridable, of a float type."""
    return value is not None and value.is_const and value.tensor.dtype is not None and value.tensor.dtype.is_float


def scale_shape(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """The shape of scales and zeros for a tensor of ``shape``; raises StructureError where the axis does not exist."""
    if scheme.granularity == "tensor":
        return ()
    if scheme.axis is None or not -len(shape) <= scheme.axis < len(shape):
        raise StructureError(f"scheme <{scheme}> has no axis in a tensor of rank {len(shape)}")
    axis = scheme.axis % len(shape)
    if scheme.granularity == "channel":
        return (shape[axis],)
    if scheme.granularity == "group":
        return (*shape[:axis], scheme.groups(shape[axis]), *shape[axis + 1 :])
    raise StructureError(f"scheme <{scheme}>: no static scale shape for granularity {scheme.granularity}")


# -- the specs of q.* ops ------------------------------------------------------------------------------------


def _fail(op: Op, why: str) -> NoReturn:
    source = f" (from {op.loc.source})" if op.loc.source else ""
    raise StructureError(f"{why}; in: {show_op(op, locs=False)}{source}")


def _scheme(op: Op) -> Scheme:
    scheme = op.attrs.get("scheme")
    if not isinstance(scheme, Scheme):
        _fail(op, f"{op.name} needs a scheme")
    return scheme


def _need(op: Op, index: int, what: str) -> Value:
    value = op.operand(index)
    if value is None:
        _fail(op, f"{op.name} needs {what} as operand {index}")
    return value


def _shaped(op: Op, value: Value, shape: tuple[int, ...], what: str) -> None:
    have = value.tensor.static_shape
    if have is not None and have != shape:
        _fail(op, f"{what} has shape {list(have)}, the scheme asks for {list(shape)}")


def _parameters(op: Op, first: int, shape: tuple[int, ...] | None, scheme: Scheme) -> None:
    """Operands ``first`` (scale) and ``first + 1`` (zero) agree with the scheme."""
    scale, zero = _need(op, first, "a scale"), op.operand(first + 1)
    if scale.tensor.dtype is not None and not scale.tensor.dtype.is_float:
        _fail(op, f"the scale is {scale.tensor.dtype}, not a float")
    if (zero is None) != scheme.symmetric:
        _fail(op, "an asymmetric scheme has a zero point and a symmetric one has none")
    if shape is not None:
        _shaped(op, scale, shape, "the scale")
        if zero is not None:
            _shaped(op, zero, shape, "the zero point")


def _codes(op: Op, value: Value, scheme: Scheme) -> None:
    have = value.tensor.dtype
    if have is not None and have != scheme.dtype:
        _fail(op, f"codes are {have}, the scheme says {scheme.dtype}")


def _quantize(op: Op) -> None:
    scheme, x = _scheme(op), _need(op, 0, "a tensor")
    shape = x.tensor.static_shape
    _parameters(op, 1, None if shape is None else scale_shape(shape, scheme), scheme)
    _codes(op, op.result, scheme)


def _dequantize(op: Op) -> None:
    scheme, codes = _scheme(op), _need(op, 0, "codes")
    shape = codes.tensor.static_shape
    _parameters(op, 1, None if shape is None else scale_shape(shape, scheme), scheme)
    _codes(op, codes, scheme)


def _matrix(op: Op, scheme: Scheme) -> tuple[int, int] | None:
    codes = _need(op, 1, "codes")
    _codes(op, codes, scheme)
    if codes.tensor.rank not in (None, 2):
        _fail(op, f"codes have rank {codes.tensor.rank}, {op.name} takes [N, K]")
    if scheme.axis != 1:
        _fail(op, f"{op.name} groups along K, axis 1 of its codes, not axis {scheme.axis}")
    shape = codes.tensor.static_shape
    if shape is not None:
        columns = scheme.groups(shape[1])
        _parameters(op, 2, (1, 1) if scheme.granularity == "tensor" else (shape[0], columns), scheme)
        return shape[0], shape[1]
    return None


def _linear(op: Op) -> None:
    nk = _matrix(op, _scheme(op))
    x, bias = _need(op, 0, "an activation"), op.operand(4)
    if nk is None:
        return
    if x.tensor.shape and isinstance(x.tensor.shape[-1], int) and x.tensor.shape[-1] != nk[1]:
        _fail(op, f"the activation ends in {x.tensor.shape[-1]}, the codes have K={nk[1]}")
    if bias is not None:
        _shaped(op, bias, (nk[0],), "the bias")


def _embedding(op: Op) -> None:
    _matrix(op, _scheme(op))
    indices = _need(op, 0, "indices")
    if indices.tensor.dtype is not None and not indices.tensor.dtype.is_integer:
        _fail(op, f"indices are {indices.tensor.dtype}, not integers")


SPECS: dict[str, Callable[[Op], None]] = {
    "q.quantize": _quantize,
    "q.dequantize": _dequantize,
    "q.linear": _linear,
    "q.embedding": _embedding,
}


# -- structure -----------------------------------------------------------------------------------------------


def check(graph: Graph) -> None:
    """Raise StructureError at the first broken rule: definitions before uses, use lists, names, types, q.* specs."""
    _check(graph, {})


def _check(graph: Graph, visible: dict[Value, None]) -> None:
    visible = dict(visible) if graph.parent is not None else visible
    registered = 0
    for v in (*graph.inputs, *graph.consts.values()):
        _check_value(graph, v)
        visible[v] = None
        registered += 1
    for op in graph:
        if op.graph is not graph or op.erased:
            _fail(op, f"the op is linked in graph '{graph.name}' but does not belong to it")
        for i, operand in enumerate(op.operands):
            if operand is None:
                continue
            if operand not in visible:
                _fail(op, f"operand {i}, {operand!r}, is not defined before this op")
            if Use(op, i) not in operand.uses:
                _fail(op, f"the use list of {operand!r} misses operand {i}")
        if op.name.startswith("q."):
            spec = SPECS.get(op.name)
            if spec is None:
                _fail(op, f"no op {op.name}; the q dialect has {', '.join(SPECS)}")
            spec(op)
        for region in op.regions.values():
            if region.parent is not op:
                _fail(op, f"region '{region.name}' does not know its op")
            _check(region, visible)
        for i, r in enumerate(op.results):
            if r.owner is not op or r.index != i:
                _fail(op, f"result {i}, {r!r}, does not know its op")
            _check_value(graph, r)
            visible[r] = None
            registered += 1
    for i, v in enumerate(graph.outputs):
        if v not in visible:
            raise StructureError(f"graph '{graph.name}': output {i}, {v!r}, is not defined in it")
        if Use(graph, i) not in v.uses:
            raise StructureError(f"graph '{graph.name}': the use list of {v!r} misses output {i}")
    if registered != len(graph._names):
        raise StructureError(f"graph '{graph.name}' registers {len(graph._names)} names for {registered} values")


def _check_value(graph: Graph, v: Value) -> None:
    if v.graph is not graph or graph.local(v.name) is not v:
        raise StructureError(f"graph '{graph.name}': {v!r} is not registered under its name")
    if graph.parent is not None and graph.parent.graph.lookup(v.name) is not None:
        raise StructureError(f"graph '{graph.name}': {v!r} shadows a value of an enclosing graph")
    if v.payload is not None and isinstance(v.type, TensorType):
        if (v.payload.dtype, v.payload.shape) != (v.type.dtype, v.type.shape):
            have = show_type(TensorType(v.payload.dtype, v.payload.shape))
            raise StructureError(f"{v!r} is declared {show_type(v.type)}, its bytes are {have}")
