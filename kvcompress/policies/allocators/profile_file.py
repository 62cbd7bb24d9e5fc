"""What a file says of the retention of layers, or of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.errors import ConfigError
from kvcompress.files import read_structure


def fields_in(path: Path) -> dict[str, Any]:
    """What a file says of retention; the fields' own checks follow."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"path: a profile is a .json, .yaml or .yml file; got '{path}'")
    held = read_structure(path, "path: the profile")
    model = heads = None
    if isinstance(held, dict):
        model = held.get("model") if "budgets" in held else None  # in files of users it means whatever they like
        heads = held.get("heads") if "budgets" in held else None
        held = held.get("retention")
    if not isinstance(held, list):
        raise ConfigError(f"path: the profile {path} must hold a list, or a mapping with the list 'retention'")
    several = bool(held) and isinstance(held[0], list)
    known = {} if model is None else {"model": model}
    return {"retentions" if several else "retention": held, **known, **({} if heads is None else {"heads": heads})}
