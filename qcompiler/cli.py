"""The command line: ``qcompiler COMMAND``. What a command needs is imported when it runs, so help comes at once."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli_measure import bench_command, eval_command
from qcompiler.cli_options import JsonOpt, PhaseOpt, RecipeOpt, SetOpt, SkipOpt, SourceArg, TargetOpt
from qcompiler.cli_session import ACCEPTED, FAULT, INTERRUPTED, REJECTED, command, complain, print_json, working
from qcompiler.errors import InputError, RejectedError

if TYPE_CHECKING:
    from qcompiler.report.model import Report

app = typer.Typer(
    name="qcompiler",
    help="Compile a model to fused low-bit kernels, and refuse what would run unfused.",
    epilog="Exit status: 0 accepted, 1 rejected, 2 the request or the input is at fault, 3 an internal error.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        import qcompiler

        typer.echo(f"qcompiler {qcompiler.__version__}")
        raise typer.Exit(ACCEPTED)


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("compile", short_help="Quantize, fuse, verify and write an artifact.")
@command
def compile_command(
    source: SourceArg,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The artifact to write.")],
    target: TargetOpt = "ort-cpu",
    recipe: RecipeOpt = "w4a16",
    calibration: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="An .npz, .npy, .jsonl or .txt file, or package.module:function."),
    ] = None,
    settings: SetOpt = [],  # noqa: B006  # typer reads defaults and copies them
    skip: SkipOpt = [],  # noqa: B006
    phase: PhaseOpt = [],  # noqa: B006
    max_ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Refuse when more memory than this would be needed, e.g. 12GiB.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the graph before and after each pass.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write the artifact even when it is rejected.")] = False,
    json: JsonOpt = False,
) -> int:
    """Quantize SOURCE, fuse it for the target, verify it, and write OUT and OUT.report.json."""
    from qcompiler.cli_values import check_out, parse_phases, parse_settings, parse_size, see_local_modules

    changes, phases = parse_settings(settings), parse_phases(phase)
    limit = None if max_ram is None else parse_size(max_ram)
    check_out(out, source)
    see_local_modules([source, calibration])
    try:
        with working(quiet=json) as progress:
            from qcompiler import api

            report = api.compile(
                source,
                target=target,
                recipe=recipe,
                calibration=calibration,
                out=out,
                settings=changes,
                skip=skip,
                phases=phases,
                max_ram=limit,
                check=check,
                force=force,
                progress=progress,
            ).report
    except RejectedError as error:
        if error.report is None:
            raise
        report = error.report
    return _finish(report, json)


@app.command(short_help="Judge any quantized model.")
@command
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An .onnx or .pt2 file, whoever made it.")],
    target: TargetOpt = "ort-cpu",
    phase: PhaseOpt = [],  # noqa: B006
    no_run: Annotated[bool, typer.Option("--no-run", help="Judge the graph alone; do not open it.")] = False,
    json: JsonOpt = False,
) -> int:
    """Judge any quantized model: is every quantized weight run by a kernel that does not expand it?"""
    from qcompiler.cli_values import parse_phases, see_local_modules

    phases = parse_phases(phase)
    see_local_modules([file])
    with working(quiet=json) as progress:
        from qcompiler import api

        report = api.verify(file, target=target, phases=phases, run=not no_run, progress=progress)
    return _finish(report, json)


@app.command(short_help="Say what compiling would do.")
@command
def plan(
    source: SourceArg,
    target: TargetOpt = "ort-cpu",
    recipe: RecipeOpt = "w4a16",
    tp: Annotated[int | None, typer.Option(metavar="N", min=1, help="Check the alignment of N shards.")] = None,
    settings: SetOpt = [],  # noqa: B006
    skip: SkipOpt = [],  # noqa: B006
    phase: PhaseOpt = [],  # noqa: B006
    json: JsonOpt = False,
) -> int:
    """Say what compiling would do, before any weight is read: kernels, why others decline, bytes, peak memory."""
    from qcompiler.cli_values import parse_phases, parse_settings, see_local_modules

    changes, phases = parse_settings(settings), parse_phases(phase)
    see_local_modules([source])
    with working(quiet=json) as progress:
        from qcompiler import api

        found = api.plan(
            source,
            target=target,
            recipe=recipe,
            tp=tp,
            phases=phases,
            skip=skip,
            settings=changes,
            progress=progress,
        )
    if json:
        print_json(found.to_json())
    else:
        from qcompiler.cli_tables import print_plan

        print_plan(found)
    return ACCEPTED if found.accepted else REJECTED


@app.command(short_help="Show a graph and its sites.")
@command
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An .onnx or .pt2 file, or a .qir text.")],
    text: Annotated[bool, typer.Option("--text", help="Print the graph as text.")] = False,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="T", help="By default the CPU target of such files.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Write one page that needs nothing but itself.")
    ] = None,
    json: JsonOpt = False,
) -> int:
    """Show a graph: its inputs and outputs, its ops, its quantized sites and their bytes."""
    if json and text:
        raise InputError("--text and --json both take the standard output; choose one")
    with working(quiet=json):
        from qcompiler import api

        found = api.inspect(file, target=target)
    if html is not None:
        from qcompiler.cli_tables import write_page

        write_page(html, file, found)
    if json:
        print_json(found.to_json())
    elif text:
        sys.stdout.write(found.text())
    elif html is None:
        from qcompiler.cli_tables import print_inspection

        print_inspection(file, found)
    return ACCEPTED


@app.command("run", short_help="Run passes over a graph given as text.")
@command
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.qir", help="A graph as text; '-' reads standard input.")],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_TEXT", help="One line of passes.")],
    target: Annotated[str | None, typer.Option("--target", "-t", metavar="T", help="For passes that ask it.")] = None,
) -> int:
    """Run passes over a graph given as text, and print the graph that comes out."""
    given = sys.stdin.read() if str(file) == "-" else _read(file)
    with working(quiet=True):
        from qcompiler import api

        made = api.run_passes(given, recipe, target)
    sys.stdout.write(made)
    return ACCEPTED


app.command("bench", short_help="Time files against each other.")(bench_command)
app.command("eval", short_help="Measure quality against the float model.")(eval_command)


@app.command()
@command
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe as TOML.")] = None,
) -> int:
    """List the recipes, or print one."""
    from qcompiler import recipe as catalogue

    if name is not None:
        sys.stdout.write(catalogue.load(name).toml)
        return ACCEPTED
    names = catalogue.names()
    for each in names:
        print(f"{each:<{max(map(len, names))}}  {catalogue.load(each).description}".rstrip())
    return ACCEPTED


@app.command()
@command
def targets(json: JsonOpt = False) -> int:
    """List the targets, and whether they can run here."""
    from qcompiler import api
    from qcompiler.cli_tables import print_targets, target_json

    found = api.targets()
    if json:
        print_json([target_json(t) for t in found])
    else:
        print_targets(found)
    return ACCEPTED


@app.command(short_help="List the kernels of a target.")
@command
def kernels(
    target: TargetOpt = "ort-cpu",
    prove: Annotated[
        bool, typer.Option("--prove", help="Compile each kernel of torch-cuda and judge its code; no GPU is needed.")
    ] = False,
    json: JsonOpt = False,
) -> int:
    """List the kernels of a target: what each takes, in which phases, and what showed that it stays fused."""
    if prove:
        return _prove(target, json)
    from qcompiler import api
    from qcompiler.cli_tables import kernel_json, print_kernels

    rows = api.kernels(target)
    if json:
        print_json([kernel_json(r) for r in rows])
    else:
        print_kernels(rows)
    return ACCEPTED


def _prove(target: str, json: bool) -> int:
    """Prove the kernels of a target; rejected when one claim fails."""
    from qcompiler.cli_tables import print_proofs, proof_json

    with working(quiet=json) as progress:
        from qcompiler.backends.triton import families

        proofs = families.prove_target(target, progress)
    if json:
        print_json([proof_json(p) for p in proofs])
    else:
        print_proofs(proofs)
    return ACCEPTED if all(p.holds for p in proofs) else REJECTED


@app.command(short_help="Explain a finding code.")
@command
def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="A finding code, such as QC101.")]) -> int:
    """Explain a finding: what it is, why it costs, how to fix it, an example."""
    from qcompiler.verify.explain import explanation

    sys.stdout.write(explanation(code))
    return ACCEPTED


def _finish(report: Report, json: bool) -> int:
    """Print the report; the exit status that belongs to its verdict."""
    if json:
        sys.stdout.write(report.text())
    else:
        from qcompiler.report.terminal import print_report

        print_report(report)
    return ACCEPTED if report.accepted else REJECTED


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text; give a graph as 'qcompiler inspect FILE --text' prints it") from None


USAGE_FAULTS: type[Exception] = typer.BadParameter.__mro__[2]
"""The base of what typer raises for a wrong option or argument, whether it brings its own click or uses another."""


def status(arguments: list[str] | None = None) -> int:
    """Run the command line on ``arguments`` (those of the process by default) and return the exit status."""
    try:
        ended = app(arguments, prog_name="qcompiler", standalone_mode=False)
    except USAGE_FAULTS as fault:
        path = getattr(getattr(fault, "ctx", None), "command_path", "qcompiler")
        text = fault.format_message() if hasattr(fault, "format_message") else str(fault)
        complain(f"{text.rstrip('.')}; see '{path} --help'")
        return FAULT
    except typer.Abort:
        return INTERRUPTED
    return ended if isinstance(ended, int) else ACCEPTED


def main() -> None:
    """The console script: run, then leave with the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    sys.exit(status())
