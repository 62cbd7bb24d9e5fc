"""What a user writes down: a budget, a policy per stage, presets; and how it is read from and written to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    model_serializer,
    model_validator,
)

from kvcompress import policies  # noqa: F401  (registers the built-in policies)
from kvcompress.config import auto as automatic
from kvcompress.config.budget import Budget
from kvcompress.config.combination import Combination, check_combination
from kvcompress.config.presets import PRESETS
from kvcompress.errors import ConfigError, shown
from kvcompress.files import path_of, read_structure, write_text
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

_NO_FIELDS = {
    "preset": "a preset is the second argument, CompressedCache(model, 'prefixkv'), or "
    "CompressionConfig.preset('prefixkv')",
    "config": "a configuration is the second argument, CompressedCache(model, config), or "
    "CompressionConfig.read(config)",
    "policy": "a policy goes by its stage, as in allocator='prefix'; a preset, which names one for each stage, is the "
    "second argument, CompressedCache(model, 'prefixkv')",
}


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
        auto: lets a cache choose what is not given, once it sees its first prompt (`for_prompt`); until then the
            fields are those for plain text. What is given goes before what is chosen.

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

    no_fields: ClassVar[Mapping[str, str]] = _NO_FIELDS

    budget: BudgetField = Budget(fraction=0.2)
    scorer: _Scorer = None
    allocator: AllocatorField = Field(default_factory=lambda: ALLOCATORS.create("uniform"))
    evictor: _Evictor = Field(default_factory=lambda: EVICTORS.create("topk"))
    merger: _Merger = None
    quantizer: _Quantizer = None
    reducer: _Reducer = None
    auto: bool = False
    _given: dict[str, Any] | None = PrivateAttr(None)  # beside `auto`, where that is set

    @model_validator(mode="after")
    def _combination(self) -> CompressionConfig:
        if self.auto:
            if self._given is None:  # pydantic may validate an object twice
                self._given = {name: self._plain(name) for name in self.model_fields_set if name != "auto"}
                chosen = [self.for_prompt(prompt).config for prompt in automatic.KINDS]  # refuses what goes with none
                self.__dict__.update(
                    {name: getattr(chosen[0], name) for name in type(self).model_fields if name != "auto"}
                )
            return self
        check_combination(
            Combination(self.budget, self.scorer, self.allocator, self.evictor, self.merger, self.quantizer)
        )
        return self

    @model_serializer(mode="wrap")
    def _plainly(self, as_usual: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What is given alone where the rest is chosen later; `auto` nowhere else."""
        fields = as_usual(self)
        is_auto = fields.pop("auto", self.auto)
        return {"auto": True, **self.given} if is_auto else fields

    @property
    def given(self) -> dict[str, Any]:
        """What was set by hand where the rest is chosen later, as plain values; empty for any other configuration."""
        return dict(self._given or {})

    def _plain(self, name: str) -> Any:
        if name == "budget":
            return self.budget.given
        policy = getattr(self, name)
        return None if policy is None else {"name": policy.name, **policy.model_dump(mode="json")}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The budget and what differs from the defaults; what is given alone where the rest is chosen later."""
        if self.auto:
            plain = {"auto": True, **self.given}
            return [(name, value if name == "budget" else getattr(self, name)) for name, value in plain.items()]
        changed = {name for name, _ in super().__repr_args__()}
        return [(name, getattr(self, name)) for name in type(self).model_fields if name in {"budget", *changed}]

    def for_prompt(self, prompt: automatic.Prompt) -> Chosen:
        """What `auto` makes of a prompt: the first preset for its kind that goes with what was given.

        Args:
            prompt: what is known of it.

        Raises:
            ConfigError: if none does; the reason is that of the first.
        """
        refused: ConfigError | None = None
        for candidate in automatic.candidates(prompt):
            fields = {**PRESETS[candidate.preset][1], **candidate.fields}
            amounts = dict.fromkeys(("fraction", "tokens", "bytes"))
            budget = Budget.parse(fields["budget"]).given
            given = self.given.get("budget", {})
            budget = ({**budget, **amounts} if amounts.keys() & given.keys() else budget) | given
            if prompt.is_short and (budget.get("fraction") or 1.0) < 1.0:
                budget.setdefault("whole", automatic.SHORT)
            try:
                config = CompressionConfig(**{**fields, **self.given, "budget": budget})
            except ConfigError as error:
                refused = refused or error
                continue
            return Chosen(candidate.preset, config, _reason(prompt, candidate, config, refused))
        assert refused is not None
        raise refused

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
            ConfigError: if the name is no text, or an override does not fit.
        """
        if not isinstance(name, str):
            raise ConfigError(f"preset: must be a name ({', '.join(PRESETS)}); got {shown(name)}")
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
        if "budget" in overrides and self.auto:  # sinks and recents are the chosen preset's, unless they were given
            known = self.given.get("budget", {})
            kept = {name: known[name] for name in ("sink", "recent") if name in known}
            overrides["budget"] = kept | Budget.parse(overrides["budget"]).given
        elif "budget" in overrides:
            overrides["budget"] = Budget.parse(overrides["budget"], default=self.budget)
        return type(self)(**{**self.model_dump(), **overrides})

    @classmethod
    def read(cls, given: object, **overrides: Any) -> CompressionConfig:
        """Reads what a user may pass as a configuration: a preset's name, a path, a dict or an object."""
        if isinstance(given, cls):
            return given.override(**overrides) if overrides else given
        if isinstance(given, dict):
            if not all(isinstance(key, str) for key in given):
                raise ConfigError(f"config: names of fields are texts; got {shown(list(given))}")
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
        if {"budgets", "retention"} <= fields.keys():
            raise ConfigError(
                f"config {path}: is a profile, as 'kvcompress calibrate' writes it; use it by --set allocator=profile "
                f"--set allocator.path={path}, in Python by CompressedCache(model, profile='{path}')"
            )
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


@dataclass(frozen=True)
class Chosen:
    """What `auto` chose.

    Attributes:
        preset: its name.
        config: the preset with what the user has set.
        reason: why, in words.
    """

    preset: str
    config: CompressionConfig
    reason: str

    def __str__(self) -> str:
        """The choice in words."""
        return f"auto chose {self.preset}: {self.reason}"

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"preset": self.preset, "config": self.config.model_dump(mode="json"), "reason": self.reason}

    @classmethod
    def from_plain(cls, fields: dict[str, Any]) -> Chosen:
        """The inverse of `plain`."""
        return cls(fields["preset"], CompressionConfig.read(fields["config"]), fields["reason"])


def _reason(
    prompt: automatic.Prompt, candidate: automatic.Candidate, config: CompressionConfig, refused: ConfigError | None
) -> str:
    parts = [f"{prompt}"]
    if config.budget.whole:
        parts.append(f"up to {config.budget.whole} are kept whole, which costs next to nothing")
    if candidate.because:
        parts.append(candidate.because)
    elif refused is not None:
        parts.append(f"the first choice does not go with what is set ({refused})")
    return "; ".join(parts)


_FORMATS = (".yaml", ".yml", ".json")


def _format_of(path: str | PathLike[str]) -> Path:
    path = path_of(path, "config")
    if path.suffix not in _FORMATS:
        raise ConfigError(f"config {path}: the file name must end in one of {', '.join(_FORMATS)}")
    return path
