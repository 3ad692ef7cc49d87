"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

SourceArg = Annotated[
    str, typer.Argument(metavar="SOURCE", help="An .onnx or .pt2 file, a model directory, or package.module:function.")
]
TargetOpt = Annotated[str, typer.Option("--target", "-t", metavar="T", help="NAME or NAME:ARCH; see 'targets'.")]
RecipeOpt = Annotated[
    str, typer.Option("--recipe", "-r", metavar="R", help="A name from 'recipes', a .toml file, or one line of passes.")
]
PhaseOpt = Annotated[
    list[str], typer.Option("--phase", metavar="NAME=M", help="M rows reach a linear in this phase; repeatable.")
]
SetOpt = Annotated[
    list[str], typer.Option("--set", metavar="PASS.KEY=VALUE", help="Change one option of the recipe; repeatable.")
]
SkipOpt = Annotated[
    list[str], typer.Option("--skip", metavar="GLOB", help="Leave sites with such a name in float; repeatable.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output, and no progress.")]
