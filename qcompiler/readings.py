"""Which metrics apply to a pair of models and the data, and their sums over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompiler.backends.base import Output, Pair
from qcompiler.dtypes import INT64, Array
from qcompiler.errors import InputError
from qcompiler.ir import TensorType, Value
from qcompiler.metrics import Agreement, Closeness, Divergence, Likelihood, are_probabilities
from qcompiler.payload import constant

METRICS = ("ppl", "kl", "cosine", "sqnr", "top1")
LABELS = ("label", "labels")
"""Arrays of the data that hold the true classes, where the model has no input of that name."""
SCORE_WORDS = ("logit", "prob", "score", "label", "class")
"""An output whose name holds one of these has class scores along its last axis."""
NO_IDS = "the model takes no token ids, so it is no language model"
CAUSAL = 1e-3
"""How much earlier logits may differ, of the largest, when the last token changes: rounding of float16 kernels."""


class Readings:
    """Sums of the metrics that apply. ``scores`` is the output that holds class scores, ``why_none`` why there is none;
    ``left_out`` maps metrics to the reasons for which they do not apply."""

    def __init__(self, pair: Pair, metrics: Sequence[str] = (), output: str | None = None) -> None:
        self.pair, self.asked = pair, tuple(metrics)
        self.scores, self.why_none = score_output(pair, output)
        self.label_names = label_names(pair)
        self.left_out: dict[str, str] = {}
        self.samples = self.batches = 0
        self.closeness = {o.name: Closeness() for o in pair.outputs} if self.wants("cosine", "sqnr") else {}
        self.sites = [Closeness() for _ in pair.sites]
        self.divergence: Divergence | None = None
        self.agreement: Agreement | None = None
        self.likelihoods: tuple[Likelihood, Likelihood] | None = None

    def wants(self, *metrics: str) -> bool:
        """Whether one of ``metrics`` is asked for, or nothing in particular."""
        return not self.asked or any(m in self.asked for m in metrics)

    def add(
        self, feed: Mapping[str, Array], labels: Array | None, want: Mapping[str, Array], got: Mapping[str, Array]
    ) -> None:
        """Add one batch; the first one shows what applies. Raises InputError for a metric asked for that does not."""
        if not self.batches:
            self._begin(feed, want, got)
        rows = _rows(feed)
        for name, sums in self.closeness.items():
            each = rows if want[name].ndim and want[name].shape[0] == rows else 1
            sums.add(want[name], got[name], each)
        if self.scores is not None:
            self._add_scores(feed, labels, want[self.scores.name], got[self.scores.name])
        self.samples += rows
        self.batches += 1

    def add_site(self, index: int, want: Array, got: Array) -> None:
        """What one site computes in both models; a result in another layout has another shape and is not compared."""
        if want.size == got.size:
            self.sites[index].add(want.reshape(-1), got.reshape(-1))

    # -- what applies --------------------------------------------------------------------------------------------

    def _begin(self, feed: Mapping[str, Array], want: Mapping[str, Array], got: Mapping[str, Array]) -> None:
        reasons = {"top1": self.why_none, "kl": self.why_none, "ppl": self.why_none}
        if self.pair.ids is None:
            reasons["ppl"] = NO_IDS
        if self.scores is not None:
            likely = want[self.scores.name]
            if likely.ndim < 2 or likely.shape[-1] < 2:
                text = f"output {self.scores.name} has shape {list(likely.shape)}, which holds no classes"
                reasons = {metric: reason or text for metric, reason in reasons.items()}
            else:
                reasons["ppl"] = self._why_no_perplexity(feed, likely)
                both = are_probabilities(likely) and are_probabilities(got[self.scores.name])
                if both and not reasons["ppl"]:
                    reasons["ppl"] = f"output {self.scores.name} holds probabilities, not logits"
                if not reasons["kl"] and self.wants("kl"):
                    self.divergence = Divergence(both)
                if not reasons["top1"] and self.wants("top1"):
                    self.agreement = Agreement()
                if not reasons["ppl"] and self.wants("ppl"):
                    self.likelihoods = (Likelihood(), Likelihood())
        for metric in METRICS:
            if reason := reasons.get(metric, ""):
                if metric in self.asked:
                    raise InputError(f"--metric {metric} does not apply: {reason}")
                if self.wants(metric):
                    self.left_out[metric] = reason

    def _why_no_perplexity(self, feed: Mapping[str, Array], logits: Array) -> str:
        ids = self.pair.ids
        if ids is None:
            return NO_IDS
        if logits.ndim != 3:
            return f"output {self.scores.name if self.scores else ''} has rank {logits.ndim}; next tokens need rank 3"
        tokens = feed[ids.name]
        if logits.shape[:2] != tokens.shape or tokens.shape[1] < 2:
            return f"logits {list(logits.shape)} do not give each of the tokens {list(tokens.shape)} a next one"
        if int(tokens.max()) >= logits.shape[-1]:
            return f"token {int(tokens.max())} is none of the {logits.shape[-1]} classes"
        return self._why_not_causal(feed, logits)

    def _why_not_causal(self, feed: Mapping[str, Array], logits: Array) -> str:
        """A model that looks at the token it is to predict has no perplexity: change the last one and see."""
        assert self.pair.ids is not None and self.scores is not None
        ids = feed[self.pair.ids.name].copy()
        ids[:, -1] = (ids[:, -1] + 1) % max(2, self.pair.vocabulary or logits.shape[-1])
        again = self.pair.run_reference({**feed, self.pair.ids.name: ids}, self.scores.name)
        before, after = logits[:, :-1].astype(np.float64), again[:, :-1].astype(np.float64)
        if np.abs(before - after).max() > CAUSAL * np.abs(before).max():
            return "earlier logits change with the last token: the model sees what it would have to predict"
        return ""

    # -- class scores --------------------------------------------------------------------------------------------

    def _add_scores(self, feed: Mapping[str, Array], labels: Array | None, want: Array, got: Array) -> None:
        keep = self._unpadded(feed, want)
        classes = None if labels is None else _classes(labels, want)
        shifted = self.likelihoods is not None
        targets = classes
        if shifted:
            assert self.pair.ids is not None
            targets = next_tokens(feed[self.pair.ids.name].astype(np.int64) if classes is None else classes, keep)
            for sums, logits in zip(self.likelihoods or (), (want, got), strict=True):
                sums.add(logits, targets)
        if self.divergence is not None:
            self.divergence.add(want, got, keep)
        if self.agreement is not None:
            self.agreement.add(want, got, None if classes is None else targets, keep)

    def _unpadded(self, feed: Mapping[str, Array], scores: Array) -> Array | None:
        """Where the attention mask is not 0; None without a mask."""
        for name, array in feed.items():
            if "mask" in name.lower() and array.shape == scores.shape[:-1] and array.dtype.kind in "biu":
                kept: Array = array != 0
                return kept
        return None


def next_tokens(ids: Array, keep: Array | None) -> Array:
    """``ids [B, S]`` shifted so that each position holds its next token, -1 where there is none or it is padding."""
    out = np.full(ids.shape, -1, np.int64)
    out[:, :-1] = ids[:, 1:]
    if keep is not None:
        out[:, :-1][~keep[:, 1:]] = -1
    return out


def score_output(pair: Pair, name: str | None) -> tuple[Output | None, str]:
    """The output that holds class scores along its last axis, or None and why.

    The one that ``name`` says; else logits over the vocabulary, an output whose name says it, or the only one of
    rank 2. Raises InputError for a name that is no float output.
    """
    known = {o.name: o for o in pair.outputs}
    if name is not None:
        if name not in known:
            raise InputError(f"there is no float output {name!r}; there are {', '.join(known)}")
        return known[name], ""
    fit = [o for o in pair.outputs if o.rank in (2, 3) and (o.last is None or o.last >= 2)]
    over = [o for o in fit if o.rank == 3 and pair.vocabulary > 2 and o.last == pair.vocabulary]
    said = [o for o in fit if any(word in o.name.lower() for word in SCORE_WORDS)]
    flat = [o for o in fit if o.rank == 2]
    for found in (over, said, flat):
        if len(found) == 1:
            return found[0], ""
    if said or flat:
        names = ", ".join(o.name for o in said or flat)
        return None, f"which of {names} holds class scores cannot be seen; name one with --output"
    return None, "no output is seen to hold class scores; name one with --output"


def label_names(pair: Pair) -> tuple[str, ...]:
    """What labels may be called: not like an input."""
    taken = {v.name for v in pair.inputs}
    return tuple(n for n in LABELS if n not in taken)


def labelled(pair: Pair, scores: Output | None) -> list[Value]:
    """The inputs that data must give, and labels, which it may: of the shape of the scores without the last axis."""
    out = list(pair.inputs)
    graph = out[0].graph
    rank = max(1, (scores.rank or 2) - 1) if scores is not None else 1
    for name in label_names(pair):
        value = Value(name, TensorType(None, (None,) * rank), graph)
        value.payload = constant(0, INT64)  # as for an input that has a default, data need not give it
        out.append(value)
    return out


def _rows(feed: Mapping[str, Array]) -> int:
    """How many samples a batch holds: the first axis that all inputs share, else one."""
    sizes = {a.shape[0] for a in feed.values() if a.ndim}
    return sizes.pop() if len(sizes) == 1 else 1


def _classes(labels: Array, scores: Array) -> Array:
    if labels.dtype.kind not in "biu":
        raise InputError(f"labels are {labels.dtype}; they must be whole numbers, one class each")
    if labels.shape != scores.shape[:-1]:
        raise InputError(f"labels have shape {list(labels.shape)}, the class scores {list(scores.shape)}")
    if labels.size and int(labels.max()) >= scores.shape[-1]:
        raise InputError(f"label {int(labels.max())} is none of the {scores.shape[-1]} classes")
    return labels.astype(np.int64)
