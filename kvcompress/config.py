"""What a user writes down: a budget, a policy per stage, presets; and how it is read from and written to files."""

from __future__ import annotations

import json
import re
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    field_serializer,
    field_validator,
    model_validator,
)

from kvcompress import policies  # noqa: F401  (registers the built-in policies)
from kvcompress.errors import BudgetError, ConfigError
from kvcompress.registry import (
    ALLOCATORS,
    EVICTORS,
    MERGERS,
    QUANTIZERS,
    REDUCERS,
    SCORERS,
    AllocatorField,
    unknown_name,
)
from kvcompress.stages import Configured, Evictor, Merger, Quantizer, Reducer, Scorer
from kvcompress.statistics import STATISTICS


class Budget(Configured):
    """What the cache may hold: exactly one of `fraction`, `tokens` and `bytes`.

    Args:
        fraction: share of the tokens seen, over all layers together, in (0, 1]; the budget grows with the sequence.
        tokens: tokens per layer on average, at least 1.
        bytes: bytes of the whole cache's keys and values, split equally over the rows of a batch; a number or text
            such as "64MiB". Rows share rectangular buffers, so where an allocator gives the rows of a batch different
            layer sizes, the padding of the shorter ones comes on top; the report counts it.
        sink: first tokens of a row that every layer keeps.
        recent: last tokens of a row that every layer keeps.

    Raises:
        BudgetError: if none or several are given, or one is out of range.
    """

    fraction: float | None = None
    tokens: int | None = None
    bytes: ByteSize | None = None
    sink: int = Field(default=1, ge=0)
    recent: int = Field(default=1, ge=0)

    @field_validator("bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        if isinstance(value, str) and not re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmgtp]i?)?b\s*", value, re.IGNORECASE):
            raise BudgetError(
                f"budget: text must be bytes with a unit, such as '64MiB'; got {value!r}. A fraction is a float (0.2), "
                "tokens per layer are an int (512)"
            )
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> Budget:
        given = {key: getattr(self, key) for key in ("fraction", "tokens", "bytes") if getattr(self, key) is not None}
        if len(given) != 1:
            came = ", ".join(f"{key}={value}" for key, value in given.items()) or "none"
            raise BudgetError(f"budget: give exactly one of fraction, tokens and bytes; got {came}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise BudgetError(
                f"budget: a fraction lies in (0, 1]; got {self.fraction}. For a number of tokens per layer pass an int"
            )
        if self.tokens is not None and self.tokens < 1:
            raise BudgetError(f"budget: tokens per layer must be at least 1; got {self.tokens}")
        if self.bytes is not None and self.bytes < 1:
            raise BudgetError(f"budget: bytes must be at least 1; got {self.bytes}")
        return self

    @field_serializer("bytes")
    def _plain_bytes(self, value: ByteSize | None) -> int | None:
        return None if value is None else int(value)

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing ever has to go."""
        return self.fraction == 1.0

    @classmethod
    def parse(cls, given: object, default: Budget | None = None) -> Budget:
        """Reads a budget given as an object, a dict or bare: a float is a fraction, an int tokens, text bytes.

        Args:
            given: what the user wrote.
            default: where a bare amount takes `sink` and `recent` from.

        Raises:
            BudgetError: if it can be read as none of these.
        """
        protected: dict[str, Any] = {"sink": default.sink, "recent": default.recent} if default else {}
        if isinstance(given, cls):
            return given
        if isinstance(given, dict):
            return cls(**given)
        if isinstance(given, bool):
            raise BudgetError(f"budget: must be a number, text or a Budget; got {given}")
        if isinstance(given, Integral):
            return cls(tokens=int(given), **protected)
        if isinstance(given, Real):
            return cls(fraction=float(given), **protected)
        if isinstance(given, str):
            return cls(**{"bytes": given, **protected})
        raise BudgetError(
            f"budget: must be a float (fraction), an int (tokens per layer), text ('64MiB') or a Budget; got {given!r}"
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
        scorer, allocator, evictor = self.scorer, self.allocator, self.evictor
        unknown = [name for name in allocator.needs if name not in STATISTICS]
        if unknown:
            raise ConfigError(
                f"allocator {allocator.name}: needs the statistic '{unknown[0]}', which nobody computes; known: "
                f"{', '.join(sorted(STATISTICS))}"
            )
        if self.quantizer is not None and evictor is not None:
            self._check_residual(self.quantizer, evictor)
        if evictor is None:
            if not self.budget.keeps_everything:
                raise ConfigError(
                    "evictor: none, so nothing could be evicted to meet the budget; choose an evictor "
                    f"({', '.join(EVICTORS.names())}) or set budget=1.0"
                )
            if self.merger is not None:
                raise ConfigError(
                    f"merger {self.merger.name}: evictor is none, so there is nothing to merge; choose an evictor "
                    f"({', '.join(EVICTORS.names())}) or merger=None"
                )
            return self
        if scorer is None and evictor.reads_importance:
            raise ConfigError(
                f"evictor {evictor.name}: ranks tokens by importance, but scorer is none; choose a scorer "
                f"({', '.join(SCORERS.names())}) or evictor='streaming'"
            )
        if scorer is None and allocator.reads_importance:
            raise ConfigError(
                f"allocator {allocator.name}: reads importance, but scorer is none; choose a scorer "
                f"({', '.join(SCORERS.names())}) or allocator='uniform'"
            )
        if scorer is not None and allocator.reads_mass and not scorer.mass:
            mass = [name for name in SCORERS.names() if SCORERS.get(name).mass]
            raise ConfigError(
                f"allocator {allocator.name}: reads shares of mass, but the scores of {scorer.name} are no mass; "
                f"choose a scorer of mass ({', '.join(mass)}) or an allocator that reads none"
            )
        if self.merger is not None and self.merger.reads_mass and not (scorer is not None and scorer.mass):
            mass = [name for name in SCORERS.names() if SCORERS.get(name).mass]
            raise ConfigError(
                f"merger {self.merger.name}: reads attention as mass, but "
                f"{'scorer is none' if scorer is None else f'the scores of {scorer.name} are no mass'}; choose a "
                f"scorer of mass ({', '.join(mass)}) or another merger"
            )
        if allocator.splits_modality and not evictor.keeps_modality:
            able = [name for name in EVICTORS.names() if EVICTORS.get(name).keeps_modality]
            raise ConfigError(
                f"allocator {allocator.name}: gives image tokens a budget of their own, which {evictor.name} does not "
                f"keep; choose an evictor that does ({', '.join(able)}) or another allocator"
            )
        recent = max(self.budget.recent, scorer.protects if scorer else 0)
        if evictor.reach is not None and recent > evictor.reach:
            raise ConfigError(
                f"evictor {evictor.name}: decode steps free the slot {evictor.reach} before the end, which would evict "
                f"some of the {recent} recents; raise its distance, lower budget.recent or choose decode='oldest'"
            )
        return self

    def _check_residual(self, quantizer: Quantizer, evictor: Evictor) -> None:
        """Decode steps free single slots, which only slots in full precision can be."""
        if evictor.frees == "nothing":
            return
        many = 2**20
        recent = max(self.budget.recent, self.scorer.protects if self.scorer else 0)
        loose = many - evictor.pinned(many, self.budget.sink, recent)
        if evictor.frees == "chosen" or loose > quantizer.residual:
            reach = "any slot" if evictor.frees == "chosen" or loose > many // 2 else f"the last {loose} slots"
            raise ConfigError(
                f"quantizer {quantizer.name}: decode steps of the evictor {evictor.name} free {reach}, but only the "
                f"residual of {quantizer.residual} is not quantized; choose an evictor with decode='fixed_point' or "
                "'none', or a residual of at least its distance"
            )

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
            f"CompressionConfig; got {given!r}"
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CompressionConfig:
        """Reads a .yaml, .yml or .json file.

        Raises:
            ConfigError: if the file cannot be read or parsed, or does not describe a valid configuration.
        """
        path = _format_of(path)
        try:
            text = path.read_text(encoding="utf-8")
            fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path}: cannot be read: {error}") from None
        except (yaml.YAMLError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"config {path}: is not valid {path.suffix[1:].upper()}: {reason}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"config {path}: must hold a mapping of fields ({', '.join(cls.model_fields)})")
        try:
            return cls(**fields)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"config {path}: {error}") from None

    def dump(self, path: str | PathLike[str]) -> None:
        """Writes the exact inverse of `load` to a .yaml, .yml or .json file."""
        path, fields = _format_of(path), self.model_dump(mode="json")
        text = (
            json.dumps(fields, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
        )
        path.write_text(text, encoding="utf-8")


_FORMATS = (".yaml", ".yml", ".json")


def _format_of(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ConfigError(f"config {path}: the file name must end in one of {', '.join(_FORMATS)}")
    return path


# name -> (what it is, fields)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": (
        "Keeps everything: the reference that compression is compared with.",
        {"budget": 1.0, "evictor": None},
    ),
    "prefixkv": (
        "PrefixKV (arXiv 2412.03409): layer sizes from one threshold on summed attention, fixed-point decoding.",
        {"budget": {"fraction": 0.2, "sink": 1, "recent": 1}, "scorer": "attention", "allocator": "prefix"},
    ),
    "uniform": (
        "The baseline of PrefixKV: the same scores and rules, every layer the same size.",
        {"budget": {"fraction": 0.2, "sink": 1, "recent": 1}, "scorer": "attention", "allocator": "uniform"},
    ),
    "streaming": (
        "StreamingLLM (arXiv 2309.17453): four sinks and the most recent tokens.",
        {"budget": {"fraction": 0.2, "sink": 4, "recent": 1}, "allocator": "uniform", "evictor": "streaming"},
    ),
}
