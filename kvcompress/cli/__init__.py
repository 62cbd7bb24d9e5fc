"""The command line, one file a command."""

from __future__ import annotations

import importlib
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvcompress import __version__

# In the order of --help: the module, its function and its epilog. Imported when needed, since most need torch.
_COMMANDS = {
    "generate": ("generate", "generate", "EPILOG"),
    "chat": ("chat", "chat", "EPILOG"),
    "compress": ("documents", "compress", "COMPRESS_EPILOG"),
    "ask": ("documents", "ask", "ASK_EPILOG"),
    "caption": ("caption", "caption", "EPILOG"),
    "inspect": ("inspect", "inspect", "EPILOG"),
    "evaluate": ("evaluate", "evaluate", "EPILOG"),
    "ruler": ("ruler", "ruler", "EPILOG"),
    "tune": ("tune", "tune_command", "EPILOG"),
    "calibrate": ("calibrate", "calibrate_command", "EPILOG"),
    "bench": ("bench", "bench", "EPILOG"),
    "policies": ("policies", "policies", "EPILOG"),
    "demo": ("demo", "demo", "EPILOG"),
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        name, function, epilog = _COMMANDS[cmd_name]
        module = importlib.import_module(f"kvcompress.cli.{name}")
        one = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        one.command(cmd_name, epilog=getattr(module, epilog))(getattr(module, function))
        return typer.main.get_command(one)


app = typer.Typer(
    cls=_Commands,
    name="kvcompress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


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
