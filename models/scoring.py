"""Scoring and sampling with any callable that maps token ids to logits; numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["IdArray", "LogitsFn", "Score", "sample", "score_windows", "windows"]

IdArray = npt.NDArray[np.int64]
LogitsFn = Callable[[IdArray], npt.NDArray[np.floating]]
"""Maps token ids int64 ``[B, S]`` to logits ``[B, S, V]`` of any float dtype."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The per-token perplexity, ``exp(nats_per_token)``."""
        return float(np.exp(self.nats_per_token))


def windows(stream: IdArray, window: int, limit: int | None = None) -> IdArray:
    """Cut ``stream`` int64 ``[N]`` into rows ``[W, window + 1]`` that share one token with their neighbour.

    Each token but the first is thus a target once; a remainder shorter than a row is dropped. With
    ``limit``, at most that many rows come back, spread evenly over the stream.
    """
    count = (len(stream) - 1) // window
    if count < 1:
        raise ValueError(f"a stream of {len(stream)} tokens has no window of {window} + 1")
    starts = np.arange(count) * window
    if limit is not None and limit < count:
        starts = starts[np.linspace(0, count - 1, limit).round().astype(np.int64)]
    rows: IdArray = stream[starts[:, None] + np.arange(window + 1)]
    return rows


def score_windows(logits_fn: LogitsFn, rows: IdArray, token_bytes: npt.NDArray[np.int64], batch: int = 8) -> Score:
    """Score ``rows`` ``[W, window + 1]``; ``token_bytes`` int64 ``[V]`` is the byte length of each token.

    Targets of zero bytes (document marks) are not counted. ``logits_fn`` sees ``[batch, window]`` ids, the
    last batch padded with repeats of its last row, so a runner with static shapes can serve.
    """
    nats, count, size = 0.0, 0, 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        ids = np.concatenate((chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)))[:, :-1]
        logits = np.asarray(logits_fn(np.ascontiguousarray(ids)))[: len(chunk)].astype(np.float64)
        targets = chunk[:, 1:]
        logits -= logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = np.log(np.exp(logits).sum(-1)) - picked
        counted = token_bytes[targets] > 0
        nats += float(losses[counted].sum())
        count += int(counted.sum())
        size += int(token_bytes[targets].sum())
    return Score(nats / count, nats / math.log(2.0) / size, count)


def sample(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    window: int = 256,
    stop: int | None = None,
) -> list[int]:
    """Continue ``prompt`` by up to ``count`` tokens and return the new ones.

    A temperature of 0 is greedy; otherwise tokens are drawn with ``seed``, from the ``top_k`` likeliest when
    that is given. Each step sees the last ``window`` tokens. The token ``stop`` ends the text and is left out.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens")
    rng = np.random.default_rng(seed)
    ids = list(prompt)
    for _ in range(count):
        context = np.asarray([ids[-window:]], dtype=np.int64)
        logits = np.asarray(logits_fn(context))[0, -1].astype(np.float64)
        chosen = int(logits.argmax()) if temperature <= 0 else _draw(logits / temperature, top_k, rng)
        if chosen == stop:
            break
        ids.append(chosen)
    return ids[len(prompt) :]


def _draw(logits: npt.NDArray[np.float64], top_k: int | None, rng: np.random.Generator) -> int:
    """Draw an index by the softmax of ``logits`` ``[V]``, restricted to the ``top_k`` largest."""
    if top_k is not None and top_k < len(logits):
        cut = np.partition(logits, -top_k)[-top_k]
        logits = np.where(logits >= cut, logits, -np.inf)
    weights = np.exp(logits - logits.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))
