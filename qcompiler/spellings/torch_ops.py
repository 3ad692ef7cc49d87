"""Quantization as torch's tools write it: the ops of quantized_decomposed (pt2e) and torchao's affine ops, by name.

Their semantics (torch.ao.quantization.fx._decomposed, torchao.quantization.quant_primitives): codes are
``clamp(round(x / s) + z, quant_min, quant_max)``, values ``(c - z) * s``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.dtypes import F32, F64, INT64, TABLE, Array, DType
from qcompiler.ir import Atom, Hole, Loc, Op, TensorType, Value
from qcompiler.movement import movement_kind
from qcompiler.numerics import quantize
from qcompiler.payload import Payload, computed, constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.parts import Parameters, constant_codes, dequantized, once, parameters, quantized
from qcompiler.spellings.qdq import DYNAMIC
from qcompiler.views import call_args

QD, AO = "quantized_decomposed.", "torchao."
_TENSOR = ("x", "scale", "zero", "low", "high", "dtype")
_CHANNEL = ("x", "scale", "zero", "axis", "low", "high", "dtype")
_GROUP = ("x", "scale", "zero", "low", "high", "dtype", "group", "out_dtype")
_AFFINE = ("x", "block", "scale", "zero", "dtype", "low", "high", "domain")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"{QD}{way}_per_tensor.{o}": _TENSOR for way in ("quantize", "dequantize") for o in ("default", "tensor")},
    **{f"{QD}{way}_per_channel.default": _CHANNEL for way in ("quantize", "dequantize")},
    **{f"{QD}{way}_per_channel_group.default": _GROUP for way in ("quantize", "dequantize")},
    **{f"{QD}{way}_per_token.default": (*_TENSOR, "out_dtype") for way in ("quantize", "dequantize")},
    **{f"{AO}{way}_affine.default": _AFFINE for way in ("quantize", "dequantize")},
}
"""Op -> the names of its arguments, of which some stand in keywords."""
_KEYWORDS = {"quant_min": "low", "quant_max": "high", "zero_point_domain": "domain", "zero_point": "zero"}
QUANTIZES = tuple(op for op in ARGUMENTS if ".quantize" in op)
DEQUANTIZES = tuple(op for op in ARGUMENTS if ".dequantize" in op)
CHOOSES = {
    f"{QD}choose_qparams.tensor": (1, 2),
    f"{QD}choose_qparams_symmetric.tensor": (1, 2),
    f"{QD}choose_qparams_per_token.default": (),
    f"{QD}choose_qparams_per_token_asymmetric.default": (),
    f"{AO}choose_qparams_affine.default": (4, 5),
}
"""Ops that choose scale and zero point at run time -> where they say the range of the codes."""
TOKENS = Scheme(TABLE["int8"], "token", symmetric=False, dynamic=True)
"""One scale and zero point a token (all but the last axis), chosen at run time."""
CHOSEN, FINER = "chosen", "finer"
"""Keys in the ``meta`` of a q.choose_qparams: the values that it stands for; that its codes are finer than those."""


def arguments(op: Op) -> dict[str, Any]:
    """The arguments of a quantize or dequantize by the names of this module; None where left out."""
    names = ARGUMENTS[op.name]
    out: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, call_args(op), strict=False))
    for key, skeleton in op.attrs.get("kwargs", ()):
        out[_KEYWORDS.get(key, key)] = op.operands[skeleton.index] if isinstance(skeleton, Hole) else skeleton
    return out


def _element(given: Any, codes: Value | None) -> DType | None:
    if isinstance(given, Atom):
        return TABLE.get(given.text)
    return None if codes is None else codes.tensor.dtype


def _number(rw: Rewriter, given: Any, name: str, element: DType) -> Value | None:
    """A scale or zero point: a constant of ``element`` for a number, f32 for f64, the value itself for another."""
    if given is None:
        return None
    if not isinstance(given, Value):
        return rw.const(name, constant(np.array(given, element.storage), element))
    value = settle(rw, given)
    if value.is_const and value.tensor.dtype == F64:
        shape = value.tensor.static_shape or ()

        def single(p: Payload) -> Payload:
            return constant(np.array(p.array(), np.float32).reshape(shape), F32)

        return once(rw, value, "f32", single)
    return value


def _place(rw: Rewriter, a: dict[str, Any], x: Value, name: str) -> tuple[str, int, int]:
    """Granularity (``tensor``, ``channel``, ``group`` or ``token``), axis and group size."""
    rank = x.tensor.rank or 1
    if "per_token" in name:
        return "token", -1, 0
    if "block" not in a:
        group = int(a.get("group") or 0)
        return ("group" if group else "channel" if "axis" in a else "tensor"), int(a.get("axis", -1)) % rank, group
    if a.get("domain") not in (None, "INT"):
        raise rw.declined(f"its zero points are {a['domain']}, not whole numbers of codes", code="QC204")
    block, shape = list(a["block"]), list(x.tensor.shape or ())
    # a size that is known only at run time stands in both, or is split to 1
    whole = [not isinstance(b, int) or b == d for b, d in zip(block, shape, strict=True)]
    if all(whole):
        return "tensor", 0, 0
    cut = [i for i, w in enumerate(whole) if not w]
    if len(cut) == 1 and block[cut[0]] == 1:
        token = x.payload is None and cut[0] == 0 and rank == 2
        return ("token" if token else "channel"), cut[0], 0
    if all(block[i] == 1 for i in cut if i != rank - 1) and all(b == 1 for b in block[:-1]):
        return ("token", -1, 0) if whole[-1] else ("group", rank - 1, int(block[-1]))
    raise rw.declined(f"blocks {block} of {shape} are no granularity that a kernel has", code="QC202")


def _narrow(codes: Payload | None, a: dict[str, Any], element: DType) -> DType:
    """The type of fewer bits that the stated range of codes has, where the codes keep to it."""
    low, high = a.get("low"), a.get("high")
    if codes is None or low is None or high is None:
        return element
    fits = (TABLE[w] for w in ("int2", "uint2", "int4", "uint4") if TABLE[w].qmin <= low and high <= TABLE[w].qmax)
    found = next(fits, element)
    if found is element:
        return element
    values = codes.array()
    return found if values.min(initial=0) >= found.qmin and values.max(initial=0) <= found.qmax else element


# -- constants -----------------------------------------------------------------------------------------------


@rule(*DEQUANTIZES)
def lift_torch_dequantize(op: Op, rw: Rewriter) -> Value:
    """dequantize_per_*(c, s, z)  ->  q.dequantize(c, s, z)"""
    a, out = arguments(op), op.result.tensor.dtype or F32
    codes = a["x"]
    element = _element(a["dtype"], codes)
    if codes is None or element is None or not element.is_integer or element.bits > 8:
        raise rw.declined(f"{element} codes have no kernel; int8, int4, int2 and their unsigned kin do", code="QC201")
    chosen = _chosen_behind(codes, a)
    if chosen is not None:
        return dequantized(rw, codes, chosen, out)
    codes = settle(rw, codes)
    granularity, axis, group = _place(rw, a, codes, op.name)
    if granularity == "token":
        raise rw.declined("its codes are scaled a token by what no quantize before it has chosen", code="QC201")
    if codes.is_const or codes.payload is not None:
        if op.result.is_output:
            raise rw.declined("the expanded tensor is an output of the graph", code="QC101", fix="give out the codes")
        codes = _typed(rw, constant_codes(rw, codes), _narrow(codes.payload, a, element))
        element = codes.tensor.dtype or element
    p = _parameters(rw, a, codes, element, axis, group)
    return dequantized(rw, codes, p, out)


def _typed(rw: Rewriter, codes: Value, element: DType) -> Value:
    """Constant codes in a type of fewer bits; one code a byte as before."""
    if codes.tensor.dtype == element:
        return codes
    shape = codes.tensor.static_shape or ()

    def make(p: Payload) -> Payload:
        def run(q: Payload) -> Array:
            return q.array().astype(element.storage)

        return computed(str(element), run, [p], element, shape)

    return once(rw, codes, str(element), make)


def _parameters(rw: Rewriter, a: dict[str, Any], x: Value, element: DType, axis: int, group: int) -> Parameters:
    """Scheme, scale and zero point that a static op says."""
    scale = _number(rw, a["scale"], f"{x.name}_scale", F32)
    zero = _number(rw, a["zero"], f"{x.name}_zero", INT64)
    for value in (scale, zero):
        if value is not None and not value.is_const:
            raise rw.declined(f"its parameter {value!r} is known only at run time", code="QC205")
    if scale is not None and "block" in a:
        scale, zero = (None if v is None else _small(rw, v, x, axis, group) for v in (scale, zero))
    return parameters(rw, x, element, scale, zero, axis=axis, block=group)


def _small(rw: Rewriter, value: Value, x: Value, axis: int, group: int) -> Value:
    """Parameters with the rank of the tensor, ``[C, 1]``, as those of one axis, ``[C]``."""
    size = 1 if value.payload is None else value.payload.size
    if group or (value.tensor.rank or 0) < 2 or size not in (1, (x.tensor.static_shape or (0,) * 9)[axis]):
        return value
    element = value.tensor.dtype or F32

    def flat(p: Payload) -> Payload:
        return constant(p.array().reshape(-1).copy(), element)

    return once(rw, value, "flat", flat)


# -- activations ---------------------------------------------------------------------------------------------


@rule(*QUANTIZES)
def lift_torch_quantize(op: Op, rw: Rewriter) -> Value:
    """quantize_per_*(x, s, z)  ->  q.quantize(x, s, z),  of a constant: its codes

    Codes that end before their type does: the clip of x to what they hold comes first.
    """
    a, x = arguments(op), op.operand(0)
    element = _element(a["dtype"], op.result)
    if x is None or element is None or not element.is_integer or element.bits != 8:
        raise rw.declined(f"{element} codes have no kernel", code="QC201")
    x = settle(rw, x)
    granularity, axis, group = _place(rw, a, x, op.name)
    low, high = (e if g is None else int(g) for g, e in ((a["low"], element.qmin), (a["high"], element.qmax)))
    chooser = a["scale"].owner if isinstance(a["scale"], Value) else None
    if chooser is not None and chooser.name in CHOOSES and not x.is_const:
        return _dynamic(rw, op, chooser, x, granularity, element)
    if granularity == "token":
        raise rw.declined("an activation is scaled a token by what is not chosen from it", code="QC201")
    p = _parameters(rw, a, x, element, axis, group)
    if x.is_const and x.payload is not None:
        return _codes(rw, op, x, p, low, high)
    if granularity != "tensor":
        message = f"an activation is scaled per {granularity}, and integer kernels scale it per tensor"
        raise rw.declined(message, code="QC201", fix="quantize activations per tensor")
    if (low, high) != (element.qmin, element.qmax):
        x = _clipped(rw, x, p, low, high)
    return quantized(rw, x, p, hint=f"{op.result.name}_c")


def _codes(rw: Rewriter, op: Op, x: Value, p: Parameters, low: int, high: int) -> Value:
    """The codes of a constant, not computed now."""
    known = [v.payload for v in (x, p.scale, p.zero) if v is not None and v.payload is not None]

    def run(*parts: Payload) -> Array:
        arrays = [q.array() for q in parts]
        return np.clip(quantize(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, p.scheme), low, high)

    shape = x.tensor.static_shape or ()
    return rw.const(f"{x.name}.codes", computed(f"quantize<{p.scheme}>", run, known, p.scheme.dtype, shape))


def _clipped(rw: Rewriter, x: Value, p: Parameters, low: int, high: int) -> Value:
    assert p.scale.payload is not None
    step = float(p.scale.payload.array().reshape(()))
    zero = 0 if p.zero is None or p.zero.payload is None else int(p.zero.payload.array().reshape(()))
    args = (Hole(0), (low - zero) * step, (high - zero) * step)
    made = rw.op("aten.clamp.default", x, type=x.type, hint=f"{x.name}_clip", args=args)
    assert made.owner is not None
    made.owner.loc = Loc("", rw.root.loc.scope, rw.root.loc.source)
    return made


def _dynamic(rw: Rewriter, op: Op, chooser: Op, x: Value, granularity: str, element: DType) -> Value:
    """q.quantize by q.choose_qparams of the same x: uint8 over its whole range, 0 included, or a token each.

    Signed codes are counted from 128 lower; fewer codes, or symmetric ones, have larger steps than these.
    """
    if chooser.operand(0) is not x or granularity not in ("tensor", "token"):
        raise rw.declined("its scale is chosen from another tensor, or not per tensor", code="QC201")
    if any(u.name not in DEQUANTIZES for u in op.result.users) or op.result.is_output:
        raise rw.declined("its codes are read by more than dequantizes", code="QC205")
    scheme = DYNAMIC if granularity == "tensor" else TOKENS
    made = _choose(rw, chooser, x, scheme, element)
    p = Parameters(scheme, made.results[0], made.results[1])
    return quantized(rw, x, p, hint=f"{op.result.name}_c")


def _choose(rw: Rewriter, chooser: Op, x: Value, scheme: Scheme, element: DType) -> Op:
    """The q.choose_qparams that stands for ``chooser``, made once, right behind it."""
    names = tuple(r.name for r in chooser.results)
    for user in x.users:
        if user.name == "q.choose_qparams" and user.meta.get(CHOSEN) == names:
            return user
    shape: Any = () if scheme is DYNAMIC else (*(x.tensor.shape or ())[:-1], 1)
    graph = rw.graph
    results = [
        (graph.fresh(f"{x.name}_scale"), TensorType(x.tensor.dtype or F32, shape)),
        (graph.fresh(f"{x.name}_zero"), TensorType(scheme.dtype, shape)),
    ]
    behind = graph.after(chooser.results[0])
    made = graph.create("q.choose_qparams", [x], {"scheme": scheme}, results, loc=chooser.loc, before=behind)
    made.meta[CHOSEN] = names
    args, at = call_args(chooser), CHOOSES[chooser.name]
    whole = bool(at) and [args[i] if i < len(args) else None for i in at] in (
        [None, None],
        [element.qmin, element.qmax],
    )
    symmetric = "symmetric" in str(chooser.name).removesuffix("_asymmetric.default") or "SYMMETRIC" in args[1:2]
    if scheme is DYNAMIC and (symmetric or not whole):
        made.meta[FINER] = True
    rw.made.append(made)
    return made


def _chosen_behind(codes: Value, a: dict[str, Any]) -> Parameters | None:
    """Scale and zero point of the dynamic q.quantize behind ``codes``, where the dequantize has the same."""
    maker = codes.owner
    while maker is not None and movement_kind(maker) == "permute":
        source = maker.operand(0)
        maker = None if source is None else source.owner
    scheme = None if maker is None else maker.attrs.get("scheme")
    if maker is None or maker.name != "q.quantize" or not isinstance(scheme, Scheme) or not scheme.dynamic:
        return None
    scale, zero = maker.operand(1), maker.operand(2)
    names = tuple(v.name for v in (a["scale"], a["zero"]) if isinstance(v, Value))
    if scale is None or scale.owner is None or scale.owner.meta.get(CHOSEN) != names:
        return None
    return Parameters(scheme, scale, zero)


RULES = (lift_torch_quantize, lift_torch_dequantize)
