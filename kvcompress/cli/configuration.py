"""From options to a configuration: presets, files, budgets, single fields, and the user's own policies."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from kvcompress.config import CompressionConfig
from kvcompress.config.budget import Budget
from kvcompress.errors import BudgetError, ConfigError, shown
from kvcompress.files import check_output as check_file
from kvcompress.files import parse_yaml
from kvcompress.policies.base import Policy

_AMOUNTS = ("fraction", "tokens", "bytes")
_FILES = (".json", ".yaml", ".yml")
_BYTES = re.compile(r"\d+(\.\d+)?\s*([KMGTP]?i?B|%)", re.IGNORECASE)


def read_config(
    preset: str | None, file: Path | None, budget: str | None, settings: Sequence[str], default: str = "auto"
) -> CompressionConfig:
    """Builds the configuration that the options describe.

    Args:
        preset: a preset's name.
        file: a .yaml or .json file.
        budget: the bare amount, see `parse_budget`.
        settings: `field=value` or `field.parameter=value`, applied in order.
        default: the preset if neither it nor a file is given.

    Raises:
        ConfigError: if they describe none.
    """
    if preset is not None and file is not None:
        raise typer.BadParameter("give --preset or --config, not both")
    config = CompressionConfig.load(file) if file is not None else CompressionConfig.preset(preset or default)
    if budget is not None:
        config = config.override(budget=parse_budget(budget))
    if not settings:
        return config
    fields = _fields(config)
    for setting in settings:
        path, separator, value = setting.partition("=")
        if not (separator and path):
            raise typer.BadParameter(f"'{setting}': must be field=value, as in scorer.window=32", param_hint="--set")
        _assign(fields, path.split("."), _parsed(setting, value))
    return CompressionConfig(**fields)


def parse_budget(text: str) -> float | int | str:
    """Reads a bare budget.

    Args:
        text: with a dot or in percent a fraction ("0.2", "20%"), a whole number of tokens per layer ("512"), or bytes
            ("64MiB").

    Raises:
        BudgetError: if it is none of these.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if _BYTES.fullmatch(text.strip()) is None:
        raise BudgetError(
            f"budget: must be a fraction with a dot (0.2) or in percent (20%), a number of tokens per layer (512) or "
            f"bytes (64MiB); got '{text}'"
        )
    return text.strip()


def check_output(path: Path, *, overwrite: bool) -> None:
    """Finds out before the work whether a .json, .yaml or .yml file can be written after it; makes its folder.

    Args:
        path: the file.
        overwrite: whether it may exist.

    Raises:
        ConfigError: if its name or place does not allow that, or it exists and may not.
    """
    if path.suffix not in _FILES:
        raise ConfigError(f"output {path}: the file name must end in one of {', '.join(_FILES)}")
    check_file(path, overwrite=overwrite)


def import_modules(names: Sequence[str]) -> None:
    """Imports modules, so that the policies they decorate are registered.

    Args:
        names: modules (also in the current folder) or paths of .py files.

    Raises:
        ConfigError: if one cannot be imported.
    """
    for name in names:
        try:
            with _current_folder_importable():
                if name.endswith(".py"):
                    _import_file(Path(name))
                else:
                    importlib.import_module(name)
        except ConfigError as error:
            raise ConfigError(f"import '{name}': {error}") from error
        except (Exception, SystemExit) as error:  # somebody else's code: whatever it raises
            raise ConfigError(f"import '{name}': cannot be imported: {type(error).__name__}: {error}") from error


def _fields(config: CompressionConfig) -> dict[str, Any]:
    """What a configuration says, as a user would write it."""
    if config.auto:
        return {"auto": True, **config.given}
    return {name: _given(getattr(config, name)) for name in CompressionConfig.model_fields if name != "auto"}


def _given(value: Any) -> Any:
    """A field as a user would write it: parameters at their defaults stay out, so that short ways may set them."""
    if isinstance(value, Policy):
        return {"name": value.name, **value.model_dump(exclude_defaults=True)}
    return None if value is None else value.model_dump(exclude_none=True)


def _assign(fields: dict[str, Any], path: list[str], value: Any) -> None:
    name, *inner = path
    if fields.get("auto") is True and name in CompressionConfig.model_fields:
        if name == "budget" and not inner:  # sinks and recents are the chosen preset's, unless they were given
            kept = {key: kept for key, kept in fields.get(name, {}).items() if key not in _AMOUNTS}
            fields[name] = kept | Budget.parse(value).given
            return
        if name == "budget":
            fields.setdefault(name, CompressionConfig.model_fields[name].default.given)
        elif inner and name not in fields:
            raise ConfigError(
                f"{'.'.join(path)}: the preset auto chooses the {name} once it sees the prompt; set one first with "
                f"--set {name}=NAME ('kvcompress policies {name}' lists them), or name another --preset"
            )
    if not inner or name not in fields:
        # A bare budget keeps sinks and recents; an unknown name gets the configuration's own error.
        fields[name] = _given(Budget.parse(value, Budget(**fields[name]))) if name == "budget" else value
        return
    if fields[name] is None or fields[name] == "none":
        raise ConfigError(
            f"{'.'.join(path)}: {name} is none; choose a policy first with --set {name}=NAME "
            f"('kvcompress policies {name}' lists them)"
        )
    holder = fields[name] if isinstance(fields[name], dict) else {"name": fields[name]}
    if name == "budget" and inner[0] in _AMOUNTS:
        holder = {key: kept for key, kept in holder.items() if key not in _AMOUNTS}
    for part in reversed(inner[1:]):
        value = {part: value}
    fields[name] = {**holder, inner[0]: value}


def _parsed(setting: str, value: str) -> Any:
    try:
        return parse_yaml(value, f"{shown(setting)}: the value")
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None


def _import_file(path: Path) -> None:
    path = path.expanduser().resolve()
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError("is no Python file")
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return
        raise ConfigError(f"another module is called '{path.stem}' already; rename the file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
