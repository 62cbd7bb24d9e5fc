"""What a policy's docstring says, taken apart: summary, source, and the meaning of each parameter."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_ARGUMENT = re.compile(r"(?P<name>\w+)(?: \([^)]*\))?: (?P<meaning>.*)")
_SOURCE = "Source:"
_NEXT = re.compile(r"\*Deviates:\*|(Args|Attributes|Returns|Raises|Example):$")


@dataclass(frozen=True)
class Documentation:
    """Parts of a docstring in google style.

    Attributes:
        summary: its first paragraph, on one line.
        source: from "Source:", without that word, to the next part; a line for each paragraph and each item of a list.
            Empty if there is none.
        arguments: meaning of each name in the section "Args:".
    """

    summary: str = ""
    source: str = ""
    arguments: dict[str, str] = field(default_factory=dict)


def documentation_of(described: type) -> Documentation:
    """Reads a class's own docstring; an inherited one says nothing about it."""
    text = described.__dict__.get("__doc__")
    if not text:
        return Documentation()
    lines = inspect.cleandoc(text).splitlines()
    return Documentation(_paragraphs(lines)[0], _source(lines), _arguments(lines))


def _source(lines: list[str]) -> str:
    start = next((number for number, line in enumerate(lines) if line.startswith(_SOURCE)), None)
    if start is None:
        return ""
    end = next((number for number, line in enumerate(lines) if number > start and _NEXT.match(line)), len(lines))
    return "\n".join(_paragraphs(lines[start:end])).removeprefix(_SOURCE).strip()


def _paragraphs(lines: list[str]) -> list[str]:
    """Each on one line; an item of a list is one of its own."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or line.startswith("- "):
            parts.append([])
        parts[-1].append(line.strip())
    return [text for part in parts if (text := " ".join(part).strip())]


def _arguments(lines: list[str]) -> dict[str, str]:
    """Entries of the section "Args:": indented once, their continuations more than once."""
    if "Args:" not in lines:
        return {}
    arguments: dict[str, str] = {}
    name, indent = "", 0
    for line in lines[lines.index("Args:") + 1 :]:
        text = line.strip()
        if not text:
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = indent or depth
        entry = _ARGUMENT.fullmatch(text) if depth == indent else None
        if entry is not None:
            name = entry["name"]
            arguments[name] = entry["meaning"]
        elif name:
            arguments[name] += f" {text}"
    return arguments
