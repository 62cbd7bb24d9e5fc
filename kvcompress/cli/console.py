"""How commands speak: results on stdout, progress, warnings and errors on stderr, and the exit code."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from kvcompress.errors import BudgetWarning, KVCompressError

INTERRUPTED = 130  # what shells expect of a program that ended on Ctrl-C


def output() -> Console:
    """The console of results."""
    return Console(highlight=False)


def print_json(content: dict[str, Any]) -> None:
    """Writes one JSON object to stdout."""
    typer.echo(json.dumps(content, indent=2))


@contextmanager
def working(what: str, *, spins: bool = True) -> Iterator[Status]:
    """Says on stderr what is going on, where somebody watches.

    Args:
        what: what is going on.
        spins: whether a spinner says it and goes away in the end; if not, a line does.

    Yields:
        The spinner, to be changed or stopped early.
    """
    # The stream of now, by itself: what swaps sys.stderr for a while must not swallow the spinner.
    console = Console(file=sys.stderr)
    status = console.status(Text(what))
    if spins:
        status.start()
    elif console.is_terminal:
        console.print(Text(what))
    try:
        yield status
    finally:
        status.stop()


def warn(message: str) -> None:
    """Writes a line to stderr."""
    _line("warning: ", "yellow", message)


def print_error(message: str) -> None:
    """Writes a line to stderr that says what went wrong."""
    _line("error: ", "bold red", message)


def note(message: str) -> None:
    """Writes a line to stderr that says what is going on."""
    _line("", "", message)


@contextmanager
def reported(*, as_json: bool = False, debug: bool = False) -> Iterator[None]:
    """Turns what goes wrong inside into a line on stderr and an exit code.

    Args:
        as_json: whether stdout is to hold JSON, also about an error.
        debug: whether the traceback is shown too.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", BudgetWarning)
        try:
            yield
        except KVCompressError as error:
            if debug:
                traceback.print_exc()
            if as_json:
                print_json({"error": {"type": type(error).__name__, "message": str(error)}})
            else:
                print_error(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _line(label: str, style: str, message: str) -> None:
    text = Text.assemble((label, style), " ".join(message.split()))
    Console(file=sys.stderr).print(text, soft_wrap=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    warn(str(message))
