"""What is said about wrong usage, in a line like that of any other error, or in JSON."""

from __future__ import annotations

import re
from typing import Any

from kvcompress.cli.console import print_error, print_json
from kvcompress.errors import did_you_mean, in_plain_words

WRONG_USAGE = 2  # what shells expect of a program that was called wrongly
_VALUE = re.compile(r"Invalid value(?: for (?P<quote>'?)(?P<option>.+?)(?P=quote))?: ")


def report_usage(error: Any, *, as_json: bool) -> None:
    """Says what is wrong with the words of a command.

    Args:
        error: typer's exception; which class that is depends on its version.
        as_json: whether stdout is to hold JSON.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # which has shown the help
        return
    message = usage_message(error)
    if as_json:
        print_json({"error": {"type": "UsageError", "message": message}})
    else:
        print_error(message)


def usage_message(error: Any) -> str:
    """One line: the option or argument, what is wrong with it, and the nearest name, or where all names are."""
    near = getattr(error, "possibilities", None)
    if near:
        said = f"{error.message}{did_you_mean(error.option_name, near)}"
    else:
        said = str(error.format_message()).rstrip(".")
    value = _VALUE.match(said)
    if value is not None:  # what is wrong with a value says by itself what is allowed
        option = "" if value["option"] is None else f"{value['option']}: "
        return f"{option}{in_plain_words(said[value.end() :])}"
    context = getattr(error, "ctx", None)
    command = "kvcompress" if context is None else context.command_path
    return f"{said[0].lower()}{said[1:]}{'' if said.endswith('?') else ';'} '{command} --help' shows what there is"
