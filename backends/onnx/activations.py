"""What ``MatMulNBits`` does to its activations at accuracy_level 4: int8 codes, one scale a block of K.

Measured on ONNX Runtime 1.31: with these activations and the dequantized weight in float64, every int8 row agrees with
the kernel to float32 rounding (tests/backends/onnx/test_kernels.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def int8_activations(x: NDArray[Any], block: int) -> NDArray[np.float64]:
    """``x`` ``[.., K]`` as the kernel sees it: ``round(x * 127 / max|x|) * max|x| / 127`` in each block of K.

    The rounding is to nearest even, of float32 products, as the kernel does it; a block of zeros stays zero.
    """
    k = x.shape[-1]
    flat = x.astype(np.float32).reshape(-1, k)
    padded = np.pad(flat, ((0, 0), (0, -k % block))).reshape(len(flat), -1, block)
    top = np.abs(padded).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0))
    codes = np.rint(padded * inverse)
    scale = (top / np.float32(127)).astype(np.float64)
    seen: NDArray[np.float64] = (codes.astype(np.float64) * scale).reshape(len(flat), -1)[:, :k]
    return seen.reshape(x.shape)
