"""`kvcompress policies`: what there is to choose from."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvcompress.cli.configuration import import_modules
from kvcompress.cli.console import output, print_json, reported
from kvcompress.cli.docstrings import documentation_of
from kvcompress.cli.options import AsJson, Debug, Modules
from kvcompress.config.presets import PRESETS
from kvcompress.errors import did_you_mean
from kvcompress.policies.base import Policy
from kvcompress.policies.registry import REGISTRIES

EPILOG = """
[bold]Examples[/bold]

kvcompress policies

kvcompress policies allocator

kvcompress policies --all

kvcompress policies presets --json

kvcompress policies --import my_policies.py
"""

_STAGES = [registry.stage for registry in REGISTRIES]
_MEANINGS = {registry.stage: documentation_of(registry.contract).summary for registry in REGISTRIES}
_WITH_ARTICLE = {"allocator": "an allocator", "evictor": "an evictor"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def policies(
    stage: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(_STAGES)}, presets; all if left out.", show_default=False)
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Parameters, defaults and papers of every stage.")] = False,
    modules: Modules = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Lists the policies and presets; of one stage, or with --all, their parameters, defaults and papers too."""
    with reported(as_json=as_json, debug=debug):
        import_modules(modules or [])
        chosen = _section(stage)
        content: dict[str, Any] = {}
        for registry in REGISTRIES:
            if chosen in (None, registry.stage):
                content[registry.stage] = [describe(registry.get(name)) for name in registry.names()]
        if chosen in (None, "presets"):
            content["presets"] = [
                {"name": name, "summary": summary, "fields": fields} for name, (summary, fields) in PRESETS.items()
            ]
        if as_json:
            print_json(content)
        elif whole or chosen is not None:
            _show(output(), content)
        else:
            _show_names(output(), content)


def describe(policy: type[Policy]) -> dict[str, Any]:
    """A policy's name, summary, source, module and parameters, ready for JSON."""
    told = documentation_of(policy)
    fields = policy.model_fields
    parameters = [_parameter(name, field, told.arguments.get(name, "")) for name, field in fields.items()]
    # A policy may take more than its fields: short ways to set them, which its docstring explains.
    shorthands = [
        {"name": name, "type": None, "default": None, "required": False, "meaning": meaning}
        for name, meaning in told.arguments.items()
        if name not in fields
    ]
    return {
        "name": policy.name,
        "summary": told.summary,
        "source": told.source,
        "defined_in": f"{policy.__module__}.{policy.__qualname__}",
        "parameters": parameters + shorthands,
    }


def _section(stage: str | None) -> str | None:
    if stage is None:
        return None
    spellings = {spelling: name for name in [*_STAGES, "presets"] for spelling in (name, f"{name.rstrip('s')}s")}
    spellings["preset"] = "presets"
    if stage in spellings:
        return spellings[stage]
    allowed = ", ".join(dict.fromkeys(spellings.values()))
    sections = [registry.stage for registry in REGISTRIES if stage in registry.names()]
    sections += ["presets"] if stage in PRESETS else []
    hint = did_you_mean(stage, spellings)
    if sections:
        kinds = " and ".join(_WITH_ARTICLE.get(name, f"a {name.rstrip('s')}") for name in sections)
        told = " and ".join(f"'kvcompress policies {name}'" for name in sections)
        hint = f"; it is the name of {kinds}, which {told} {'shows' if len(sections) == 1 else 'show'}"
    raise typer.BadParameter(f"'{stage}' is none of {allowed}{hint}", param_hint="STAGE")


def _parameter(name: str, field: FieldInfo, meaning: str) -> dict[str, Any]:
    required = field.is_required()
    default: Any = None if required else field.get_default(call_default_factory=True)
    if default is not None and not isinstance(default, (bool, int, float, str, list, dict)):
        default = str(default)
    return {
        "name": name,
        "type": f"{_type_name(field.annotation)} {_bounds(field.metadata)}".strip(),
        "default": default,
        "required": required,
        "meaning": meaning or field.description or "",
    }


def _bounds(metadata: Iterable[Any]) -> str:
    limits = [limit for given in metadata for limit in (given.metadata if isinstance(given, FieldInfo) else [given])]
    found = [f"{symbol} {getattr(limit, name, None)}" for limit in limits for name, symbol in _BOUNDS.items()]
    return ", ".join(text for text in found if not text.endswith("None"))


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is Annotated:
        return f"{_type_name(arguments[0])} {_bounds(arguments[1:])}".strip()
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "none"
    return annotation.__name__ if isinstance(annotation, type) and not arguments else str(annotation)


def _show(console: Console, content: dict[str, Any]) -> None:
    for section, entries in content.items():
        console.print(Text.assemble((section, "bold cyan"), "  ", (_MEANINGS.get(section, ""), "italic")))
        for entry in entries:
            console.print(Padding(_entry(entry), (0, 0, 0, 2)))
        if not entries:
            console.print("  (none)")
        console.print()


def _show_names(console: Console, content: dict[str, Any]) -> None:
    for section, entries in content.items():
        console.print(Text.assemble((section, "bold cyan"), "  ", (_MEANINGS.get(section, ""), "italic")))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=21, no_wrap=True)
        grid.add_column()
        for entry in entries:
            grid.add_row(Text(entry["name"], style="bold"), Text(entry["summary"]))
        console.print(Padding(grid if entries else Text("(none)"), (0, 0, 1, 2)))
    console.print("Parameters, defaults and papers: kvcompress policies STAGE, or --all")


def _entry(entry: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=10, no_wrap=True)
    grid.add_column()
    grid.add_row(Text(entry["name"], style="bold"), Text(entry["summary"]))
    for parameter in entry.get("parameters", ()):
        grid.add_row("", _parameter_line(parameter))
    for name, value in entry.get("fields", {}).items():
        grid.add_row("", Text(f"{name}: {_plain(value)}", style="dim"))
    if entry.get("source"):
        grid.add_row("", Text(f"Source: {entry['source']}", style="dim"))
    return grid


def _parameter_line(parameter: dict[str, Any]) -> Text:
    line = Text(parameter["name"], style="green")
    if parameter["type"] is not None:
        line.append(" (required)" if parameter["required"] else f" = {_plain(parameter['default'])}", style="default")
        line.append(f" [{parameter['type']}]", style="dim")
    if parameter["meaning"]:
        line.append(f"  {parameter['meaning']}", style="default")
    return line


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    return "none" if value is None else str(value)
