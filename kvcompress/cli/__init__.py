"""The command line, one file a command."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from kvcompress import __version__
from kvcompress.cli import bench, calibrate, demo, evaluate, generate, inspect, policies, tune

app = typer.Typer(
    name="kvcompress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command(epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("tune", epilog=tune.EPILOG)(tune.tune_command)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate_command)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=policies.EPILOG)(policies.policies)
app.command(epilog=demo.EPILOG)(demo.demo)


def main() -> None:
    """Runs the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    app()


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"kvcompress {__version__}")
        raise typer.Exit
    return wanted


@app.callback(
    epilog="""
[bold]Start here[/bold]

kvcompress demo

kvcompress generate --prompt "Why is the sky blue?" --budget 0.2 --compare

kvcompress policies

Exit codes: 0 done, 1 an error of kvcompress, 2 wrong usage, 130 interrupted.
"""
)
def _kvcompress(
    version: Annotated[
        bool, typer.Option("--version", help="Shows the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Compress the key-value cache of LLaVA and LLaMA models, and see what it saves and costs."""


__all__ = ["app", "main"]
