"""What a user writes down: a budget, a policy per stage, presets; and how it is read from and written to files."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)

from kvcompress import policies  # noqa: F401  (registers the built-in policies)
from kvcompress.config.budget import Budget
from kvcompress.config.combination import Combination, check_combination
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError, shown
from kvcompress.files import read_structure, write_text
from kvcompress.markup import size, table
from kvcompress.policies.base import Evictor, Merger, Quantizer, Reducer, Scorer
from kvcompress.policies.configured import Configured
from kvcompress.policies.registry import (
    ALLOCATORS,
    EVICTORS,
    MERGERS,
    QUANTIZERS,
    REDUCERS,
    SCORERS,
    AllocatorField,
    unknown_name,
)

BudgetField = Annotated[Budget, BeforeValidator(Budget.parse)]
_Scorer = Annotated[Scorer | None, BeforeValidator(SCORERS.parse), PlainSerializer(SCORERS.dump)]
_Evictor = Annotated[Evictor | None, BeforeValidator(EVICTORS.parse), PlainSerializer(EVICTORS.dump)]
_Merger = Annotated[Merger | None, BeforeValidator(MERGERS.parse), PlainSerializer(MERGERS.dump)]
_Quantizer = Annotated[Quantizer | None, BeforeValidator(QUANTIZERS.parse), PlainSerializer(QUANTIZERS.dump)]
_Reducer = Annotated[Reducer | None, BeforeValidator(REDUCERS.parse), PlainSerializer(REDUCERS.dump)]


class CompressionConfig(Configured):
    """A budget and a policy per stage; every field takes a name, a dict with `name`, or an object.

    Args:
        budget: what the cache may hold.
        scorer: gives tokens their importance.
        allocator: splits the budget over layers.
        evictor: selects the tokens that stay; None keeps everything and needs the budget 1.0.
        merger: folds evicted tokens into kept ones.
        quantizer: stores tokens in fewer bits.
        reducer: shrinks hidden states in prefill.

    Raises:
        ConfigError: for a wrong field, value, name or combination, before any model is touched.

    Example:
        >>> from kvcompress import CompressionConfig
        >>> config = CompressionConfig(budget=0.2, scorer="attention", allocator="prefix")
        >>> config.evictor.decode
        'fixed_point'
        >>> CompressionConfig(**config.model_dump()) == config
        True
    """

    budget: BudgetField = Budget(fraction=0.2)
    scorer: _Scorer = None
    allocator: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("uniform"))
    evictor: _Evictor = Field(default_factory=lambda: EVICTORS.create("topk"))
    merger: _Merger = None
    quantizer: _Quantizer = None
    reducer: _Reducer = None

    @model_validator(mode="after")
    def _combination(self) -> CompressionConfig:
        check_combination(
            Combination(self.budget, self.scorer, self.allocator, self.evictor, self.merger, self.quantizer)
        )
        return self

    def _repr_html_(self) -> str:
        """What notebooks show: a row for each stage."""
        budget = self.budget
        if budget.fraction is not None:
            amount = f"{budget.fraction:.4g} of the tokens seen"
        else:
            amount = (
                f"{budget.tokens:,} tokens per layer" if budget.tokens is not None else size(int(budget.bytes or 0))
            )
        rows = {"budget": f"{amount}; {budget.sink} first and {budget.recent} last tokens are kept in any case"}
        for stage in ("scorer", "allocator", "evictor", "merger", "quantizer", "reducer"):
            policy = getattr(self, stage)
            rows[stage] = "none" if policy is None else f"{policy.name} ({policy})".replace(" ()", "")
        return table("CompressionConfig", rows)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> CompressionConfig:
        """A named configuration, any field of which can be overridden.

        Args:
            name: one of `PRESETS`.
            **overrides: fields; a bare budget keeps the preset's sinks and recents.

        Raises:
            UnknownPolicyError: if there is no such preset.
            ConfigError: if an override does not fit.
        """
        if name not in PRESETS:
            raise unknown_name("config", "preset", name, PRESETS)
        return cls(**PRESETS[name][1]).override(**overrides)

    @property
    def reads_modality(self) -> bool:
        """Whether one of the policies treats image tokens otherwise than text."""
        chosen = (self.scorer, self.allocator, self.evictor, self.merger, self.reducer)
        return any(policy is not None and policy.reads_modality for policy in chosen)

    def override(self, **overrides: Any) -> CompressionConfig:
        """A copy with some fields replaced, validated anew; a bare budget keeps sinks and recents."""
        if "budget" in overrides:
            overrides["budget"] = Budget.parse(overrides["budget"], default=self.budget)
        return type(self)(**{**self.model_dump(), **overrides})

    @classmethod
    def read(cls, given: object, **overrides: Any) -> CompressionConfig:
        """Reads what a user may pass as a configuration: a preset's name, a path, a dict or an object."""
        if isinstance(given, cls):
            return given.override(**overrides) if overrides else given
        if isinstance(given, dict):
            return cls(**given).override(**overrides)
        if isinstance(given, PathLike) or (isinstance(given, str) and Path(given).suffix in _FORMATS):
            return cls.load(given).override(**overrides)
        if isinstance(given, str):
            return cls.preset(given, **overrides)
        raise ConfigError(
            f"config: must be a preset's name ({', '.join(PRESETS)}), a .yaml or .json path, a dict or a "
            f"CompressionConfig; got {shown(given)}"
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CompressionConfig:
        """Reads a .yaml, .yml or .json file.

        Raises:
            ConfigError: if the file cannot be read or parsed, or does not describe a valid configuration.
        """
        path = _format_of(path)
        fields = read_structure(path, "config")
        if not isinstance(fields, dict):
            raise ConfigError(f"config {path}: must hold a mapping of fields ({', '.join(cls.model_fields)})")
        try:
            return cls(**fields)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"config {path}: {error}") from None

    def dump(self, path: str | PathLike[str]) -> None:
        """Writes the exact inverse of `load` to a .yaml, .yml or .json file, whole or not at all.

        Raises:
            ConfigError: if it cannot be written; a file that was there is then what it was.
        """
        path, fields = _format_of(path), self.model_dump(mode="json")
        text = (
            json.dumps(fields, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
        )
        write_text(path, text, "config")


_FORMATS = (".yaml", ".yml", ".json")


def _format_of(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ConfigError(f"config {path}: the file name must end in one of {', '.join(_FORMATS)}")
    return path
