"""Values as activations are distributed."""

from collections.abc import Callable

import numpy as np


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.7 * x))


KINDS: dict[str, Callable[[int], np.ndarray]] = {
    "normal": lambda n: _rng().normal(size=n).astype(np.float32),
    "laplace": lambda n: _rng().laplace(size=n).astype(np.float32),
    "relu": lambda n: np.maximum(_rng().normal(size=n), 0).astype(np.float32),
    "gelu": lambda n: _gelu(_rng().normal(size=n)).astype(np.float32),
    "negative": lambda n: -_rng().exponential(size=n).astype(np.float32),
    "shifted": lambda n: (100 + _rng().normal(size=n)).astype(np.float32),
    "heavy": lambda n: _rng().standard_t(3, size=n).astype(np.float32),
    "few values": lambda n: _rng().integers(-3, 4, n).astype(np.float32) / 2,
}
