"""The commands that measure: ``bench`` and ``eval``, what they read and what they print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli_options import JsonOpt, PhaseOpt
from qcompiler.cli_session import ACCEPTED, command, print_json, working
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qcompiler.benching import CaseTiming, Comparison
    from qcompiler.evaluating import Evaluation, SiteFigures

SITE_ROWS = 24
"""Of more sites than this the worst are shown."""


@command
def bench_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Models; the first is what others are held to.")],
    phase: PhaseOpt = [],  # noqa: B006  # typer reads defaults and copies them
    batch: Annotated[
        list[str], typer.Option("--batch", metavar="N,...", help="Sequences or samples in a batch; 1 by default.")
    ] = [],  # noqa: B006
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Turns that each file takes at each size; 10 by default.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", min=0.01, help="Take turns for so long at each size instead.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of the runtime; one a core by default.")
    ] = None,
    past: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens that key/value caches hold; 128 by default.")
    ] = None,
    dim: Annotated[
        list[str], typer.Option("--dim", metavar="NAME=N", help="Fix an open dimension of the inputs; repeatable.")
    ] = [],  # noqa: B006
    json: JsonOpt = False,
) -> int:
    """Time FILEs against the first of them: latency, rate, weight bandwidth, peak memory. Each lives in a process of
    its own; they take turns in random order, never two at once; a speedup is the median of the rounds' ratios."""
    from qcompiler.cli_values import parse_phases

    phases, batches, dims = parse_phases(phase), parse_batches(batch), parse_dims(dim)
    if rounds is not None and seconds is not None:
        raise InputError("--rounds and --seconds both say how long to measure; give one")
    with working(quiet=json) as progress:
        from qcompiler import benching

        found = benching.bench(
            files,
            phases=phases,
            batches=batches,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            past=benching.PAST if past is None else past,
            dims=dims,
            progress=progress,
        )
    if json:
        print_json(found.to_json())
    else:
        from qcompiler.report.terminal import show

        show(lambda width: bench_parts(found, width))
    return ACCEPTED


@command
def eval_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The compiled model.")],
    reference: Annotated[
        str,
        typer.Option(
            "--reference", metavar="FILE2", help="The float model: an .onnx or .pt2 file, or a SOURCE of 'compile'."
        ),
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help="An .npz, .npy, .jsonl or .txt file, or package.module:function."),
    ],
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric", metavar="M", help="ppl, kl, cosine, sqnr or top1; repeatable; all that apply by default."
        ),
    ] = [],  # noqa: B006
    per_site: Annotated[
        bool, typer.Option("--per-site", help="Compare what each linear and convolution computes.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(metavar="NAME", help="The output with class scores, where that cannot be seen.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use at most N samples.")] = None,
    json: JsonOpt = False,
) -> int:
    """Compare the outputs of FILE with those of the float model on DATA: cosine, signal to noise, likeliest class,
    Kullback-Leibler divergence, perplexity. An array 'label' or 'labels' in DATA holds true classes."""
    from qcompiler.cli_values import see_local_modules

    see_local_modules([reference, data])
    with working(quiet=json) as progress:
        from qcompiler import evaluating

        found = evaluating.evaluate(
            file, reference, data, metrics=metric, per_site=per_site, output=output, limit=limit, progress=progress
        )
    if json:
        print_json(found.to_json())
    else:
        from qcompiler.report.terminal import show

        show(lambda width: eval_parts(found, width))
    return ACCEPTED


def parse_batches(texts: Sequence[str]) -> tuple[int, ...]:
    """``1,8``, in one option or several; 1 where there is none."""
    out: list[int] = []
    for text in texts:
        for part in text.split(","):
            if not re.fullmatch(r"\d{1,6}", part.strip()) or int(part) < 1:
                raise InputError(f"--batch takes sizes of at least 1, such as 1,8, not {text!r}")
            out.append(int(part))
    return tuple(dict.fromkeys(out)) or (1,)


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """``NAME=N`` each."""
    out: dict[str, int] = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        if not name or not re.fullmatch(r"\d{1,9}", size) or int(size) < 1:
            raise InputError(f"--dim takes name=N with N of at least 1, such as height=224, not {text!r}")
        if name in out:
            raise InputError(f"--dim {name} is given twice; give it once")
        out[name] = int(size)
    return out


# -- what bench prints ---------------------------------------------------------------------------------------------


def bench_parts(found: Comparison, width: int) -> list[RenderableType]:
    from rich.text import Text

    from qcompiler.report.terminal import table
    from qcompiler.report.words import NONE, human_bytes, human_seconds

    names = _short_names([f.path for f in found.files])
    lines = [
        f"{name}: {human_bytes(f.file_bytes)}, reads {human_bytes(f.weight_bytes)} of weights a run, opens in "
        f"{human_seconds(f.load_s)}, peak memory {human_bytes(f.peak_bytes)} ({human_bytes(f.before_bytes)} before it)"
        for name, f in zip(names, found.files, strict=True)
    ]
    rows, cases = [], list(dict.fromkeys(t.case for f in found.files for t in f.timings))
    for case in cases:
        label = case.text
        for name, file in zip(names, found.files, strict=True):
            timing = next((t for t in file.timings if t.case == case), None)
            rows.append((label, name, *(_timing_cells(timing) if timing is not None else [NONE] * 5)))
            label = ""
    columns = ("size", "file", "median ms", "10-90 %", "rate", "weights/s", "speedup")
    parts: list[RenderableType] = [*map(Text, lines), Text("")]
    parts.append(table(columns, rows, width=width, right=columns[2:], keep=columns))
    s = found.settings
    often = f"{s['rounds']} rounds" if s["seconds"] is None else f"{s['seconds']:g} s a file and size"
    threads = "1 thread" if s["threads"] == 1 else f"{s['threads']} threads"
    parts.append(
        Text(f"\n{threads}, {often}; a speedup is over {names[0]}, the median of the rounds and their 10-90 %")
    )
    for why in dict.fromkeys(why for f in found.files for why in f.left_out):
        of = [name for name, f in zip(names, found.files, strict=True) if why in f.left_out]
        parts.append(Text(f"left out of {', '.join(of)}: {why}"))
    return parts + [Text(f"warning: {w}", style="yellow") for w in found.warnings]


def _timing_cells(t: CaseTiming) -> list[str]:
    from qcompiler.report.words import NONE

    ms = t.latency
    speedup = NONE if t.speedup is None else f"{t.speedup.median:.2f}x ({t.speedup.p10:.2f}-{t.speedup.p90:.2f})"
    return [
        f"{ms.median * 1e3:.3f}",
        f"{ms.p10 * 1e3:.3f}-{ms.p90 * 1e3:.3f}",
        f"{t.rate:,.1f} {t.case.unit}/s",
        f"{t.bandwidth / 1e9:.2f} GB/s",
        speedup,
    ]


def _short_names(paths: Sequence[str]) -> list[str]:
    """File names; with as much of their folders as tells them apart, numbered where even that does not."""
    for count in range(1, max(len(Path(p).parts) for p in paths) + 1):
        names = [str(Path(*Path(p).parts[-count:])) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{p} #{i}" for i, p in enumerate(paths, 1)]


# -- what eval prints ----------------------------------------------------------------------------------------------


def eval_parts(found: Evaluation, width: int) -> list[RenderableType]:
    from rich.text import Text

    from qcompiler.report.terminal import table
    from qcompiler.report.words import decibel_text, plural

    head = f"{found.file} against {found.reference} on {found.data}: {plural(found.samples, 'sample')}"
    parts: list[RenderableType] = [Text(head), Text("")]
    if found.outputs:
        rows = [
            (
                name,
                _figure(o.cosine, 6),
                _figure(o.least_cosine, 6),
                decibel_text(o.sqnr_db),
                _figure(o.max_abs, 4, "g"),
            )
            for name, o in found.outputs.items()
        ]
        columns = ("output", "cosine", "of the worst sample", "SQNR dB", "largest difference")
        parts += [table(columns, rows, width=width, right=columns[1:], keep=columns), Text("")]
    parts += map(Text, _score_lines(found))
    for why in dict.fromkeys(found.left_out.values()):
        parts.append(Text(f"not computed: {', '.join(m for m, w in found.left_out.items() if w == why)}: {why}"))
    parts += [Text(f"note: {note}") for note in found.notes]
    if found.sites:
        parts += [Text(""), *_site_parts(found.sites, width)]
    return parts


def _score_lines(found: Evaluation) -> list[str]:
    lines = []
    if (t := found.top1) is not None:
        lines.append(f"top-1: the reference's class in {t.agreement:.2%} of {t.rows} rows of output {t.output}")
        if t.accuracy is not None and t.reference_accuracy is not None:
            lines.append(f"accuracy: {t.accuracy:.2%} (reference {t.reference_accuracy:.2%}) of {t.labelled} labels")
    if (k := found.kl) is not None:
        mean, most = _figure(k.mean_nats, 4, "g"), _figure(k.largest_nats, 4, "g")
        lines.append(
            f"KL divergence: {mean} nats a row, {most} at most, over {k.rows} rows of {k.of} in output {k.output}"
        )
    if (p := found.perplexity) is not None:
        compiled, reference = _figure(p.compiled, 4), _figure(p.reference, 4)
        lines.append(f"perplexity: {compiled} (reference {reference}) over {p.tokens} tokens")
    return lines


def _site_parts(sites: Sequence[SiteFigures], width: int) -> list[RenderableType]:
    """The sites, worst first when there are many, then those that have no figure and why."""
    from rich.text import Text

    from qcompiler.report.terminal import table
    from qcompiler.report.words import decibel_text, plural

    seen = [s for s in sites if s.sqnr_db is not None]
    shown = seen if len(seen) <= SITE_ROWS else sorted(seen, key=lambda s: s.sqnr_db or 0.0)[:SITE_ROWS]
    rows = [(s.name, s.op, s.tensor, decibel_text(s.sqnr_db)) for s in shown]
    columns = ("site", "op", "tensor of the reference", "SQNR dB")
    parts: list[RenderableType] = [table(columns, rows, width=width, right=("SQNR dB",), keep=columns)]
    if len(shown) < len(seen):
        parts.append(Text(f"... and {plural(len(seen) - len(shown), 'better site')}; --json lists every site"))
    return parts + [Text(f"no figure for {s.name}: {s.reason}") for s in sites if s.sqnr_db is None]


def _figure(value: float | None, digits: int, kind: str = "f") -> str:
    return "-" if value is None else f"{value:.{digits}{kind}}"
