"""Put a quantize/dequantize pair on the weight of every site that the recipe matches; name every other site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.clipping import Clip
from qcompiler.conv_views import ConvView, as_conv
from qcompiler.errors import InputError, RecipeError
from qcompiler.ir import Graph, Loc, Op, TensorType, Use, Value
from qcompiler.movement import is_nonnegative
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Declined
from qcompiler.scheme import Scheme
from qcompiler.sites import Ledger, Site, matches
from qcompiler.spec import is_float_const
from qcompiler.subgraph import bound
from qcompiler.views import (
    EmbeddingView,
    LinearView,
    ProductView,
    as_embedding,
    as_linear,
    as_product,
    kind_of,
    through_transposes,
)
from qcompiler.weights import Rounding, WeightQuantization

QUANTIZED_OPS = re.compile(
    r"q\.(?!scale\Z)|.*(QuantizeLinear|DequantizeLinear|QLinear\w+|MatMulInteger\w*|DynamicQuantize\w+|MatMulNBits|MatMulBnb4"
    r"|QGemm|QMoE|QAttention|GatherBlockQuantized|ConvInteger|Quant|BipolarQuant)\Z|quantized_decomposed\.|torchao\."
)
View = LinearView | EmbeddingView | ConvView | ProductView
_ANONYMOUS = re.compile(r"(val_|onnx::\w+_|const(ant)?_?|_|t_|permute_|transpose_)?\d+(_\w+)?\Z")


@dataclass(frozen=True, slots=True)
class Found:
    """A place that holds a weight: its name, kind, weight value, and its view, or why it is none."""

    name: str
    kind: str
    op: Op
    weight: Value
    view: View | None
    reason: str | None


def site_name(op: Op, weight: Value, *, shared: bool = False) -> str:
    """The weight's name without ``.weight``; where it is anonymous or shared, the op's module path or node name."""
    name = str(weight.meta.get("origin", weight.name))
    plain = re.sub(r"[._/](weight|kernel|W|w)(_transposed|_t|\.T)?\Z", "", name)
    if _ANONYMOUS.match(name) or shared:
        return op.loc.scope or op.loc.name or plain
    return plain


def find_sites(graph: Graph, *, convs: bool = False, products: bool = False) -> Iterator[Found]:
    """Every op of ``graph`` and its regions with a constant float weight of rank 2 or more, in graph order.

    Without ``convs`` a convolution is found with the reason that this pass leaves it, without ``products`` so is a
    product whose constant is on the left or of rank 3.
    """
    users: dict[Value, int] = {}
    places: list[tuple[Op, str, Value]] = []
    passed: dict[Op, str] = {}
    for op in graph.walk():
        kind = kind_of(op)
        if kind is None:
            continue
        weights = [w for v in op.operands if v is not None for w in [through_transposes(v)[0]]]
        if graph.dialect == "aten" and op.graph is not graph:
            weights = [bound(w) for w in weights]
            if any(is_float_const(w) for w in weights):
                passed[op] = f"its weight is passed to a subgraph of {op.graph.parent.name}"  # type: ignore[union-attr]
        held = [w for w in weights if is_float_const(w) and (w.tensor.rank or 0) >= 2]
        for weight in held[: 1 if kind != "recurrent" else None]:
            users[weight] = users.get(weight, 0) + 1
            places.append((op, kind, weight))
    seen: set[Value] = set()
    for op, kind, weight in places:
        view: View | None = None
        reason = passed.get(op)
        try:
            if reason is not None:
                pass
            elif kind == "linear":
                kind, view = _product(op) if products else ("linear", as_linear(op))
            elif kind == "embedding":
                view = as_embedding(op)
            elif kind == "conv" and convs:
                view = as_conv(op)
            else:
                reason = _unquantized(op)
        except Declined as e:
            if e.quiet and kind in ("embedding", "conv"):
                continue
            reason = e.reason.message
        weight = weight if view is None else view.table if isinstance(view, EmbeddingView) else view.weight
        yield Found(site_name(op, weight, shared=weight in seen), kind, op, weight, view, reason)
        seen.add(weight)


def _product(op: Op) -> tuple[str, View]:
    """The linear layer at ``op``, else the product with a constant; Declined with the reason why it is no layer."""
    try:
        return "linear", as_linear(op)
    except Declined as e:
        try:
            return "matmul", as_product(op)
        except Declined:
            raise e from None


def _unquantized(op: Op) -> str:
    kernel = {"onnx.LSTM": "com.microsoft.DynamicQuantizeLSTM", "onnx.GRU": "none", "onnx.RNN": "none"}.get(op.name)
    if kernel is None:
        return f"{op.name} weights are not quantized by this pass"
    if kernel == "none":
        return f"{op.name} '{op.label}' stays in float: ONNX Runtime has no kernel that runs it on 8-bit weights"
    return f"{op.name} '{op.label}' stays in float: its 8-bit kernel would be {kernel}, which is not written here"


def _axis(f: Found, scheme: Scheme) -> int | None:
    """The axis of the scheme in the stored weight: that of the reduction, per channel that of the output."""
    if scheme.granularity == "tensor":
        return None
    if f.kind == "conv":
        return 0
    along = f.view.axis if isinstance(f.view, LinearView) else 1
    return 1 - along if scheme.granularity == "channel" else along


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Quantize the weights of linears with ``weights`` and embedding tables with ``embeddings``.

    ``convs`` is for the weights of convolutions (per channel of the output, or per tensor), ``products`` for constants
    on the left of a product or of rank 3 (per tensor); without them those stay in float and are listed with the reason.
    ``rounding`` is to the nearest code; ``balanced`` keeps the sums of kernels, in convolutions whose input cannot be
    negative (:mod:`qcompiler.balancing`): such codes are no quantize of their weight, so they are constants at once.

    ``match`` and ``skip`` are globs over site names; each must match something. A table that an embedding and a linear
    share is quantized once, with ``embeddings`` where given. ``clip`` chooses max-abs or MSE-searched ranges.
    """

    name: ClassVar[str] = "insert-qdq"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "lossy"
    weights: Scheme
    embeddings: Scheme | None = None
    match: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    clip: Clip = "absmax"
    convs: Scheme | None = None
    products: Scheme | None = None
    rounding: Rounding = "nearest"

    def run(self, graph: Graph, ctx: Context) -> None:
        for op in graph.walk():
            if QUANTIZED_OPS.match(op.name):
                raise InputError(
                    f"the model is already quantized: '{op.label}' is a {op.name}; compile its float original, keep "
                    "its codes with '--recipe repair', or judge it as it is with 'qcompiler verify'"
                )
        self._check_schemes()
        found = list(find_sites(graph, convs=self.convs is not None, products=self.products is not None))
        wanted = self._select(found, ctx.ledger, partial=ctx.partial)
        tied = {f.weight: self.embeddings for f in wanted if f.kind == "embedding" and self.embeddings is not None}
        by_weight: dict[tuple[Value, Scheme, Rounding], list[tuple[Found, Site]]] = {}
        for f in wanted:
            scheme = tied.get(f.weight) or self._scheme(f)
            site = ctx.ledger[self._record(f, scheme, ctx.ledger)]
            if scheme is None:
                ctx.ledger.skip(site.name, "the recipe leaves embedding tables in float")
                continue
            oriented = scheme.with_axis(_axis(f, scheme))
            by_weight.setdefault((f.weight, oriented, self._rounding(f)), []).append((f, site))
        for (weight, scheme, rounding), sites in by_weight.items():
            self._insert(weight, scheme, rounding, sites)

    def _check_schemes(self) -> None:
        for key, scheme, known in (
            ("convs", self.convs, ("channel", "tensor")),
            ("products", self.products, ("tensor",)),
        ):
            if scheme is not None and (scheme.dynamic or scheme.granularity not in known):
                raise RecipeError(f"insert-qdq.{key} is static and per {' or '.join(known)}, not <{scheme.text}>")

    def _scheme(self, f: Found) -> Scheme | None:
        by_kind = {"linear": self.weights, "conv": self.convs, "matmul": self.products}
        return by_kind.get(f.kind, self.embeddings)

    def _select(self, found: list[Found], ledger: Ledger, *, partial: bool) -> list[Found]:
        """The sites to quantize; the others go to the ledger with the reason. RecipeError for a glob in vain, but for
        a part of a model."""
        hits: set[str] = set()
        wanted: list[Found] = []
        for f in found:
            chosen = matches(f.name, self.match)
            skipped = matches(f.name, self.skip)
            hits.update(g for g in (chosen, skipped) if g is not None)
            if skipped is not None:
                self._skip(f, ledger, f"skipped by the recipe (skip = {skipped!r})")
            elif chosen is None:
                self._skip(f, ledger, "not matched by the recipe")
            elif f.reason is not None:
                self._skip(f, ledger, f.reason)
            else:
                wanted.append(f)
        if partial:
            return wanted
        names = ", ".join(f.name for f in found[:6]) + (", ..." if len(found) > 6 else "")
        for key, globs in (("match", self.match), ("skip", self.skip)):
            for glob in globs:
                if glob not in hits and not any(matches(f.name, [glob]) for f in found):
                    has = f"sites are: {names}" if found else "the model has no linear or embedding weight"
                    raise RecipeError(f"QC402: insert-qdq.{key} = {glob!r} matched nothing; {has}")
        if found and not wanted and not any(matches(f.name, self.skip) for f in found):
            reasons = {f.reason: f for f in found}
            text = "; ".join(f"'{f.name}': {reason}" for reason, f in list(reasons.items())[:3])
            raise RecipeError(f"QC402: insert-qdq found {len(found)} weights and can quantize none of them: {text}")
        return wanted

    def _skip(self, f: Found, ledger: Ledger, reason: str) -> None:
        ledger.skip(self._record(f, None, ledger), reason)

    @staticmethod
    def _record(f: Found, scheme: Scheme | None, ledger: Ledger) -> str:
        shape = f.weight.tensor.static_shape or (0, 0)
        n, k = (f.view.n, f.view.k) if f.view is not None else (shape[0], shape[-1])
        payload = f.weight.payload
        before = 0 if payload is None else payload.nbytes
        site = Site(f.name, f.kind, n, k, before, "" if scheme is None else scheme.text)
        site.weight = f.weight
        return ledger.add(site).name

    def _rounding(self, f: Found) -> Rounding:
        balance = self.rounding == "balanced" and isinstance(f.view, ConvView) and is_nonnegative(f.view.x)
        return "balanced" if balance else "nearest"

    def _insert(self, weight: Value, scheme: Scheme, rounding: Rounding, sites: list[tuple[Found, Site]]) -> None:
        """weight  ->  q.dequantize(q.quantize(weight, s, z), s, z)   for the operands of the sites"""
        assert weight.payload is not None
        home = weight.graph
        computation = WeightQuantization(weight.payload, scheme, self.clip, rounding=rounding)
        outputs = computation.outputs()
        parameters = [
            home.add_const(home.fresh(f"{weight.name}_{part}"), payload)
            for part, payload in zip(("scale", "zero"), outputs[1:], strict=False)
        ]
        first = next(iter(home))
        loc = Loc(sites[0][1].name)
        name = home.fresh(f"{weight.name}_codes")
        if rounding == "balanced":
            codes = home.add_const(name, outputs[0])
        else:
            codes_type = TensorType(scheme.dtype, weight.tensor.shape)
            attrs = {"scheme": scheme}
            codes = home.create(
                "q.quantize", [weight, *parameters], attrs, [(name, codes_type)], loc=loc, before=first
            ).result
        uses = [use for f, _ in sites for use in self._weight_uses(weight, f.op)]
        dequantized = home.create(
            "q.dequantize",
            [codes, *parameters],
            {"scheme": scheme, "sites": tuple(s.name for _, s in sites)},
            [(home.fresh(f"{weight.name}_dq"), weight.type)],
            loc=loc,
            before=first,
        )
        weight.replace_uses(dequantized.result, dict.fromkeys(uses))
        if not weight.uses:
            home.remove_const(weight)
        for f, site in sites:
            f.op.meta["site"] = site.name
            site.stats = computation.stats

    @staticmethod
    def _weight_uses(weight: Value, op: Op) -> Iterator[Use]:
        """The uses of ``weight`` on the way to ``op``: its operand itself, or that of the first transpose before it."""
        for i, operand in enumerate(op.operands):
            slot, value = Use(op, i), operand
            while value is not None and value is not weight and value.owner is not None:
                if through_transposes(value)[0] is value:
                    break
                slot, value = Use(value.owner, 0), value.owner.operand(0)
            if value is weight:
                yield slot
