"""Views: what an op of any host dialect *is*, so that passes never match source spellings.

``as_linear`` reads onnx.MatMul, onnx.Gemm, aten.linear, addmm, mm, matmul and our q-dialect neighbours as one
``x @ W^T + b``; ``as_product`` the products with a constant that are no such layer (weight on the left, or of rank 3);
``as_embedding`` reads onnx.Gather and aten.embedding. A view looks through two-dimensional transposes
of the weight. What an op of the right kind lacks to be such a view is a :class:`~qcompiler.rewrite.Declined` with a
reason; an op of another kind is declined quietly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.ir import Attr, Hole, Op, Value
from qcompiler.rewrite import Declined
from qcompiler.spec import is_float_const
from qcompiler.target import Reason

LINEAR_OPS = frozenset(
    {
        "onnx.MatMul",
        "onnx.Gemm",
        "com.microsoft.FusedMatMul",
        "com.microsoft.FusedGemm",
        "aten.linear.default",
        "aten.addmm.default",
        "aten.mm.default",
        "aten.matmul.default",
        "aten.bmm.default",
    }
)
EMBEDDING_OPS = frozenset({"onnx.Gather", "aten.embedding.default"})
CONV_OPS = frozenset(
    {"onnx.Conv", "onnx.ConvTranspose", "com.microsoft.FusedConv", "aten.conv1d.default"}
    | {"aten.conv2d.default", "aten.conv3d.default", "aten.convolution.default"}
    | {"aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding"}
    | {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"}
)
RECURRENT_OPS = frozenset({"onnx.LSTM", "onnx.GRU", "onnx.RNN", "aten.lstm.input", "aten.gru.input"})


@dataclass(frozen=True, slots=True)
class LinearView:
    """``result = x @ W^T + bias``: ``weight`` is stored ``[n, k]`` when ``transposed``, else ``[k, n]``.

    ``bias`` is ``[n]`` or a constant that broadcasts to it (:func:`is_row`).

    ``covered`` are the ops that a fused kernel replaces, the root first; ``result`` is the last one's.
    """

    op: Op
    x: Value
    weight: Value
    bias: Value | None
    transposed: bool
    n: int
    k: int
    result: Value
    covered: tuple[Op, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def axis(self) -> int:
        """The axis of ``weight`` along which the reduction runs."""
        return 1 if self.transposed else 0


@dataclass(frozen=True, slots=True)
class ProductView:
    """``result = x @ weight``, or ``weight @ x`` where ``slot``, the operand of the weight, is 0.

    ``weight`` is a constant of rank 2 or more; ``k`` is the length of the reduction, ``n`` that of its other axis.
    """

    op: Op
    x: Value
    weight: Value
    slot: int
    n: int
    k: int
    result: Value


@dataclass(frozen=True, slots=True)
class EmbeddingView:
    """``result = table[indices]``: ``table`` is ``[n, k]``."""

    op: Op
    indices: Value
    table: Value
    n: int
    k: int
    result: Value


def kind_of(op: Op) -> str | None:
    """``linear``, ``embedding``, ``conv`` or ``recurrent``, where the op may hold a weight of that kind."""
    for kind, names in (
        ("linear", LINEAR_OPS),
        ("embedding", EMBEDDING_OPS),
        ("conv", CONV_OPS),
        ("recurrent", RECURRENT_OPS),
    ):
        if op.name in names:
            return kind
    return None


def call_args(op: Op) -> list[Any]:
    """Positional arguments of an aten op, operands in the places of their holes."""
    return [_fill(op, a) for a in op.attrs.get("args", ())]


def _fill(op: Op, skeleton: Attr) -> Any:
    if isinstance(skeleton, Hole):
        return op.operands[skeleton.index]
    return [_fill(op, s) for s in skeleton] if isinstance(skeleton, tuple) else skeleton


def with_args(op: Op, changes: Mapping[int, Value | None]) -> tuple[list[Value | None], dict[str, Attr]]:
    """Operands and attributes of the aten call ``op`` with other values as the positional arguments of ``changes``.

    An argument that was left out is added; those between are None.
    """
    operands: list[Value | None] = []

    def packed(skeleton: Attr) -> Attr:
        if isinstance(skeleton, Hole):
            operands.append(op.operands[skeleton.index])
            return Hole(len(operands) - 1)
        return tuple(packed(s) for s in skeleton) if isinstance(skeleton, tuple) else skeleton

    given: list[Attr] = list(op.attrs.get("args", ()))
    given += [None] * (1 + max(changes, default=-1) - len(given))
    args: list[Attr] = []
    for i, skeleton in enumerate(given):
        if i not in changes:
            args.append(packed(skeleton))
            continue
        value = changes[i]
        if value is not None:
            operands.append(value)
        args.append(None if value is None else Hole(len(operands) - 1))
    attrs = {**op.attrs, "args": tuple(args)}
    if "kwargs" in op.attrs:
        attrs["kwargs"] = tuple((k, packed(v)) for k, v in op.attrs["kwargs"])
    return operands, attrs


def named_operands(op: Op) -> list[str]:
    """The keywords by which the aten call ``op`` passes values: views read positional arguments alone."""
    return [k for k, v in op.attrs.get("kwargs", ()) if isinstance(v, Hole)]


def through_transposes(value: Value) -> tuple[Value, bool]:
    """``value`` with two-dimensional transposes and identities taken off; whether an odd number of transposes went."""
    flipped = False
    while (op := value.owner) is not None:
        source = op.operand(0)
        if source is None:
            break
        if op.name in ("onnx.Identity", "aten.alias.default", "aten.detach.default", "aten.contiguous.default"):
            value = source
        elif _is_transpose_2d(op, source):
            value, flipped = source, not flipped
        else:
            break
    return value, flipped


def _is_transpose_2d(op: Op, source: Value) -> bool:
    if source.tensor.rank != 2:
        return False
    if op.name == "onnx.Transpose":
        return tuple(op.attrs.get("perm", (1, 0))) == (1, 0)
    if op.name in ("aten.t.default", "aten.numpy_T.default"):
        return True
    if op.name in ("aten.transpose.int", "aten.permute.default"):
        numbers = [n for a in call_args(op)[1:] for n in (a if isinstance(a, list) else [a])]
        return sorted(n % 2 for n in numbers) == [0, 1] and (
            op.name == "aten.transpose.int" or [n % 2 for n in numbers] == [1, 0]
        )
    return False


def _matrix(op: Op, weight: Value, flip: bool) -> tuple[Value, bool, int, int]:
    """The stored weight, whether it is ``[n, k]``, and n, k."""
    stored, flipped = through_transposes(weight)
    transposed = flipped != flip
    shape = stored.tensor.static_shape
    if shape is None or len(shape) != 2:
        have = "of unknown shape" if shape is None else f"of shape {list(shape)}"
        raise Declined(Reason("QC203", f"{op.name} '{op.label}' has a weight {have}, not a matrix", "skip the site"))
    n, k = shape if transposed else shape[::-1]
    return stored, transposed, n, k


def _constant_behind(value: Value | None) -> bool:
    """True when ``value`` is a float constant or a dequantized one, possibly behind transposes."""
    if value is None:
        return False
    return _is_weight(through_transposes(value)[0])


def _quiet(op: Op) -> Declined:
    return Declined(f"{op.name} is no linear layer with a constant weight", quiet=True)


def _operands(op: Op) -> tuple[Value | None, Value | None, Value | None, bool]:
    """x, weight as written, bias, and whether the written weight is ``[n, k]``."""
    if op.name in ("onnx.MatMul", "com.microsoft.FusedMatMul"):
        return op.operand(0), op.operand(1), None, False
    if op.name in ("onnx.Gemm", "com.microsoft.FusedGemm"):
        return op.operand(0), op.operand(1), op.operand(2), bool(op.attrs.get("transB", 0))
    args = [a if isinstance(a, Value) else None for a in call_args(op)] + [None] * 3
    if op.name == "aten.linear.default":
        return args[0], args[1], args[2], True
    if op.name == "aten.addmm.default":
        return args[1], args[2], args[0], False
    return args[0], args[1], None, False


def as_linear(op: Op) -> LinearView:
    """The linear layer rooted at ``op``; raises Declined with the reason why it is none."""
    if op.name not in LINEAR_OPS:
        raise _quiet(op)
    x, weight, bias, flip = _operands(op)
    if x is not None and not _constant_behind(weight) and _constant_behind(x):
        message = f"{op.name} '{op.label}' has its weight on the left"
        raise Declined(Reason("QC203", message, "transpose the product so that the weight is on the right"))
    if x is None or weight is None or not _constant_behind(weight):
        raise _quiet(op)
    _plain_attributes(op)
    stored, transposed, n, k = _matrix(op, weight, flip)
    if bias is not None and not is_row(bias, n):
        have = bias.tensor.shape
        raise Declined(Reason("QC203", f"{op.name} '{op.label}' adds a tensor of shape {have}, not a bias [{n}]", ""))
    return LinearView(op, x, stored, bias, transposed, n, k, op.result, (op,))


def as_product(op: Op) -> ProductView:
    """The product rooted at ``op`` whose constant is on the left, or of rank 3 or more; Declined with the reason.

    Products that :func:`as_linear` reads are declined quietly. A constant is read where it stands: no transpose
    before it is looked through.
    """
    if op.name not in LINEAR_OPS:
        raise _quiet(op)
    x, weight, bias, written = _operands(op)
    slot = 1
    if x is not None and not _constant_behind(weight) and _constant_behind(x):
        x, weight, slot = weight, x, 0
    rank = 0 if weight is None else weight.tensor.rank or 0
    if x is None or weight is None or not _is_weight(weight) or (slot == 1 and rank < 3) or rank < 2:
        raise _quiet(op)
    _plain_attributes(op)
    shape = weight.tensor.static_shape
    if written or bias is not None or shape is None:
        message = f"{op.name} '{op.label}' is more than a product with a constant of known shape"
        raise Declined(Reason("QC203", message, "write it as MatMul and Add"))
    n, k = shape[-2:] if slot == 0 else shape[:-3:-1]
    return ProductView(op, x, weight, slot, n, k, op.result)


def _is_weight(value: Value) -> bool:
    """A float constant, or a dequantized one."""
    return is_float_const(value) or (value.owner is not None and value.owner.name == "q.dequantize")


def is_row(bias: Value, n: int) -> bool:
    """True when ``bias`` adds one number to each of ``n`` outputs: ``[n]``, or a constant that broadcasts so."""
    shape = bias.tensor.static_shape
    if shape == (n,):
        return True
    return (
        is_float_const(bias) and shape is not None and (shape == () or shape[-1] in (1, n)) and set(shape[:-1]) <= {1}
    )


def _plain_attributes(op: Op) -> None:
    """Decline scaled, activated or left-transposed products: no fused low-bit kernel has them."""
    defaults: dict[str, Any] = {"alpha": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0, "activation": ""}
    if op.operand(2) is not None:
        defaults["beta"] = 1.0
    if op.name == "com.microsoft.FusedMatMul":
        defaults["transB"] = 0
    for key, plain in defaults.items():
        if op.attrs.get(key, plain) != plain:
            message = f"{op.name} '{op.label}' has {key}={op.attrs[key]}, which no fused low-bit kernel takes"
            raise Declined(Reason("QC203", message, "write the factor or transpose as an op of its own"))
    kwargs = dict(op.attrs.get("kwargs", ()))
    if named := named_operands(op):
        message = f"{op.name} '{op.label}' passes {', '.join(named)} by name"
        raise Declined(Reason("QC203", message, "pass tensors by position"))
    if op.name.startswith("aten.") and any(kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        raise Declined(Reason("QC203", f"{op.name} '{op.label}' scales its product ({kwargs})", "scale outside"))


def as_embedding(op: Op) -> EmbeddingView:
    """The embedding lookup rooted at ``op``; raises Declined with the reason why it is none."""
    if op.name == "onnx.Gather":
        table, indices = op.operand(0), op.operand(1)
    elif op.name == "aten.embedding.default":
        args = call_args(op)
        table, indices = args[0], args[1]
    else:
        raise Declined(f"{op.name} is no embedding lookup", quiet=True)
    if table is None or indices is None or not _constant_behind(table):
        raise Declined(f"{op.name} does not look up a constant table", quiet=True)
    stored, flipped = through_transposes(table)
    shape = stored.tensor.static_shape
    if shape is None or len(shape) != 2:
        raise Declined(f"{op.name} looks up a tensor of rank {stored.tensor.rank}", quiet=True)
    if flipped or (op.name == "onnx.Gather" and op.attrs.get("axis", 0) % 2 != 0):
        raise Declined(Reason("QC203", f"{op.name} '{op.label}' gathers columns, not rows, of its table", "skip it"))
    return EmbeddingView(op, indices, stored, shape[0], shape[1], op.result)
