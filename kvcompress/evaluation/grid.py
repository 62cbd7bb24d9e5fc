"""Which caches are compared: every configuration at every budget, after the full cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from kvcompress.config import CompressionConfig
from kvcompress.errors import ConfigError

FULL_CACHE = "full cache"
Configurations = Iterable[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cache of a grid.

    Attributes:
        policy: its name: a preset's, a file's, or the user's own.
        config: how the cache is compressed; None for transformers' own, which keeps everything.
    """

    policy: str
    config: CompressionConfig | None

    @property
    def budget(self) -> float | int:
        """The bare amount: of tokens seen, of tokens per layer, or of bytes."""
        return 1.0 if self.config is None else _amount(self.config)[1]

    @property
    def unit(self) -> str:
        """What the budget counts: "fraction", "tokens" or "bytes"."""
        return "fraction" if self.config is None else _amount(self.config)[0]

    @property
    def name(self) -> str:
        """Policy and budget; unique within a grid."""
        return self.policy if self.config is None else f"{self.policy} @ {self.unit} {self.budget}"


def cells_of(configs: Configurations, budgets: Sequence[float | int | str] = ()) -> list[Cell]:
    """The full cache, then every configuration at every budget.

    Args:
        configs: presets' names, paths, dicts or `CompressionConfig`s, or a mapping from names to these.
        budgets: bare amounts; each configuration's own if there are none. One that keeps every token by its policies
            (such as the presets full and kivi4) has its own budget alone.

    Raises:
        ConfigError: if a configuration cannot be read, or two have the same name.
    """
    named = configs.items() if isinstance(configs, Mapping) else [(_name_of(given), given) for given in configs]
    cells = [Cell(FULL_CACHE, None)]
    for name, given in named:
        config = CompressionConfig.read(given)
        own = not budgets or (config.evictor is None and config.budget.keeps_everything)
        chosen = [config] if own else [config.override(budget=budget) for budget in budgets]
        cells += [Cell(name, each) for each in chosen]
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"configs: '{twice}' is there twice; give each configuration a name and a budget of its own")
    return cells


def _name_of(given: Any) -> str:
    if isinstance(given, PathLike) or (isinstance(given, str) and Path(given).suffix in (".yaml", ".yml", ".json")):
        return Path(given).stem
    return given if isinstance(given, str) else "custom"


def _amount(config: CompressionConfig) -> tuple[str, float | int]:
    budget = config.budget
    for unit in ("fraction", "tokens"):
        value = getattr(budget, unit)
        if value is not None:
            return unit, value
    return "bytes", int(budget.bytes or 0)
