"""Turn pairs around products and other ops into ops on codes, where the target has a kernel for them.

Each rule leaves a dequantize behind the op that it makes where the result is codes; the quantize that follows folds
with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.canonical import canonical_operands
from qcompiler.conv_views import as_conv
from qcompiler.integer_spec import FUNCTIONS
from qcompiler.ir import Graph, Loc, Op, TensorType, Value
from qcompiler.movement import clamp, movement_kind
from qcompiler.pairs import is_activation, is_constant, same_parameters
from qcompiler.passes.fold_qdq import fold_requantize
from qcompiler.passes.fuse_linear import row
from qcompiler.pipeline import Context, Pass
from qcompiler.products import weight_slots
from qcompiler.requests import request_for
from qcompiler.rewrite import Refusal, Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.sites import Site
from qcompiler.spec import is_float_const
from qcompiler.verify.op_kinds import CASTS, base_name
from qcompiler.views import CONV_OPS, LINEAR_OPS, as_linear, is_row, through_transposes

SMOOTHED = "factors of single channels, which smoothing could fold into nothing, run in float"
Parameters = tuple[Value, Value | None, Scheme]
"""Scale, zero point and scheme."""


def _pair(rw: Rewriter, value: Value | None) -> tuple[Value, Value, Value | None, Scheme]:
    """Codes, scale, zero point and scheme of a dequantized activation; declines quietly where it is none."""
    dq = rw.expect(value, "q.dequantize")
    scheme: Scheme = dq.attrs["scheme"]
    codes, scale = dq.operand(0), dq.operand(1)
    if codes is None or scale is None or not (scheme.granularity == "tensor" or scheme.dynamic):
        raise rw.declined(f"{value!r} is not scaled per tensor", quiet=True)
    return codes, scale, dq.operand(2), scheme


def _static(rw: Rewriter, value: Value | None) -> tuple[Value, Value, Value | None, Scheme]:
    """As :func:`_pair`, with one constant scale."""
    codes, scale, zero, scheme = _pair(rw, value)
    if scheme.granularity != "tensor":
        raise rw.declined(f"{value!r} is not scaled per tensor", quiet=True)
    if not scale.is_const or (zero is not None and not zero.is_const):
        raise rw.declined(f"the scale of {value!r} is computed at run time, and static kernels want it constant")
    return codes, scale, zero, scheme


def _dynamic(rw: Rewriter, value: Value | None) -> tuple[Value, Scheme]:
    """The float behind a pair whose parameters are chosen from it at run time; declines quietly where it is none."""
    codes, scale, zero, scheme = _pair(rw, value)
    chosen, quantize = rw.expect(scale, "q.choose_qparams"), rw.expect(codes, "q.quantize")
    x = quantize.operand(0)
    used = (quantize.operand(1), quantize.operand(2))
    if x is None or chosen.operand(0) is not x or used != (scale, zero) or chosen.results != [v for v in used if v]:
        raise rw.declined(f"the parameters of {value!r} are not chosen from what they quantize")
    return x, scheme


def _result(op: Op) -> Parameters | None:
    """The constant parameters by which everything that reads the result of ``op`` quantizes it; None where not all."""
    users = op.result.users
    if not users or op.result.is_output or not all(u.name == "q.quantize" and u.graph is op.graph for u in users):
        return None
    first = users[0]
    scale, zero, scheme = first.operand(1), first.operand(2), first.attrs["scheme"]
    constant = scale is not None and scale.is_const and (zero is None or zero.is_const)
    if not constant or scheme.granularity != "tensor" or not all(same_parameters(first, u) for u in users[1:]):
        return None
    assert scale is not None
    return scale, zero, scheme


def _make(rw: Rewriter, name: str, operands: list[Value | None], like: Value, attrs: dict[str, Any]) -> Value:
    """The op on codes, if the target has a kernel for it, before the root; a float result."""
    if rw.target is not None:
        rw.require(*rw.target.why_not(request_for(name, operands, attrs), rw.phases))
    out = rw.op(name, *operands, type=like.type, **attrs)
    assert out.owner is not None
    rw.revisit(out.owner)
    return out


def _make_codes(
    rw: Rewriter, name: str, operands: list[Value | None], like: Value, attrs: dict[str, Any], y: Parameters
) -> Value:
    """As :func:`_make`, for a result in codes of ``y``; gives it dequantized."""
    scale, zero, scheme = y
    operands, attrs = [*operands, scale, zero], attrs | {"y_scheme": scheme}
    if rw.target is not None:
        rw.require(*rw.target.why_not(request_for(name, operands, attrs), rw.phases))
    codes = rw.op(name, *operands, type=TensorType(scheme.dtype, like.tensor.shape), hint=f"{like.name}_codes", **attrs)
    for user in rw.root.result.users:
        rw.revisit(user)
    out = rw.op("q.dequantize", codes, scale, zero, type=like.type, hint=f"{like.name}_dq", scheme=scheme)
    assert out.owner is not None
    out.owner.loc = Loc()  # the node's own name goes to what makes the codes
    return out


def _site(op: Op) -> str:
    return str(op.meta.get("site", op.label))


# -- linears ---------------------------------------------------------------------------------------------------


@rule(*sorted(LINEAR_OPS))
def fuse_dequant_into_integer_linear(op: Op, rw: Rewriter) -> Value:
    """linear(q.dequantize(c, s, z), q.dequantize(wc, ws, wz), b)  ->  q.linear_static(c, s, z, wc, ws, wz, b)

    and, where s and z are chosen from x at run time,  ->  q.linear_dyn(x, wc, ws, wz, b).
    """
    lin = rw.view(as_linear)
    weight = rw.expect(lin.weight, "q.dequantize")
    if not is_constant(weight.operand(0)):
        raise rw.declined(f"'{op.label}' has no constant weight", quiet=True)
    _, _, _, x_scheme = _pair(rw, lin.x)
    scheme, codes, scale, zero = canonical_operands(weight, rw, n_axis=1 - lin.axis)
    bias = None if lin.bias is None else row(lin.bias, lin.n, rw)
    attrs = {"scheme": scheme, "x_scheme": x_scheme, "site": _site(op)}
    weights = [codes, scale, zero, bias]
    if x_scheme.dynamic:
        return _make(rw, "q.linear_dyn", [_dynamic(rw, lin.x)[0], *weights], lin.result, attrs)
    return _make(rw, "q.linear_static", [*_static(rw, lin.x)[:3], *weights], lin.result, attrs)


_FIRST = {"q.linear_static": 3, "q.linear_dyn": 1}
"""Where the codes of the weight stand."""


@rule("onnx.Add", "aten.add.Tensor")
def fuse_integer_bias(op: Op, rw: Rewriter) -> Value:
    """add(q.linear_*(.., wc, ws, wz), b)  ->  q.linear_*(.., wc, ws, wz, b)   for a constant row b"""
    for product, bias in ((op.operand(0), op.operand(1)), (op.operand(1), op.operand(0))):
        lin = None if product is None else product.owner
        if lin is None or product is None or lin.name not in _FIRST or bias is None or not is_float_const(bias):
            continue
        first = _FIRST[lin.name]
        n = (lin.operands[first].tensor.static_shape or (0,))[0]  # type: ignore[union-attr]
        wider = (bias.tensor.rank or 0) > (product.tensor.rank or 1)
        if "y_scheme" in lin.attrs or lin.operand(first + 3) is not None or not is_row(bias, n) or wider:
            continue
        if len(product.uses) != 1 or dict(op.attrs.get("kwargs", ())).get("alpha", 1) != 1:
            continue
        operands = [*[lin.operand(i) for i in range(first + 3)], row(bias, n, rw)]
        return _make(rw, lin.name, operands, op.result, dict(lin.attrs))
    raise rw.declined("no bias of a linear on codes", quiet=True)


@rule("q.linear_static", "q.matmul")
def fuse_result_codes(op: Op, rw: Rewriter) -> Value:
    """q.quantize(q.linear_static(..), s, z)  ->  q.linear_static(.., s, z)   where nothing reads it as a float"""
    y = None if "y_scheme" in op.attrs else _result(op)
    if y is None:
        raise rw.declined("its result is read as a float", quiet=True)
    count = 7 if op.name == "q.linear_static" else 6
    operands = [op.operand(i) for i in range(count)]
    return _make_codes(rw, op.name, operands, op.result, dict(op.attrs), y)


# -- convolutions ------------------------------------------------------------------------------------------------


@rule(*sorted(CONV_OPS))
def fuse_dequant_into_conv(op: Op, rw: Rewriter) -> Value:
    """q.quantize(conv(x, w, b), t, u)  ->  q.conv(c, s, z, wc, ws, wz, b, t, u)   of x = q.dequantize(c, s, z), w alike

    without t and u where the result is read as a float; and, where s and z are chosen from x at run time,
    conv(..)  ->  q.conv_dyn(x, wc, ws, wz, b).
    """
    view = rw.view(as_conv)
    weight = rw.expect(view.weight, "q.dequantize")
    codes, scale, zero = weight.operand(0), weight.operand(1), weight.operand(2)
    for value in (codes, scale, zero):
        if value is not None and (not value.is_const or value.payload is None):
            fix = "make the codes, scales and zero points initializers"
            raise rw.declined(f"'{op.label}': {value!r} of its weight is no constant", code="QC205", fix=fix)
    attrs = {"scheme": weight.attrs["scheme"], "site": _site(op), **view.attrs}
    weights = [codes, scale, zero, view.bias]
    if view.x.owner is None or view.x.owner.name != "q.dequantize":
        raise rw.declined(f"the activation of '{op.label}' is float; an integer convolution needs codes", code="QC101")
    x_scheme = _pair(rw, view.x)[3]
    attrs["x_scheme"] = x_scheme
    if x_scheme.dynamic:
        return _make(rw, "q.conv_dyn", [_dynamic(rw, view.x)[0], *weights], view.result, attrs)
    y = _result(op)
    if y is None:
        return _make(rw, "q.conv", [*_static(rw, view.x)[:3], *weights], view.result, attrs)
    return _make_codes(rw, "q.conv", [*_static(rw, view.x)[:3], *weights], view.result, attrs, y)


# -- other ops ---------------------------------------------------------------------------------------------------


@rule("onnx.MatMul", "aten.matmul.default", "aten.bmm.default")
def fuse_dequant_into_matmul(op: Op, rw: Rewriter) -> Value:
    """matmul(q.dequantize(a, s, z), q.dequantize(b, t, u))  ->  q.matmul(a, s, z, b, t, u)   each scaled per tensor"""
    left, right = _static(rw, op.operand(0)), _static(rw, op.operand(1))
    if is_constant(left[0]) and is_constant(right[0]):
        raise rw.declined(f"'{op.label}' multiplies two constants", quiet=True)
    attrs = {"a_scheme": left[3], "b_scheme": right[3], "site": _site(op)}
    return _make(rw, "q.matmul", [*left[:3], *right[:3]], op.result, attrs)


@rule(*sorted(f"onnx.{fn}" for fn in FUNCTIONS))
def fuse_dequant_into_function(op: Op, rw: Rewriter) -> Value:
    """q.quantize(fn(q.dequantize(c, s, z), ..), t, u)  ->  q.apply(c, s, z, .., t, u)"""
    y = _result(op)
    if y is None:
        raise rw.declined("its result is read as a float", quiet=True)
    fn = op.name.removeprefix("onnx.")
    found = [_pair(rw, v) for v in (op.operands if fn in ("Add", "Mul", "Concat") else op.operands[:1])]
    operands: list[Value | None] = [v for codes, scale, zero, _ in found for v in (codes, scale, zero)]
    if any(v is not None and not v.is_const for _, scale, zero, _ in found for v in (scale, zero)):
        raise rw.declined(f"a scale of '{op.label}' is computed at run time")
    if any(scheme != found[0][3] for _, _, _, scheme in found):
        raise rw.declined(f"'{op.label}' joins codes of different types", code="QC201")
    return _make_codes(rw, "q.apply", operands, op.result, {**op.attrs, "fn": fn, "x_scheme": found[0][3]}, y)


@rule("q.quantize")
def requantize(op: Op, rw: Rewriter) -> Value:
    """q.quantize(q.dequantize(c, s, z), t, u)  ->  q.apply(c, s, z, t, u) {fn = Concat}   of one operand: by a table"""
    dq = rw.expect(op.operand(0), "q.dequantize")
    if not is_activation(dq) or not is_activation(op) or same_parameters(op, dq):
        raise rw.declined("no codes of another scale", quiet=True)
    codes, scale, zero, scheme = _static(rw, op.operand(0))
    if not codes.tensor.rank:
        raise rw.declined("a scalar has no axis to join", quiet=True)
    if not all(v is None or v.is_const for v in op.operands[1:]):
        raise rw.declined(f"a scale of '{op.label}' is computed at run time")
    attrs = {"fn": "Concat", "axis": 0, "x_scheme": scheme, "y_scheme": op.attrs["scheme"]}
    operands = [codes, scale, zero, op.operand(1), op.operand(2)]
    if rw.target is not None:
        rw.require(*rw.target.why_not(request_for("q.apply", operands, attrs), rw.phases))
    return rw.op("q.apply", *operands, type=op.result.type, **attrs)


# -- what is left --------------------------------------------------------------------------------------------


_SIZES = frozenset({"onnx.Shape", "onnx.Size", "aten.sym_size.int", "aten._assert_tensor_metadata.default"})
"""Ops that ask what a tensor is, not for its elements."""
CODES_END = "codes end here: its input is dequantized, and no product behind it reads its result as codes"


def _readers(value: Value) -> list[Op]:
    """The ops that compute with ``value``, directly or after movement; what only asks for its shape does not."""
    out: dict[Op, None] = {}
    work, seen = [value], {value}
    while work:
        at = work.pop()
        for user in at.users:
            if user.name in _SIZES:
                continue
            cast_to_itself = user.name in CASTS and user.result.tensor.dtype == value.tensor.dtype
            if movement_kind(user) is None and not cast_to_itself:
                out[user] = None
                continue
            new = [r for r in user.results if r not in seen]
            seen.update(new)
            work.extend(new)
    return list(out)


def _quantized_behind(value: Value) -> bool:
    """Something quantizes ``value``, directly, after movement or after a clamp, which the runtime may drop there."""
    readers = _readers(value)
    return any(
        u.name == "q.quantize" or (clamp(u) is not None and any(_quantized_behind(r) for r in u.results))
        for u in readers
    )


def _why_float_product(op: Op, ctx: Context, given: bool) -> str:
    """Why the product ``op`` computes in float on a dequantized activation; empty where it should not."""
    if weight_slots(op):
        return ""  # quantized, and left over: the site says why
    if not any(v is not None and is_float_const(through_transposes(v)[0]) for v in op.operands[:2]):
        return "it multiplies two activations, which are left in float"
    site = _site(op)
    skipped = ctx.ledger[site].reason if site in ctx.ledger else None
    return f"its weight {'was float in the source' if given else 'stays float'}" + (f" ({skipped})" if skipped else "")


def _why_island(op: Op, dq: Op, ctx: Context, given: bool) -> str:
    """Why ``op``, which reads ``dq``, computes in float beside codes; empty where that is a fault, and no fate.

    ``given``: the quantizes are the graph's own, so one whose codes nothing computes on stands there for good.
    """
    if op.name in LINEAR_OPS or op.name in CONV_OPS:
        why = _why_float_product(op, ctx, given)
        return why and f"its input is dequantized: {why}"
    if any(_quantized_behind(v) for v in op.results):
        return "its input is dequantized and its result quantized again"
    maker = dq.operands[0].owner if dq.operands[0] is not None else None
    if maker is not None and maker.name == "q.quantize":
        return "its input is quantized and dequantized, and its result is float" if given else ""
    return CODES_END


def name_islands(graph: Graph, ctx: Context, refusals: list[Refusal], *, given: bool = False) -> None:
    """Record each op that computes in float between or behind codes as a skipped site, with the reason."""
    said = {r.op: r.reason.message for r in refusals}
    seen: set[Op] = set()
    for dq in [op for op in graph.walk() if op.name == "q.dequantize" and is_activation(op)]:
        for op in _readers(dq.result):
            ours = op.name.startswith("q.") and op.name != "q.scale"
            if op in seen or ours or not (how := _why_island(op, dq, ctx, given)):
                continue
            seen.add(op)
            what = base_name(op)
            none = f"{ctx.target or 'the target'} has no integer kernel for {what}"
            product = op.name in LINEAR_OPS or op.name in CONV_OPS
            why = said.get(op.label) or ("" if product else SMOOTHED if op.name == "q.scale" else none)
            reason = f"{why}: {how}" if why and how != CODES_END else how
            if op.label not in ctx.ledger:
                ctx.ledger.skip(ctx.ledger.add(Site(op.label, "float", 0, 0, 0)).name, reason)


@dataclass(frozen=True)
class FuseInteger(Pass):
    """Fuse pairs into ops on codes by the target's kernel rows; name the float ops that are left between codes.

    ``given`` says that the pairs came with the model: those that serve no integer kernel are named too.
    """

    name: ClassVar[str] = "fuse-integer"
    given: bool = False

    def run(self, graph: Graph, ctx: Context) -> None:
        rules = [
            fuse_dequant_into_integer_linear,
            fuse_integer_bias,
            fuse_result_codes,
            fuse_dequant_into_conv,
            fuse_dequant_into_matmul,
            fuse_dequant_into_function,
            fold_requantize,
            requantize,
        ]
        refusals: list[Refusal] = []
        apply_rules(graph, rules, target=ctx.target, phases=ctx.phases, log=refusals)
        ctx.refusals.extend(refusals)
        name_islands(graph, ctx, refusals, given=self.given)
