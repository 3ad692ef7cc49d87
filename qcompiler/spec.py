"""What a graph must satisfy: structure, types, and the laws of each ``q.*`` op (law L1). Plus named predicates on ops.

The canonical forms (scales and zeros broadcast over their group; ``value = (code - zero) * scale``)::

    q.quantize(x, s, z?) {scheme} -> codes          q.dequantize(codes, s, z?) {scheme} -> float
    q.linear(x[.., K], codes[N, K], s[N, G], z[N, G]?, bias[N]?) {scheme, site} -> [.., N]
    q.embedding(indices, codes[V, K], s[V, G], z[V, G]?) {scheme, site} -> [.., K]

    q.choose_qparams(x) {scheme} -> s, z?           q.scale(x[.., K], factors[K]) -> float
    q.linear_static(xq, xs, xz?, wq[N, K], ws, wz?, bias[N]?, ys?, yz?) {scheme, x_scheme, y_scheme?, site}
    q.linear_dyn(x, wq[N, K], ws, wz?, bias[N]?) {scheme, x_scheme, site} -> float
    q.conv(xq, xs, xz?, wq[O, I/g, ..], ws, wz?, bias[O]?, ys?, yz?) {scheme, x_scheme, y_scheme?, site, strides, ...}
    q.conv_dyn(x, wq, ws, wz?, bias[O]?) {scheme, x_scheme, site, strides, ...} -> float
    q.matmul(aq, as, az?, bq, bs, bz?, ys?, yz?) {a_scheme, b_scheme, y_scheme?, site}
    q.apply(c, s, z?, [c, s, z?] .., ys, yz?) {fn, x_scheme, y_scheme, ...} -> codes

Results of ``q.linear_static`` and ``q.matmul`` are codes where they have a ``y_scheme``, else floats. A convolution's
scales are ``[O]`` or ``[]``; ``q.apply`` and the convolutions keep the attributes of the ONNX op that they stand for.
``G`` is ``ceil(K / group)``, 1 for channel; a tensor scheme has scales ``[1, 1]`` there, blocks have one row for all
the features of a block. In quantize and dequantize the scale has the tensor's shape with the grouped axis divided
(group), with both axes divided (block), ``[C]`` (channel) or ``[]`` (tensor); of activations it is ``[.., 1]`` (token)
or ``[.., ceil(K / M)]`` (blocks ``b1xM``).
"""

from __future__ import annotations

from collections.abc import Callable

from qcompiler import integer_spec, op_spec
from qcompiler.errors import StructureError
from qcompiler.ir import Graph, Op, TensorType, Use, Value
from qcompiler.op_spec import column_shape, fail, scale_shape
from qcompiler.text import show_type

__all__ = ["SPECS", "check", "column_shape", "is_float_const", "is_pure", "scale_shape"]

SPECS: dict[str, Callable[[Op], None]] = op_spec.SPECS | integer_spec.SPECS
"""Op name -> the function that raises StructureError where an op of that name breaks a law."""

# -- named predicates ----------------------------------------------------------------------------------------


def is_pure(op: Op) -> bool:
    """True when an unused result makes the op removable: no in-place update or check, no op without results."""
    if not op.results or "effect" in op.meta:
        return False
    if op.name.startswith(("onnx.", "q.", "com.microsoft.")):
        return True
    base = op.name.split(".")[1] if "." in op.name else op.name
    return op.name.startswith(("aten.", "py.", "quantized_decomposed.", "torchao.")) and not (
        base.endswith("_") and not base.startswith("_")
    )


def is_float_const(value: Value | None) -> bool:
    """A constant, not overridable, of a float type."""
    return value is not None and value.is_const and value.tensor.dtype is not None and value.tensor.dtype.is_float


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
            fail(op, f"the op is linked in graph '{graph.name}' but does not belong to it")
        for i, operand in enumerate(op.operands):
            if operand is None:
                continue
            if operand not in visible:
                fail(op, f"operand {i}, {operand!r}, is not defined before this op")
            if Use(op, i) not in operand.uses:
                fail(op, f"the use list of {operand!r} misses operand {i}")
        if op.name.startswith("q."):
            spec = SPECS.get(op.name)
            if spec is None:
                fail(op, f"no op {op.name}; the q dialect has {', '.join(SPECS)}")
            spec(op)
        for region in op.regions.values():
            if region.parent is not op:
                fail(op, f"region '{region.name}' does not know its op")
            _check(region, visible)
        for i, r in enumerate(op.results):
            if r.owner is not op or r.index != i:
                fail(op, f"result {i}, {r!r}, does not know its op")
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
