"""Put quantize/dequantize pairs on activations: before products whose weight is quantized, and where codes stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from qcompiler.calibrate.observers import RangeObserver
from qcompiler.clipping import affine_params
from qcompiler.dtypes import F32, F64
from qcompiler.errors import RecipeError
from qcompiler.functional import unsteady
from qcompiler.integer_spec import FUNCTIONS
from qcompiler.ir import Graph, Op, TensorType, Use, Value
from qcompiler.movement import clamp, movement_kind
from qcompiler.payload import constant
from qcompiler.pipeline import Context, Pass
from qcompiler.placement import Anchor, Group, Placement
from qcompiler.products import Product, find_products, restore_weights, unserved, weight_dequantize
from qcompiler.requests import request_for
from qcompiler.scale_floor import with_scale_floor
from qcompiler.scheme import Alternatives, Scheme
from qcompiler.sites import matches
from qcompiler.spec import is_float_const, scale_shape
from qcompiler.target import Reason, Request
from qcompiler.verify.findings import Finding

Ranges = dict[Value, tuple[float, float] | None]
"""Least and greatest value to be held, zero included; None for what no data reached."""

IN_REGION = Reason(
    "QC305",
    "values of a subgraph cannot be watched while calibrating, so its activation is quantized at run time",
)
ROWS_OF_A_LAYER = Reason(
    "QC201",
    "one scale a token or a block of it belongs to the rows of a linear layer",
    "scale activations per tensor here",
)
WRITTEN = Reason(
    "QC203",
    "its activation or its result is written to in place, so codes of it could go stale",
    "write the model without in-place operations",
)


@dataclass
class _Work:
    """One run of the pass: products still to be quantized, and what is known of ranges."""

    graph: Graph
    ctx: Context
    scheme: Scheme
    ranges: Ranges = field(default_factory=dict)
    unseen: set[Value] = field(default_factory=set)


@dataclass(frozen=True)
class InsertActivationQdq(Pass):
    """Quantize the activations of products whose weights ``insert-qdq`` has quantized, and what lies between them.

    ``activations`` is per tensor, static (ranges come from the calibration data) or dynamic (from each input); or
    dynamic per token or in blocks ``b1xM``, before linear layers. Of alternatives each product gets the first that the
    target has a kernel for, without a target the first of all; static codes are of one scheme in the whole model.
    ``observer`` says how a range is found: ``minmax``, ``percentile`` (``percentile`` of the values on either side),
    ``mse`` or ``entropy``. ``ends`` is what a convolution gives whose result only float ops read: floats lose nothing,
    codes are faster (of aten convolutions floats always, where there is such a kernel: torch computes both alike
    fast). With ``matmuls``, products of two activations run on codes as well (static only). ``match``
    and ``skip`` are globs over site names; each must match something.

    Static: :mod:`qcompiler.placement` says where codes begin and end. A product in a subgraph, where ranges cannot be
    observed, is quantized dynamically. A product that no kernel serves keeps its activation in float, and its weight
    too unless the target has a weight-only kernel for it.
    """

    name: ClassVar[str] = "insert-activation-qdq"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "lossy"
    activations: Scheme | Alternatives
    observer: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    percentile: float = 99.99
    matmuls: bool = False
    ends: Literal["floats", "codes"] = "codes"
    match: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> None:
        for scheme in self.wishes:
            _check(scheme)
        found = list(find_products(graph, matmuls=self.matmuls and not all(s.dynamic for s in self.wishes)))
        if not ctx.partial:
            self._check_globs(found)
        none = None if ctx.target is None else ctx.target.lacks("q.linear_static") or unserved(self.wishes, ctx.target)
        if found and none is not None:
            message = f"activations <{self.activations.text}> have no fused kernel on {ctx.target}"
            ctx.findings.append(Finding(none.code, self.name, message, none.message, none.fix))
        static: list[Product] = []
        dynamic: list[tuple[Product, Scheme]] = []
        constant = self._constant(found, graph, ctx)
        for product in found:
            inside = product.op.graph is not graph
            wishes = [s for s in self.wishes if s.dynamic or inside or s is constant]
            asked = [replace(s, dynamic=True) if inside else s for s in wishes]
            reasons = [self._why_not(product, s, ctx) for s in asked]
            if None not in reasons:
                _leave(product, next(r for r in reasons if r is not None), ctx)
                continue
            at = reasons.index(None)
            if not asked[at].dynamic:
                static.append(product)
                continue
            dynamic.append((product, asked[at]))
            if not wishes[at].dynamic:
                ctx.findings.append(_info(product, IN_REGION))
        written = unsteady(graph)
        _insert_dynamic(dynamic, written)
        steady = [p for p in static if not written.intersection((*p.inputs, *p.op.results))]
        for product in static:
            if product not in steady:
                _leave(product, WRITTEN, ctx)
        if steady and constant is not None:
            self._insert_static(_Work(graph, ctx, constant), steady)

    @property
    def wishes(self) -> tuple[Scheme, ...]:
        """The schemes of ``activations``, the most wanted first."""
        return self.activations.schemes if isinstance(self.activations, Alternatives) else (self.activations,)

    def _constant(self, found: list[Product], graph: Graph, ctx: Context) -> Scheme | None:
        """The static scheme of this run: the first wish by which some product can be computed, else the first."""
        static = [s for s in self.wishes if not s.dynamic]
        outside = [p for p in found if p.op.graph is graph]
        served = (s for s in static if any(self._why_not(p, s, ctx) is None for p in outside))
        return next(served, static[0] if static else None)

    def _check_globs(self, found: list[Product]) -> None:
        names = ", ".join(p.site for p in found[:6]) + (", ..." if len(found) > 6 else "")
        for key, globs in (("match", self.match), ("skip", self.skip)):
            for glob in globs:
                if glob != "*" and not any(matches(p.site, [glob]) for p in found):
                    has = f"sites are: {names}" if found else "no product of the model has a quantized weight"
                    raise RecipeError(f"QC402: insert-activation-qdq.{key} = {glob!r} matched nothing; {has}")

    def _why_not(self, product: Product, scheme: Scheme, ctx: Context) -> Reason | None:
        """Why the activations of ``product`` stay float; None when they do not."""
        if (glob := matches(product.site, self.skip)) is not None:
            return Reason("", f"skipped by the recipe (skip = {glob!r})")
        if matches(product.site, self.match) is None:
            return Reason("", "not matched by the recipe")
        if product.reason is not None:
            return product.reason
        if scheme.granularity != "tensor" and product.kind != "linear":
            return ROWS_OF_A_LAYER
        if product.element is not F32 and not product.op.name.startswith("aten."):
            fix = "export the model in f32"
            return Reason("QC201", f"its activation is {product.element}, and integer kernels take f32", fix)
        if ctx.target is None:
            return None
        return next(iter(ctx.target.why_not(product.request(scheme), ctx.phases)), None)

    # -- static ----------------------------------------------------------------------------------------------

    def _insert_static(self, work: _Work, products: list[Product]) -> None:
        while True:
            anchors = [Anchor(p.op, p.slots, p.site, self._makes(p, work)) for p in products]
            placement = Placement(work.graph, anchors, lambda op: self._capable(op, work))
            self._observe(work, [v for g in placement.groups for v in g.points])
            blind = [g for g in placement.groups if not any(work.ranges[v] for v in g.points)]
            if not blind:
                break
            products = self._without(blind, products, work)
        for group in placement.groups:
            self._place(group, work)
        for product in products:
            _fit_bias(product)

    def _makes(self, product: Product, work: _Work) -> Literal["floats", "codes", "wanted"]:
        """What the kernel makes of ``product``."""
        if product.kind != "conv":
            return "floats"
        if self.ends == "codes" and not product.op.name.startswith("aten."):
            return "codes"
        request, ctx = replace(product.request(work.scheme), y=None), work.ctx
        return "wanted" if ctx.target is None or ctx.target.choose(request, ctx.phases) is not None else "codes"

    def _capable(self, op: Op, work: _Work) -> bool:
        """True where the target has an integer kernel for ``op`` as it stands."""
        fn = op.name.removeprefix("onnx.")
        if fn not in FUNCTIONS or not op.name.startswith("onnx.") or op.operand(0) is None or len(op.results) != 1:
            return False
        slots = range(len(op.operands)) if fn in ("Add", "Mul", "Concat") else range(1)
        values = [op.operand(i) for i in slots]
        if any(v is None or v.tensor.dtype not in (None, F32) or v in work.unseen for v in (*values, op.result)):
            return False
        attrs = {"fn": fn, "x_scheme": work.scheme, "y_scheme": work.scheme, **op.attrs}
        target = work.ctx.target
        return target is None or not target.why_not(request_for("q.apply", values[:1], attrs), work.ctx.phases)

    def _observe(self, work: _Work, points: Iterable[Value]) -> None:
        """Learn the ranges of ``points`` that are not known yet."""
        watched: dict[str, RangeObserver] = {}
        for value in dict.fromkeys(points):
            if value in work.ranges:
                continue
            if value.is_const and value.payload is not None:
                stored = value.payload.array()
                ends = (min(float(stored.min()), 0.0), max(float(stored.max()), 0.0)) if stored.size else (0.0, 0.0)
                work.ranges[value] = ends
            else:
                watched[value.name] = RangeObserver(self.observer, self.percentile)
        if not watched:
            return
        calibration = work.ctx.need_calibration("insert-activation-qdq")
        calibration.observe(work.graph, {name: [o] for name, o in watched.items()})
        for name, observer in watched.items():
            known = work.graph.local(name)
            assert known is not None
            work.ranges[known] = _clamped(known, *observer.range(work.scheme)) if observer.seen else None

    def _without(self, blind: list[Group], products: list[Product], work: _Work) -> list[Product]:
        """The products that touch no group without a range; the others stay float, with the reason."""
        sites = {site for g in blind for site in g.anchors}
        for group in blind:
            if not group.anchors:  # between two capable ops
                work.unseen.update(group.points)
        for product in products:
            if product.site in sites:
                fix = "calibrate with data that reaches it"
                _leave(
                    product, Reason("QC305", "no calibration data reached its activation or its result", fix), work.ctx
                )
        return [p for p in products if p.site not in sites]

    def _place(self, group: Group, work: _Work) -> None:
        """x  ->  q.dequantize(q.quantize(x, s, z), s, z)   with one s and z for the group"""
        known = [r for r in (work.ranges[v] for v in group.points) if r is not None]
        lo, hi = min(r[0] for r in known), max(r[1] for r in known)
        first = next(iter((*group.every, *group.some)))
        element, hint, home = first.tensor.dtype or F32, first.name, work.graph
        scale, zero = affine_params(np.asarray(lo), np.asarray(hi), work.scheme, element)
        parameters: list[Value | None] = [home.add_const(home.fresh(f"{hint}_scale"), constant(np.asarray(scale)))]
        if zero is not None:
            payload = constant(np.asarray(zero), work.scheme.dtype)
            parameters.append(home.add_const(home.fresh(f"{hint}_zero"), payload))
        for value in group.every:
            _put_pair(value, parameters, work.scheme, list(value.uses))
        for value, uses in group.some.items():
            _put_pair(value, parameters, work.scheme, uses)


def _check(scheme: Scheme) -> None:
    """Raise RecipeError for a scheme that no activation has."""
    element, per = scheme.dtype, scheme.granularity
    if element.is_integer or element.name in ("f8e4m3", "f8e5m2"):
        if per in ("tensor", "token") or (per == "block" and scheme.dynamic):
            return
    raise RecipeError(
        f"insert-activation-qdq.activations = '{scheme.text}': activations get integer or 8-bit float codes, with one "
        "scale a tensor, or, dynamic, one a token or a block b1xM; the nearest is 'uint8 tensor asym'"
    )


def _clamped(value: Value, lo: float, hi: float) -> tuple[float, float]:
    """The range without what a Relu or Clip right before ``value``, or before its movement, cuts off."""
    maker = value.owner
    while maker is not None and movement_kind(maker) in ("permute", "repeat", "select"):
        source = maker.operand(0)
        maker = None if source is None else source.owner
    bounds = None if maker is None else clamp(maker)
    if bounds is not None:
        lo = lo if bounds.lo is None else min(max(lo, bounds.lo), 0.0)
        hi = hi if bounds.hi is None else max(min(hi, bounds.hi), 0.0)
    return lo, hi


def _put_pair(value: Value, parameters: list[Value | None], scheme: Scheme, uses: Iterable[Use]) -> None:
    """A pair right behind the definition of ``value``, read by ``uses``; the name of an output goes along."""
    home = value.graph
    before = home.after(value)
    codes_type = TensorType(scheme.dtype, value.tensor.shape)
    codes_name = home.fresh(f"{value.name}_codes")
    codes = home.create(
        "q.quantize", [value, *parameters], {"scheme": scheme}, [(codes_name, codes_type)], before=before
    )
    float_type = TensorType(value.tensor.dtype or F32, value.tensor.shape)
    dequantized = home.create(
        "q.dequantize",
        [codes.result, *parameters],
        {"scheme": scheme},
        [(home.fresh(f"{value.name}_dq"), float_type)],
        before=before,
    )
    value.replace_uses(dequantized.result, uses)
    if dequantized.result.is_output:
        name = value.name
        home.rename(value, home.fresh(f"{name}_float"))
        home.rename(dequantized.result, name)


def _fit_bias(product: Product) -> None:
    """Let the weight's scales be so large that the bias of a convolution fits into the int32 of its kernel."""
    bias, x = product.op.operand(2), product.op.operand(0)
    integer = product.scheme is not None and product.scheme.dtype.is_integer
    if product.kind != "conv" or not integer or not is_float_const(bias) or not product.weights:
        return
    maker = None if x is None else x.owner
    while maker is not None and maker.name != "q.dequantize" and movement_kind(maker) is not None:
        source = maker.operand(0)
        maker = None if source is None else source.owner
    scale = None if maker is None or maker.name != "q.dequantize" else maker.operand(1)
    if bias is not None and scale is not None and scale.is_const:
        with_scale_floor(weight_dequantize(product.op, product.weights[0]), bias, scale)


def _insert_dynamic(products: Iterable[tuple[Product, Scheme]], written: set[Value]) -> None:
    """x  ->  q.dequantize(q.quantize(x, s, z), s, z)   with s, z = q.choose_qparams(x), once for all readers of x

    and for each reader, where x is one of the values that are ``written`` to.
    """
    made: dict[tuple[Graph, Value, Scheme, Op | None], Value] = {}
    for product, scheme in products:
        home = product.op.graph
        for slot, value in zip(product.slots, product.inputs, strict=True):
            key = (home, value, scheme, product.op if value in written else None)
            if key not in made:
                made[key] = _dynamic_pair(product.op, value, scheme)
            product.op.set_operand(slot, made[key])


def _dynamic_pair(op: Op, value: Value, scheme: Scheme) -> Value:
    """The pair before ``op``, the first reader of ``value``."""
    home = op.graph
    shape = _parameter_shape(value, scheme)
    element = F64 if value.tensor.dtype is F64 else F32  # in which the parameters of narrower floats are computed
    results = [(home.fresh(f"{value.name}_scale"), TensorType(element, shape))]
    if not scheme.symmetric:
        results.append((home.fresh(f"{value.name}_zero"), TensorType(scheme.dtype, shape)))
    chosen = home.create("q.choose_qparams", [value], {"scheme": scheme}, results, before=op)
    codes_type = TensorType(scheme.dtype, value.tensor.shape)
    name = home.fresh(f"{value.name}_codes")
    codes = home.create("q.quantize", [value, *chosen.results], {"scheme": scheme}, [(name, codes_type)], before=op)
    float_type = TensorType(value.tensor.dtype or F32, value.tensor.shape)
    name = home.fresh(f"{value.name}_dq")
    operands = [codes.result, *chosen.results]
    return home.create("q.dequantize", operands, {"scheme": scheme}, [(name, float_type)], before=op).result


def _parameter_shape(value: Value, scheme: Scheme) -> tuple[int | str, ...] | None:
    """The shape of a dynamic scale of ``value``; None where it is not known."""
    if scheme.granularity == "tensor":
        return ()
    shape, static = value.tensor.shape, value.tensor.static_shape
    if static is not None:
        return scale_shape(static, scheme)
    last = shape[-1] if shape else None
    if not shape or not (scheme.granularity == "token" or isinstance(last, int)):
        return None
    return (*shape[:-1], 1 if scheme.granularity == "token" else scale_shape((last,), scheme)[0])  # type: ignore[arg-type]


def _leave(product: Product, reason: Reason, ctx: Context) -> None:
    """Keep the activations of ``product`` in float, and its weight as well where only an integer kernel takes it."""
    if not product.weights:
        return
    if product.kind == "linear" and product.scheme is not None and product.reason is None:
        alone = Request("q.linear", product.scheme.with_axis(1), product.n, product.k, product.element, product.bias)
        if ctx.target is None or ctx.target.choose(alone, ctx.phases) is not None:
            ctx.findings.append(_info(product, reason))
            return
    if restore_weights(product) and product.site in ctx.ledger:
        ctx.ledger.skip(product.site, reason.message)
        ctx.ledger[product.site].scheme = ""


def _info(product: Product, reason: Reason) -> Finding:
    message = f"the activation of {product.op.name} '{product.op.label}' has no static codes"
    return Finding(reason.code or "QC401", product.site, message, reason.message, reason.fix, severity="info")
