"""What a line of results must hold, so that a file which others wrote is refused by its line and field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kvcompress.errors import ConfigError, shown
from kvcompress.evaluation.metrics import PERPLEXITY

_Number = int | float


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Interval(_Line):
    value: _Number
    ci_low: _Number
    ci_high: _Number


class _Skipped(_Line):
    sample: str
    reason: str


class _Figures(_Line):
    retention: _Number
    kv_bytes: _Number
    full_kv_bytes: _Number
    seconds_to_first_token: _Number | None
    tokens_per_second: _Number | None
    peak_bytes: int | None


class _Cell(_Figures):
    cell: str
    policy: str
    budget: _Number
    budget_unit: Literal["fraction", "tokens", "bytes"]
    model: str
    dtype: str
    data: str
    question: Literal["seen", "unseen"] = "seen"
    samples: int
    skipped: int
    skipped_samples: list[_Skipped]
    metrics: dict[str, _Interval]
    config: dict[str, Any] | None


class _Name(_Line):
    cell: str
    sample: str


class _SkippedSample(_Name):
    skipped: str


class _Sample(_Name, _Figures):
    kind: str
    prompt_tokens: int
    text: str | None = None


def check_cell(row: dict[str, Any], where: str, way_out: str = "") -> None:
    """Raises ConfigError unless a line is about a finished cell.

    Args:
        row: the line.
        where: how the error begins.
        way_out: how it ends.
    """
    _check(_Cell, row, where, way_out)


def check_sample(record: dict[str, Any], where: str, metrics: Iterable[str] = ()) -> None:
    """Raises ConfigError unless a line is about a sample.

    Args:
        record: the line.
        where: how the error begins.
        metrics: names of metrics that it must have figures for.
    """
    if "skipped" in record:
        _check(_SkippedSample, record, where)
        return
    _check(_Sample, record, where)
    for metric in metrics:
        for name in ("nll", "answer_tokens") if metric == PERPLEXITY else (metric,):
            if isinstance(record.get(name), bool) or not isinstance(record.get(name), int | float):
                raise ConfigError(f"{where}: {name}: must be a number; got {shown(record.get(name))}")


def _check(kind: type[_Line], line: dict[str, Any], where: str, way_out: str = "") -> None:
    try:
        kind.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {field}: {first['msg']}; got {shown(first['input'])}{way_out}") from None
