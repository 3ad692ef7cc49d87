"""Quality of a compiled model against the float one: both run batch by batch on the same data, figures summed up.

What is kept does not grow with the samples. The figures and their formulas are those of :mod:`qcompiler.metrics`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qcompiler.api import Artifact
from qcompiler.backends import backend_for
from qcompiler.backends.base import Backend, Pair, PairSite, Progress, Silent
from qcompiler.calibrate.data import open_data
from qcompiler.calibrate.forms import WINDOWS, Encode
from qcompiler.calibrate.tokens import encoder_beside
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.metrics import Closeness
from qcompiler.readings import METRICS, Readings, labelled
from qcompiler.report.model import EXACT_DB

SCHEMA = 1
Batches: TypeAlias = Iterator[dict[str, Array]]


@dataclass(frozen=True)
class OutputFigures:
    """One output. ``cosine`` is the mean over samples, ``least_cosine`` that of the worst; a figure is None where it
    does not exist (an output holds NaN) or was not asked for; no error at all is EXACT_DB."""

    cosine: float | None
    least_cosine: float | None
    sqnr_db: float | None
    max_abs: float | None


@dataclass(frozen=True)
class TopOne:
    """Share of ``rows`` whose likeliest class is the same in both, and of ``labelled`` rows that each has right."""

    output: str
    agreement: float
    rows: int
    labelled: int = 0
    reference_accuracy: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class KL:
    """Nats from the reference's distribution to the compiled model's: mean and largest over ``rows``. ``of`` says
    whether the output holds logits, or probabilities already."""

    output: str
    mean_nats: float | None
    largest_nats: float | None
    rows: int
    of: str


@dataclass(frozen=True)
class Perplexities:
    """Of the next token, for both models, over ``tokens`` targets."""

    output: str
    reference: float | None
    compiled: float | None
    tokens: int
    reference_nats: float | None
    compiled_nats: float | None


@dataclass(frozen=True)
class SiteFigures:
    """One site: its signal to noise against ``tensor`` of the reference, or the reason why there is none."""

    name: str
    op: str
    tensor: str
    sqnr_db: float | None
    reason: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. ``left_out`` maps each metric that was not computed to the reason."""

    file: str
    reference: str
    data: str
    samples: int
    outputs: Mapping[str, OutputFigures] = field(default_factory=dict)
    top1: TopOne | None = None
    kl: KL | None = None
    perplexity: Perplexities | None = None
    sites: tuple[SiteFigures, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Schema 1: the fields as they are, metrics that were not computed absent."""
        found = asdict(self)
        for absent in ("top1", "kl", "perplexity"):
            if found[absent] is None:
                del found[absent]
        return {"schema": SCHEMA} | found


def evaluate(
    file: str | Path | Artifact,
    reference: Any,
    data: Any,
    *,
    metrics: Sequence[str] = (),
    per_site: bool = False,
    output: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the compiled ``file`` with the float model ``reference`` on ``data``.

    ``reference`` is an .onnx or .pt2 file, or any source that :func:`qcompiler.compile` takes for the runtime of
    ``file``; ``data`` what :func:`qcompiler.calibrate.data.open_data` takes, of which at most ``limit`` samples are
    used. An array called ``label`` or ``labels`` that is no input of the model holds the true classes (a number a
    sample; for language models one a token, negative ones not counted). ``metrics`` are among
    :data:`~qcompiler.readings.METRICS`; by default all that apply are computed. ``output`` names the one that holds
    class scores where that cannot be seen; ``per_site`` compares what each site computes. Raises InputError for what
    cannot be compared and for a metric that is asked for and does not apply.
    """
    if unknown := [m for m in metrics if m not in METRICS]:
        raise InputError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    told = progress or Silent()
    path = file.path if isinstance(file, Artifact) else Path(file)
    backend = backend_for(path)
    with ExitStack() as stack:
        told.stage("open the models")
        model, name = _float_model(backend, reference, told, stack)
        pair = stack.enter_context(closing(backend.paired(model, path, per_site=per_site)))
        if not pair.outputs:
            raise InputError(f"{path.name} shares no float output with the reference; there is nothing to compare")
        opened = open_data(data, encode=lambda: _encoder(reference, path), windows=WINDOWS if limit is None else limit)
        readings = Readings(pair, metrics, output)
        told.stage("compare")
        _walk(opened.batches(labelled(pair, readings.scores)), pair, readings, limit, told)
        if not readings.samples:
            raise InputError(f"{opened.label} holds no sample")
        return _summed(pair, readings, str(path), name, opened.label, backend.versions())


def _walk(batches: Batches, pair: Pair, readings: Readings, limit: int | None, told: Progress) -> None:
    """Run every batch, until ``limit`` samples are behind; the last batch is cut to fit."""
    for whole in batches:
        batch = _at_most(whole, None if limit is None else limit - readings.samples)
        feed = {n: a for n, a in batch.items() if n not in readings.label_names}
        want, got = pair.run(feed)
        readings.add(feed, next((batch[n] for n in readings.label_names if n in batch), None), want, got)
        if pair.sites:
            for i, a, b in pair.run_sites(feed):
                readings.add_site(i, a, b)
        told.advance(readings.samples, max(limit or 0, readings.samples), "samples")
        if limit is not None and readings.samples >= limit:
            return


def _at_most(batch: Mapping[str, Array], rows: int | None) -> Mapping[str, Array]:
    """The batch without the samples beyond ``rows``, where all its arrays hold the same number."""
    sizes = {a.shape[0] if a.ndim else 0 for a in batch.values()}
    if rows is None or len(sizes) != 1 or max(sizes) <= rows:
        return batch
    return {n: a[:rows] for n, a in batch.items()}


def _float_model(backend: Backend, reference: Any, told: Progress, stack: ExitStack) -> tuple[Path, str]:
    """The reference as a file of the runtime, and what to call it."""
    if isinstance(reference, Artifact):
        return reference.path, str(reference.path)
    captured = backend.capture(reference, None, None, told)
    stack.callback(captured.close)
    if captured.reference is not None:
        return captured.reference, captured.path or captured.kind
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-")))
    path = folder / f"model{backend.suffix}"
    backend.emit(captured.graph, path, {}, told)
    return path, captured.path or captured.kind


def _encoder(reference: Any, file: Path) -> Encode:
    """The tokenizer of the reference, else the one beside the compiled file."""
    try:
        return encoder_beside(reference)
    except InputError as first:
        try:
            return encoder_beside(file)
        except InputError:
            raise first from None


def _summed(
    pair: Pair, readings: Readings, file: str, reference: str, data: str, versions: Mapping[str, str]
) -> Evaluation:
    scores = readings.scores.name if readings.scores is not None else ""
    outputs = {name: _output(c, readings) for name, c in readings.closeness.items()}
    notes = list(pair.notes)
    if pair.left_out:
        notes.append(f"outputs that are no floats are not compared: {', '.join(pair.left_out)}")
    notes += [
        f"output {name} holds NaN or infinity, so figures of it do not exist"
        for name, c in readings.closeness.items()
        if c.max_abs is None
    ]
    top1 = kl = perplexity = None
    if (a := readings.agreement) is not None and a.share is not None:
        mine = a.accuracy or (None, None)
        top1 = TopOne(scores, a.share, a.rows, a.labelled, *mine)
    if (d := readings.divergence) is not None:
        kl = KL(scores, d.mean, d.most, d.rows, "probabilities" if d.probabilities else "logits")
    if readings.likelihoods is not None:
        a_, b_ = readings.likelihoods
        found = (a_.perplexity, b_.perplexity, a_.tokens, a_.nats_per_token, b_.nats_per_token)
        perplexity = Perplexities(scores, *found)
    sites = tuple(_site(s, c) for s, c in zip(pair.sites, readings.sites, strict=True))
    return Evaluation(
        file,
        reference,
        data,
        readings.samples,
        outputs,
        top1,
        kl,
        perplexity,
        sites,
        dict(readings.left_out),
        tuple(notes),
        dict(versions),
    )


def _output(c: Closeness, readings: Readings) -> OutputFigures:
    cosine, sqnr = readings.wants("cosine"), readings.wants("sqnr")
    return OutputFigures(
        c.cosine if cosine else None,
        c.least_cosine if cosine else None,
        _decibel(c.sqnr_db) if sqnr else None,
        c.max_abs,
    )


def _site(site: PairSite, c: Closeness) -> SiteFigures:
    reason = site.reason
    if not reason and not c.samples:
        reason = "its result has another shape than the reference's tensor"
    return SiteFigures(site.name, site.op, site.tensor, _decibel(c.sqnr_db), reason)


def _decibel(db: float | None) -> float | None:
    """JSON has no infinity."""
    return None if db is None else max(-EXACT_DB, min(EXACT_DB, db))
