"""Entry points: linear layers and products of codes, written as ONNX Runtime's integer nodes.

Each takes ``(op, choice)``, inserts the host ops before ``op`` and returns the value that stands for its result. The
node that runs the kernel is called exactly like the site; what stands around it has the site's name and a suffix.
Weights ``[N, K]`` are stored as ``[K, N]``. Raises InputError for weights that are no constants.
"""

from __future__ import annotations

from qcompiler.backends.onnx import layouts
from qcompiler.backends.onnx.building import Builder
from qcompiler.backends.onnx.lower_pointwise import dynamic_codes, quantize_node
from qcompiler.dtypes import UINT8, Array
from qcompiler.ir import Op, Value
from qcompiler.scheme import Scheme
from qcompiler.target import Choice


def _weight(b: Builder, first: int, *, explicit: bool) -> tuple[Value, Value, Value | None]:
    """Codes ``[K, N]``, scales and zero points (``[N]``, or ``[]`` for a whole tensor) of operands ``first`` on."""
    scheme: Scheme = b.op.attrs["scheme"]
    codes = b.payload(first, "codes")
    (n, k), flip = codes.shape, b.flips and scheme.dtype.signed

    def columns(array: Array) -> Array:
        return layouts.columns(array, flip=flip)

    shape = () if scheme.granularity == "tensor" else (n,)
    stored = b.derived("weight_q8", codes, columns, UINT8 if flip else scheme.dtype, (k, n))
    scale = b.payload(first + 1, "scale")
    scales = b.derived("weight_scale", scale, lambda s: s.reshape(shape), scale.dtype, shape)
    return stored, scales, b.weight_zero(first + 2, scheme, shape, explicit=explicit)


def matmul_integer_to_float(op: Op, choice: Choice) -> Value:
    """q.linear_static(x, ..)  ->  MatMulIntegerToFloat(x, W, xs, ws, xz, wz?, bias?), QuantizeLinear where y is codes

    ``x`` may have any rank from 1.
    """
    b = Builder(op, choice)
    weight, scale, zero = _weight(b, 3, explicit=False)
    coded = "y_scheme" in op.attrs
    type = b.like(b.at(1).tensor.dtype) if coded else op.result.type
    operands = [b.at(0), weight, b.at(1), scale, b.zero(2, op.attrs["x_scheme"]), zero, op.operand(6)]
    y = b.step("com.microsoft.MatMulIntegerToFloat", operands, "", type)
    if not coded:
        return y
    return quantize_node(b, y, b.at(7), b.zero(8, op.attrs["y_scheme"]), suffix="codes")


def qlinear_matmul(op: Op, choice: Choice) -> Value:
    """q.linear_static(x, .., y)  ->  QLinearMatMul(x, xs, xz, W, ws, wz, ys, yz)   without a bias"""
    b = Builder(op, choice)
    weight, scale, zero = _weight(b, 3, explicit=True)
    x_zero, y_zero = b.zero(2, op.attrs["x_scheme"]), b.zero(8, op.attrs["y_scheme"])
    return b.node("onnx.QLinearMatMul", [b.at(0), b.at(1), x_zero, weight, scale, zero, b.at(7), y_zero]).result


def qgemm(op: Op, choice: Choice) -> Value:
    """q.linear_static(x[M, K], .., y)  ->  QGemm(x, xs, xz, W, ws, wz, int32 bias?, ys, yz)

    Raises InputError for a bias beyond int32 when the artifact is written.
    """
    b = Builder(op, choice)
    weight, scale, zero = _weight(b, 3, explicit=True)
    n = b.payload(3, "codes").shape[0]
    bias = None if op.operand(6) is None else b.bias_codes(6, 1, 4, n)
    x_zero, y_zero = b.zero(2, op.attrs["x_scheme"]), b.zero(8, op.attrs["y_scheme"])
    operands = [b.at(0), b.at(1), x_zero, weight, scale, zero, bias, b.at(7), y_zero]
    return b.node("com.microsoft.QGemm", operands).result


def dynamic_quantize_matmul(op: Op, choice: Choice) -> Value:
    """q.linear_dyn(x, ..)  ->  DynamicQuantizeMatMul(x, W, ws, wz?, bias?)"""
    b = Builder(op, choice)
    weight, scale, zero = _weight(b, 1, explicit=False)
    return b.node("com.microsoft.DynamicQuantizeMatMul", [b.at(0), weight, scale, zero, op.operand(4)]).result


def dynamic_matmul_integer(op: Op, choice: Choice) -> Value:
    """q.linear_dyn(x, ..)  ->  MatMulIntegerToFloat on DynamicQuantizeLinear(x), which other ops may read too"""
    b = Builder(op, choice)
    codes, x_scale, x_zero = dynamic_codes(b, b.at(0))
    weight, scale, zero = _weight(b, 1, explicit=False)
    operands = [codes, weight, x_scale, scale, x_zero, zero, op.operand(4)]
    return b.node("com.microsoft.MatMulIntegerToFloat", operands).result


# -- products of two activations, or of one and a constant ---------------------------------------------------


def _side(b: Builder, first: int, key: str) -> tuple[Value, Value, Value]:
    """Codes, scale and zero point of one operand; int8 constants beside uint8 codes are stored 128 higher."""
    scheme: Scheme = b.op.attrs[key]
    codes, scale = b.at(first), b.at(first + 1)
    if not (b.flips and codes.is_const and scheme.dtype.signed):
        return codes, scale, b.zero(first + 2, scheme)
    side = "left" if first == 0 else "right"
    payload = b.payload(first, f"{side} operand")
    stored = b.derived(f"{side}_q8", payload, lambda c: layouts.kernels(c, flip=True), UINT8, payload.shape)
    if b.op.operand(first + 2) is None:
        return stored, scale, b.code(UINT8, 128)
    zeros = b.payload(first + 2, f"{side} zero point")
    return stored, scale, b.derived(f"{side}_zero", zeros, layouts.higher, UINT8, ())


def matmul_codes(op: Op, choice: Choice) -> Value:
    """q.matmul(a, b, y)  ->  QLinearMatMul(a, as, az, b, bs, bz, ys, yz)"""
    b = Builder(op, choice)
    left, right = _side(b, 0, "a_scheme"), _side(b, 3, "b_scheme")
    return b.node("onnx.QLinearMatMul", [*left, *right, b.at(6), b.zero(7, op.attrs["y_scheme"])]).result


def matmul_float(op: Op, choice: Choice) -> Value:
    """q.matmul(a, b)  ->  MatMulIntegerToFloat(a, b, as, bs, az, bz)"""
    b = Builder(op, choice)
    (a, a_scale, a_zero), (c, c_scale, c_zero) = (
        _side(b, 0, "a_scheme"),
        _side(b, 3, "b_scheme"),
    )
    operands = [a, c, a_scale, c_scale, a_zero, c_zero]
    return b.node("com.microsoft.MatMulIntegerToFloat", operands).result
