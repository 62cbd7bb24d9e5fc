"""The command line, one file a command."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvcompress import __version__
from kvcompress.cli.console import print_error
from kvcompress.cli.usage import WRONG_USAGE, report_usage
from kvcompress.errors import did_you_mean

# In the order of --help: the module, its function and its epilog. Imported when they run, since most need torch.
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


_UsageError: Any = typer.BadParameter.__mro__[1]  # typer hands out its subclasses alone


class _Commands(TyperGroup):
    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command; what is wrong with its words is said as other errors are."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except _UsageError as error:
            report_usage(error, as_json="--json" in (sys.argv[1:] if args is None else args))
            code = WRONG_USAGE
        except typer.Abort:  # the input ended where something was asked
            print_error("aborted")
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What --help lists: the name and the docstring, read from the source, since importing takes seconds."""
        if cmd_name not in _COMMANDS:
            return None
        return TyperCommand(cmd_name, help=_documentation(*_COMMANDS[cmd_name][:2]), rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that runs."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command '{args[0]}'{did_you_mean(args[0], _COMMANDS)}")
        given, stand_in, rest = super().resolve_command(ctx, args)
        return given, None if stand_in is None else _imported(str(stand_in.name)), rest


def _imported(name: str) -> Any:
    file, function, epilog = _COMMANDS[name]
    module = importlib.import_module(f"kvcompress.cli.{file}")
    one = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    one.command(name, epilog=getattr(module, epilog))(getattr(module, function))
    return typer.main.get_command(one)


def _documentation(file: str, function: str) -> str:
    source = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function)
    return ast.get_docstring(found) or ""


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

kvcompress generate --prompt-file report.txt --prompt "Sum this up." --budget 0.2 --compare

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
