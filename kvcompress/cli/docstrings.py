"""What a policy's docstring says, taken apart: summary, source, and the meaning of each parameter."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_ARGUMENT = re.compile(r"(?P<name>\w+)(?: \([^)]*\))?: (?P<meaning>.*)")


@dataclass(frozen=True)
class Documentation:
    """Parts of a docstring in google style.

    Attributes:
        summary: its first paragraph, on one line.
        source: the paragraph that starts with "Source:", without that word; empty if there is none.
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
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]
    source = next((part.removeprefix("Source:").strip() for part in paragraphs if part.startswith("Source:")), "")
    return Documentation(paragraphs[0], source, _arguments(inspect.cleandoc(text).splitlines()))


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
